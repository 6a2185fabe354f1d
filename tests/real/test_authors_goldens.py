"""Numbers of the authors' code (../shared/goldens-2), through the path a user's .pth takes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mfdetr_cache.detectors.protocol import Detector, MaskingDetector
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.types import DetectorOutput
from tests.support.authors import golden_weights
from tests.support.official import load_rule

VARIANTS = {
    "rtdetr_r18vd": "rt-detr",
    "dfine_n": "d-fine",
    "deim_n": "deim",
    "deimv2_atto": "deimv2",
    "deimv2_pico": "deimv2",
    "rfdetr_nano": "rf-detr",
    "rfdetr_base": "rf-detr",
    "rfdetr_seg_nano": "rf-detr",
    "lwdetr_tiny": "lw-detr",
}
# The goldens' README: the authors' own float32 differs from their float64 by up to 1e-4 in logits,
# 1.5e-4 in queries and 3.4e-6 in boxes; every wrong detail it tried moves logits by 4e-3 and more.
ATOL, BOX_ATOL, MAP_ATOL = 5e-4, 2e-5, 5e-4
CASES = [
    pytest.param(variant, case, id=f"{variant}-{case}")
    for variant in VARIANTS
    for case in ("single", "rect")
    if case == "single" or variant not in ("rfdetr_base", "rfdetr_seg_nano")
]


@pytest.fixture(scope="module")
def goldens(shared: Path) -> Path:
    if not (shared / "goldens-2").is_dir():
        pytest.skip("../shared/goldens-2 is not there")
    return shared / "goldens-2"


@pytest.fixture(scope="module")
def detectors(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> "dict[str, Detector]":
    return {}


def _detector(goldens: Path, variant: str, made: dict[str, Detector], scratch: Path) -> Detector:
    if variant not in made:
        weights = golden_weights(goldens, variant)
        path = scratch / f"{variant}.pth"
        # An average beside weights that nobody must take.
        spoilt = {k: torch.zeros_like(v) for k, v in weights.items()}
        is_lw = "query_feat.weight" in weights
        torch.save(
            {"model": weights} if is_lw else {"model": spoilt, "ema": {"module": weights}}, path
        )
        made.clear()  # one at a time: they are up to 130 MB
        made[variant] = load_detector(VARIANTS[variant], str(path))
        path.unlink()
    return made[variant]


@pytest.mark.parametrize(("variant", "case"), CASES)
def test_a_checkpoint_gives_the_authors_numbers(
    goldens: Path, detectors: dict[str, Detector], tmp_path: Path, variant: str, case: str
) -> None:
    detector = _detector(goldens, variant, detectors, tmp_path)
    meta = json.loads((goldens / variant / "meta.json").read_text())["cases"][case]
    if case == "single":
        assert detector.input_geometry((100, 200)).input_hw == tuple(meta["sizes_hw"][0])
    rule = load_rule(goldens, "rule2")
    images = np.stack([rule.image(h, w, i) for i, (h, w) in enumerate(meta["sizes_hw"])])
    with torch.no_grad():
        output = detector.forward(torch.from_numpy(images))
    expected = np.load(goldens / variant / f"{case}.npz")
    assert output.class_logits.shape == expected["pred_logits"].shape
    for image in range(len(images)):
        _compare_queries(output, expected, image)
    _compare_maps(detector, output, expected, meta["full_map_stats"])


def test_rf_detr_gives_the_authors_masks(
    goldens: Path, detectors: dict[str, Detector], tmp_path: Path
) -> None:
    detector = _detector(goldens, "rfdetr_seg_nano", detectors, tmp_path)
    assert isinstance(detector, MaskingDetector)
    image = torch.from_numpy(load_rule(goldens, "rule2").image(312, 312, 0))
    expected = np.load(goldens / "rfdetr_seg_nano/single.npz")
    output = detector.forward(image[None])
    theirs = torch.from_numpy(
        np.concatenate([expected["pred_logits"][0], expected["pred_boxes"][0]], 1)
    )
    ours = torch.cat([output.class_logits[0], output.boxes_cxcywh_norm[0]], 1)
    partner = torch.cdist(theirs, ours).argmin(1)
    masks = detector.own_masks(output, (312, 312))[:, partner]
    assert masks.shape == (1, 100, 78, 78)
    # Their float32 differs from their float64 by up to 2.3e-4.
    wanted = expected["pred_masks_q_every8_yx_every4"]
    np.testing.assert_allclose(masks[:, ::8, ::4, ::4].numpy(), wanted, rtol=0, atol=ATOL)


def _compare_queries(
    output: DetectorOutput, expected: dict[str, NDArray[np.float32]], image: int
) -> None:
    """Each query beside its like: proposals closer than float32 noise may change places."""
    ours = torch.cat([output.class_logits[image], output.boxes_cxcywh_norm[image]], 1)
    theirs = torch.from_numpy(
        np.concatenate([expected["pred_logits"][image], expected["pred_boxes"][image]], 1)
    )
    partner = torch.cdist(ours, theirs).argmin(1)
    assert len(partner.unique()) == len(ours)
    for found, name, atol in (
        (output.class_logits, "pred_logits", ATOL),
        (output.boxes_cxcywh_norm, "pred_boxes", BOX_ATOL),
        (output.queries, "queries_last", ATOL),
    ):
        wanted = expected[name][image][partner.numpy()]
        np.testing.assert_allclose(found[image].numpy(), wanted, rtol=0, atol=atol, err_msg=name)


def _compare_maps(
    detector: Detector,
    output: DetectorOutput,
    expected: dict[str, NDArray[np.float32]],
    stats: dict[str, dict[str, float]],
) -> None:
    encoder = [m.name for m in detector.spec.maps if m.role == "encoder"]
    compared = set()
    for name in expected:
        match = re.match(r"(encoder_out(\d)|c1)_ch_every(\d+)_yx_every(\d+)", name)
        if match is None:
            continue
        channels, cells = int(match[3]), int(match[4])
        found = output.maps[encoder[int(match[2])] if match[2] else "c1"]
        atol = MAP_ATOL * stats[match[1]]["std"]
        np.testing.assert_allclose(
            found[:, ::channels, ::cells, ::cells], expected[name], rtol=0, atol=atol, err_msg=name
        )
        compared.add(match[1])
    assert compared == {
        "c1" if m.role == "c1" else f"encoder_out{encoder.index(m.name)}"
        for m in detector.spec.maps
        if m.role in ("c1", "encoder")
    }
