"""Masks of detections: what is left out before the head runs is nothing that would be shown."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mfdetr_cache.choices import Scoring
from mfdetr_cache.evaluation.detections import detections_of
from mfdetr_cache.evaluation.inference import MaskPrediction, predict_live, predict_masks
from mfdetr_cache.evaluation.segmentation import Segmentation
from mfdetr_cache.head.batch import HeadBatch, map_groups
from mfdetr_cache.head.build import build_head
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.ops.boxes import cxcywh_to_xyxy
from mfdetr_cache.types import DetectorOutput
from tests.head.test_mask_head import randomise
from tests.support.images import make_image, make_spec

SPEC = make_spec()
IMAGE = make_image(SPEC)
CPU = torch.device("cpu")
SMALL = {"hidden_dim": 16, "roi_size": 8, "image_layers": 1, "box_layers": 1}


def shown(prediction: MaskPrediction, threshold: float) -> Segmentation:
    return Segmentation.of(prediction, (0, 1, 2), {}, IMAGE.geometry.original_hw, threshold)


@pytest.mark.parametrize(
    ("changes", "scorings"),
    [
        ({}, ("iou", "mean", "class")),
        ({"mask_scoring": False}, ("auto",)),
        ({"query_o2o": True}, ("iou",)),
        (
            {"roialign": False, "box_layers": 0, "query_b2o": False, "mask_scoring": False},
            ("mean",),
        ),
        (
            {
                "mask_predictor": "refined",
                "box_layers": 0,
                "query_ffn": False,
                "query_b2o": False,
                "mask_scoring": False,
            },
            ("mean",),
        ),
    ],
)
@pytest.mark.parametrize("threshold", [0.08, 0.3])
def test_detections_below_the_threshold_need_no_mask(
    changes: dict[str, Any], scorings: tuple[Scoring, ...], threshold: float
) -> None:
    torch.manual_seed(0)
    head = build_head(HeadConfig(**{**SMALL, **changes}), SPEC).eval()
    for scoring in scorings:
        whole = predict_masks(head, IMAGE, SPEC, CPU, scoring)
        found = predict_masks(head, IMAGE, SPEC, CPU, scoring, threshold)
        assert (whole.confidences <= whole.detections.class_scores.double().numpy()).all()
        assert len(found.mask_probs) < len(whole.mask_probs)
        wanted, got = shown(whole, threshold), shown(found, threshold)
        assert np.array_equal(got.category_ids, wanted.category_ids)
        # Products of fewer rows may be summed in another order: some units of float32.
        assert got.scores == pytest.approx(wanted.scores, rel=1e-5)
        assert np.array_equal(got.boxes_xyxy, wanted.boxes_xyxy)
        for ours, theirs in zip(got.run_lengths, wanted.run_lengths, strict=True):
            assert np.array_equal(ours, theirs)


def test_masks_over_a_padded_input_reach_as_far_as_it_does() -> None:
    torch.manual_seed(0)
    whole = HeadConfig(
        **SMALL | {"box_layers": 0}, roialign=False, query_b2o=False, mask_scoring=False
    )
    geometry = replace(IMAGE.geometry, resized_hw=(48, 64))
    found = predict_masks(
        build_head(whole, SPEC).eval(), replace(IMAGE, geometry=geometry), SPEC, CPU
    )
    (height, width), (all_height, all_width) = geometry.original_hw, geometry.input_hw
    expected = [0, 0, width * all_width / 64, height * all_height / 48]
    assert (found.boxes_xyxy == torch.tensor(expected)).all()


def test_nothing_above_the_threshold_is_no_mask() -> None:
    head = build_head(HeadConfig(**SMALL), SPEC).eval()
    found = predict_masks(head, IMAGE, SPEC, CPU, threshold=0.999)
    assert len(found.detections) == len(found.mask_probs) == len(shown(found, 0.999)) == 0


def test_a_live_image_has_the_masks_of_a_cached_one() -> None:
    head = build_head(HeadConfig(**SMALL), SPEC).eval()
    maps = {
        name: torch.from_numpy(np.asarray(m, np.float32)).permute(2, 0, 1)[None]
        for name, m in IMAGE.maps.items()
    }
    output = DetectorOutput(
        torch.from_numpy(IMAGE.class_logits)[None],
        torch.from_numpy(IMAGE.boxes_cxcywh_norm)[None],
        torch.from_numpy(IMAGE.queries.astype(np.float32))[None],
        maps,
    )
    live = predict_live(head, output, IMAGE.geometry, SPEC, threshold=0.1)
    cached = predict_masks(head, IMAGE, SPEC, CPU, threshold=0.1)
    assert torch.equal(live.mask_index, cached.mask_index)
    # The maps lie in memory in another order, and sums may follow it.
    torch.testing.assert_close(live.mask_probs, cached.mask_probs, atol=1e-5, rtol=0)
    assert live.confidences == pytest.approx(cached.confidences, rel=1e-5)


def test_boxes_that_a_head_moves_become_those_of_its_detections() -> None:
    """They are moved in network pixels, and mask, box and box AP follow them in the image."""
    parts = {"box_layers": 0, "query_ffn": False, "query_b2o": False, "mask_scoring": False}
    config = HeadConfig(**{**SMALL, **parts}, mask_predictor="refined", refinement_stages=2)
    torch.manual_seed(0)
    head = randomise(build_head(config, SPEC)).eval()
    assert isinstance(head, MaskHead)
    detected = detections_of(IMAGE, SPEC)
    found = predict_masks(head, IMAGE, SPEC, CPU)
    assert torch.equal(found.detections.query_index, detected.query_index)
    queries = detected.query_index.unique()
    (height, width), (rows, columns) = IMAGE.geometry.resized_hw, IMAGE.geometry.original_hw
    batch = HeadBatch(
        map_groups([IMAGE], head.map_names, CPU),
        torch.from_numpy(IMAGE.queries.astype(np.float32))[queries],
        cxcywh_to_xyxy(torch.from_numpy(IMAGE.boxes_cxcywh_norm))[queries]
        * torch.tensor([width, height, width, height]),
        torch.zeros(len(queries), dtype=torch.long),
    )
    with torch.no_grad():
        moved = head(batch).stages[-1].boxes_xyxy
    wanted = moved * torch.tensor([columns / width, rows / height] * 2)
    torch.testing.assert_close(found.boxes_xyxy, wanted, rtol=1e-4, atol=1e-2)
    assert torch.equal(found.detections.boxes_xyxy, found.boxes_xyxy[found.mask_index])
    assert (found.detections.boxes_xyxy - detected.boxes_xyxy).abs().max() > 1
