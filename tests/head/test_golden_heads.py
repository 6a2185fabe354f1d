"""A small head of every kind, kept as a folder, loads and computes what it did when it was kept.

The folders in ``golden/`` were written once by ``python -m tests.head.test_golden_heads`` and are
not written again when code moves: old heads must go on loading. A new kind of head gets a new row
in ``KINDS``; ``python -m tests.head.test_golden_heads KIND`` then writes that folder alone.

Each has ``config.json`` and ``head.safetensors`` as train-head writes them, and
``expected.safetensors``: what the head gives for the two images of :func:`batch_for`, computed in
float64 and kept in float32.
"""

import math
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mfdetr_cache.head.batch import HeadBatch, HeadOutput, MapGroup
from mfdetr_cache.head.build import build_head
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.head.folder import HEAD_FILE, RunRecord, load_head, save_head, save_run_config
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.identity import detector_identity, spec_from_identity
from mfdetr_cache.types import DetectorSpec
from tests.support.images import make_spec

GOLDEN = Path(__file__).parent / "golden"
EXPECTED_FILE = "expected.safetensors"
SIZES = [(64, 96), (80, 64)]
# In network input pixels: inside, over the border, small, wide; the owner of each.
BOXES = [
    (8.5, 4.0, 70.25, 60.0),
    (-6.0, 20.0, 30.0, 75.5),
    (40.0, 41.0, 43.0, 44.5),
    (0, 5, 63, 40),
]
OWNERS = [0, 1, 0, 1]
# These weights alone would be 1.9 MB: they follow from a rule, and only their shapes are kept.
BY_RULE = ("scoring.", "predictor.code.")
# Weights that kept folders may lack: the layer scale of ConvNeXt blocks, which is 1 there.
SINCE_ADDED = (".scale",)

PLAIN: dict[str, Any] = {
    "hidden_dim": 8,
    "roi_size": 8,
    "image_layers": 1,
    "box_layers": 1,
    "mask_scoring": False,
}
NO_IMAGE = {"image_layers": 0}
NO_REGIONS = {"roialign": False, "box_layers": 0, "query_b2o": False}
# Changes of the head, and of the detector it is for.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dot": ({}, {}),
    "segmenter": ({"mask_predictor": "segmenter", **NO_IMAGE}, {}),
    "fcn": (
        {"mask_predictor": "fcn", "box_layers": 0, "query_ffn": False, "query_b2o": False}
        | NO_IMAGE,
        {},
    ),
    "dynamic": (
        {"mask_predictor": "dynamic", "box_layers": 0, "query_ffn": False, "query_b2o": False}
        | NO_IMAGE,
        {},
    ),
    "embedding": ({"mask_predictor": "embedding", "mask_embedding_dim": 4, **NO_IMAGE}, {}),
    "scoring": ({"mask_scoring": True, **NO_IMAGE}, {}),
    "deformable": ({"image_layers": 2, "box_layers": 2}, {}),
    "swin": (
        {"image_block": "swin", "image_layers": 2, "box_block": "swin", "box_layers": 2},
        {},
    ),
    "convnext": (
        {"image_block": "convnext", "image_layers": 2, "box_block": "convnext", "box_layers": 2},
        {},
    ),
    "ffn": (
        {"image_block": "ffn", "image_layers": 2, "box_block": "ffn", "box_layers": 2},
        {},
    ),
    "no-layers": ({"image_layers": 0, "box_layers": 0}, {}),
    "no-c1": ({"use_c1": False}, {}),
    "no-c1-upsampled": ({"use_c1": False, "upsample_without_c1": True, **NO_IMAGE}, {}),
    "no-neck": ({"neck": False}, {"c1_channels": 16}),
    "no-mapper": ({"hidden_dim": 16}, {"query_dim": 16}),
    "no-roialign": (NO_REGIONS, {}),
    "no-roialign-no-c1": ({**NO_REGIONS, "use_c1": False, **NO_IMAGE}, {}),
    "o2o": ({"query_o2o": True, **NO_IMAGE}, {}),
    "plain-queries": ({"query_ffn": False, "query_b2o": False, **NO_IMAGE}, {}),
    "fuse-16": ({"fuse_stride": 16}, {}),
    "fixed-samples": ({"roi_sampling_ratio": 1, **NO_IMAGE}, {}),
    "fine": ({"fine_size": 16, "fine_dim": 8, "fine_layers": 1, **NO_IMAGE}, {}),
    "refined": (
        {
            "mask_predictor": "refined",
            "mask_embedding_dim": 4,
            "refinement_stages": 2,
            "box_layers": 0,
            "query_ffn": False,
            "query_b2o": False,
        }
        | NO_IMAGE,
        {},
    ),
    "points": (
        {"fine_size": 16, "fine_block": "points", "fine_dim": 8, "fine_layers": 1, **NO_IMAGE},
        {},
    ),
    "backbone-level": ({}, {"strides": (16, 32), "backbone8": True}),
    "frozen-embedding": ({}, {"level_embed": True}),
}


