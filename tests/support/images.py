"""Cached images made up in memory, for tests that need no detector."""

import numpy as np
import torch

from mfdetr_cache.head.batch import HeadBatch, MapGroup
from mfdetr_cache.ops.quantisation import StoredMap
from mfdetr_cache.types import (
    CachedImage,
    DetectorSpec,
    GroundTruth,
    ImageGeometry,
    MapSpec,
)
from tests.support.rectangles import runs_of


def make_spec(
    *,
    width: int = 32,
    c1_channels: int | None = 24,
    strides: tuple[int, ...] = (8, 16, 32),
    backbone8: bool = False,
    num_labels: int = 3,
    num_queries: int = 12,
    query_dim: int | None = None,
    level_embed: bool = False,
) -> DetectorSpec:
    maps = [MapSpec(f"encoder{s}", "encoder", s, width, "test") for s in strides]
    if backbone8:
        maps.insert(0, MapSpec("backbone8", "backbone", 8, 48, "test"))
    if c1_channels is not None:
        maps.insert(0, MapSpec("c1", "c1", 4, c1_channels, "test"))
    embed = tuple((0.1 * i,) * width for i in range(len(strides))) if level_embed else None
    return DetectorSpec(
        name="test",
        weights_sha256="0" * 64,
        num_queries=num_queries,
        query_dim=query_dim or width,
        num_labels=num_labels,
        score_function="sigmoid",
        label_names=tuple(f"label{i}" for i in range(num_labels)),
        maps=tuple(maps),
        encoder_level_embed=embed,
    )


def make_batch(
    spec: DetectorSpec,
    sizes_hw: list[tuple[int, int]],
    regions_per_image: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> HeadBatch:
    """Random maps of images of the given input sizes, with random boxes."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    groups, boxes, owner = [], [], []
    for size in dict.fromkeys(sizes_hw):
        members = [i for i, s in enumerate(sizes_hw) if s == size]
        maps = {
            m.name: random(
                len(members), m.channels, -(-size[0] // m.stride), -(-size[1] // m.stride)
            )
            for m in spec.maps
        }
        groups.append(MapGroup(maps, size, tuple(members)))
    for index, (height, width) in enumerate(sizes_hw):
        corner = torch.rand(regions_per_image, 2, generator=generator, dtype=dtype) * 0.5
        extent = 0.2 + 0.4 * torch.rand(regions_per_image, 2, generator=generator, dtype=dtype)
        scale = torch.tensor([width, height], dtype=dtype)
        boxes.append(torch.cat((corner * scale, (corner + extent) * scale), dim=1))
        owner.append(torch.full((regions_per_image,), index))
    count = regions_per_image * len(sizes_hw)
    return HeadBatch(
        tuple(groups), random(count, spec.query_dim), torch.cat(boxes), torch.cat(owner)
    )


def make_ground_truth(size_hw: tuple[int, int], count: int = 2, seed: int = 0) -> GroundTruth:
    random = np.random.default_rng(seed)
    height, width = size_hw
    boxes, runs, areas = [], [], []
    for _ in range(count):
        w, h = random.integers(width // 6, width // 2), random.integers(height // 6, height // 2)
        x, y = random.integers(0, width - w), random.integers(0, height - h)
        mask = np.zeros(size_hw, dtype=bool)
        mask[y : y + h, x : x + w] = True
        mask[y : y + h // 2, x : x + w // 2] = False
        boxes.append((x, y, x + w, y + h))
        runs.append(runs_of(mask))
        areas.append(mask.sum())
    return GroundTruth(
        annotation_ids=np.arange(1, count + 1, dtype=np.int64),
        category_ids=np.ones(count, dtype=np.int64),
        labels=np.zeros(count, dtype=np.int64),
        boxes_xyxy=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        areas=np.array(areas, dtype=np.float64),
        is_crowd=np.zeros(count, dtype=np.bool_),
        run_lengths=tuple(runs),
    )


def make_image(
    spec: DetectorSpec,
    *,
    original_hw: tuple[int, int] = (120, 160),
    input_hw: tuple[int, int] = (96, 128),
    ground_truth: GroundTruth | None = None,
    row: int = 0,
    seed: int = 0,
) -> CachedImage:
    """An image whose first queries lie on its objects and whose others lie anywhere."""
    random = np.random.default_rng(seed)
    truth = make_ground_truth(original_hw, seed=seed) if ground_truth is None else ground_truth
    boxes = random.uniform(0.2, 0.8, (spec.num_queries, 4)).astype(np.float32)
    height, width = original_hw
    for index, box in enumerate(truth.boxes_xyxy[: spec.num_queries]):
        x0, y0, x1, y1 = box
        boxes[index] = (
            (x0 + x1) / 2 / width,
            (y0 + y1) / 2 / height,
            (x1 - x0) / width,
            (y1 - y0) / height,
        )
    logits = random.normal(-3, 1, (spec.num_queries, spec.num_labels)).astype(np.float32)
    logits[: len(truth), 0] = 3.0
    maps = {
        m.name: StoredMap.plain(
            random.normal(
                size=(-(-input_hw[0] // m.stride), -(-input_hw[1] // m.stride), m.channels)
            ).astype(np.float16)
        )
        for m in spec.maps
    }
    return CachedImage(
        row=row,
        image_id=row + 1,
        file_name=f"{row}.png",
        geometry=ImageGeometry(original_hw, input_hw, input_hw),
        class_logits=logits,
        boxes_cxcywh_norm=boxes,
        queries=random.normal(size=(spec.num_queries, spec.query_dim)).astype(np.float16),
        maps=maps,
        ground_truth=truth,
    )