def wave(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers in [-1, 1) that follow from a name; exact in float32 on every machine."""
    index = np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(
        zlib.crc32(name.encode()) << 20
    )
    # The finaliser of SplitMix64; the upper 24 bits fit a float32.
    index = (index ^ (index >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    index = (index ^ (index >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    values = (index >> np.uint64(40)).astype(np.float64) / 2**23 - 1
    return torch.from_numpy(values.reshape(shape).astype(np.float32))


def by_rule(name: str, shape: tuple[int, ...]) -> Tensor:
    """A weight that is not kept; of a size that neither loses nor blows up a signal."""
    return wave(name, shape) * math.sqrt(6 / math.prod(shape[1:]) if len(shape) > 1 else 0.01)


def batch_for(
    spec: DetectorSpec, dtype: torch.dtype, images: tuple[int, ...] = (0, 1)
) -> HeadBatch:
    """Two images of different sizes with two regions each, or one of them."""
    groups, regions = [], []
    for place, image in enumerate(images):
        height, width = SIZES[image]
        maps = {
            m.name: wave(
                f"{m.name} {image}", (1, m.channels, -(-height // m.stride), -(-width // m.stride))
            ).to(dtype)
            for m in spec.maps
        }
        groups.append(MapGroup(maps, SIZES[image], (place,)))
        regions += [(r, place) for r, owner in enumerate(OWNERS) if owner == image]
    regions.sort()
    chosen = [r for r, _ in regions]
    return HeadBatch(
        tuple(groups),
        2 * wave("queries", (len(BOXES), spec.query_dim)).to(dtype)[chosen],
        torch.tensor(BOXES, dtype=dtype)[chosen],
        torch.tensor([place for _, place in regions]),
    )


def outputs_of(head: MaskHead, spec: DetectorSpec, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a head gives; without RoIAlign one image at a time."""
    head = head.to(dtype)
    with torch.no_grad():
        if head.config.roialign:
            return named(head(batch_for(spec, dtype)), "")
        first, second = (head(batch_for(spec, dtype, (i,))) for i in (0, 1))
        return named(first, " 0") | named(second, " 1")


def named(output: HeadOutput, suffix: str) -> dict[str, Tensor]:
    found = {
        "mask_logits": output.mask_logits,
        "mask_iou": output.mask_iou,
        "codes": output.codes,
        "coarse_logits": output.coarse_logits,
        "boxes_xyxy": output.stages[-1].boxes_xyxy if output.stages else None,
    }
    return {name + suffix: t for name, t in found.items() if t is not None}


def largest_difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Over all outputs, in units of the largest value of each."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape
    return max(
        float((found[n].double() - t.double()).abs().max() / t.abs().max())
        for n, t in wanted.items()
    )


def whole_folder(kind: str, folder: Path) -> Path:
    """The kept folder, or where weights follow from the rule, one with them in it."""
    weights = load_file(GOLDEN / kind / HEAD_FILE)
    ruled = [name for name in weights if name.startswith(BY_RULE)]
    if not ruled:
        return GOLDEN / kind
    shutil.copytree(GOLDEN / kind, folder / kind)
    for name in ruled:
        weights[name] = by_rule(name, tuple(weights[name].tolist()))
    save_head(folder / kind, weights)
    return folder / kind


def test_every_golden_head_is_tested() -> None:
    assert sorted(p.name for p in GOLDEN.iterdir()) == sorted(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_golden_head_gives_what_it_gave(kind: str, tmp_path: Path) -> None:
    """In float64 to the rounding of what was kept, in float32 to its own rounding.

    Kept values are off by half a step of float32, at most 2^-24 or 6e-8 of the largest, and float64
    adds nothing that could be seen beside it: 1e-7. In float32 a value has gone through some ten
    matrix products and norms, each off by a few such steps: when they were written, the largest
    difference over all kinds was 7e-7 of the largest value (``write_golden`` prints it). Other
    processors sum in another order and may be off by several times that: 1e-5.
    """
    folder = load_head(whole_folder(kind, tmp_path))
    spec = spec_from_identity(folder.detector)
    wanted = load_file(GOLDEN / kind / EXPECTED_FILE)
    assert largest_difference(outputs_of(folder.head, spec, torch.float32), wanted) <= 1e-5
    assert largest_difference(outputs_of(folder.head, spec, torch.float64), wanted) <= 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_a_golden_head_gives_the_same_in_training(kind: str, tmp_path: Path) -> None:
    """Where regions are few, training takes the shortcut of ``sampled_cells.py``."""
    folder = load_head(whole_folder(kind, tmp_path))
    spec = spec_from_identity(folder.detector)
    wanted = load_file(GOLDEN / kind / EXPECTED_FILE)
    head = folder.head.train()
    # PointRend's points are for the loss to choose: there is the coarse mask alone.
    in_training = {"mask_logits": wanted["coarse_logits"]} if kind == "points" else wanted
    assert largest_difference(outputs_of(head, spec, torch.float64), in_training) <= 1e-7
    if head.config.roialign:
        batch = head.prepare(batch_for(spec, torch.float64))
        with torch.no_grad():
            assert largest_difference(named(head.eval()(batch), ""), wanted) <= 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_of_weights_are_those_kept(kind: str) -> None:
    kept = {
        name: tuple(t.tolist()) if name.startswith(BY_RULE) else tuple(t.shape)
        for name, t in load_file(GOLDEN / kind / HEAD_FILE).items()
    }
    head, detector = KINDS[kind]
    built = build_head(HeadConfig(**PLAIN | head), small_spec(**detector))
    shapes = {name: tuple(t.shape) for name, t in built.state_dict().items()}
    assert {name: s for name, s in shapes.items() if not name.endswith(SINCE_ADDED)} == kept


def small_spec(**changes: Any) -> DetectorSpec:
    small = {"width": 16, "c1_channels": 6, "strides": (8, 16), "query_dim": 12, "num_queries": 4}
    return make_spec(**small | changes)


def write_golden(kind: str) -> None:
    """Write one folder; for a new kind of head only."""
    changes, detector = KINDS[kind]
    config, spec = HeadConfig(**PLAIN | changes), small_spec(**detector)
    torch.manual_seed(0)
    head = build_head(config, spec).eval()
    with torch.no_grad():
        # Fresh offsets and biases are too regular to tell one way of computing from another.
        for name, parameter in head.named_parameters():
            parameter.add_(0.1 * wave(name, tuple(parameter.shape)))
            if name.startswith(BY_RULE):
                parameter.copy_(by_rule(name, tuple(parameter.shape)))
    folder = GOLDEN / kind
    folder.mkdir(parents=True)
    names = [{"id": i + 1, "name": name} for i, name in enumerate(spec.label_names)]
    record = RunRecord(
        recipe="golden",
        detector=detector_identity(spec),
        categories=names,
        label_categories=[entry["id"] for entry in names],
    )
    save_run_config(folder, config, record)
    kept = {
        # In place of a weight that follows from the rule, its shape.
        n: torch.tensor(t.shape, dtype=torch.int32) if n.startswith(BY_RULE) else t
        for n, t in head.state_dict().items()
    }
    save_head(folder, kept)
    single = outputs_of(head, spec, torch.float32)
    expected = {n: t.float() for n, t in outputs_of(head, spec, torch.float64).items()}
    save_file(expected, folder / EXPECTED_FILE)
    sizes = {n: f"{t.abs().max():.3g}" for n, t in expected.items()}
    sys.stdout.write(
        f"{kind}: float32 is off by {largest_difference(single, expected):.1e}, {sizes}\n"
    )


if __name__ == "__main__":
    for golden in sys.argv[1:] or KINDS:
        write_golden(golden)
