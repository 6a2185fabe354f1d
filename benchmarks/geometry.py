"""A made-up cache at COCO sizes, in the geometry of H-DETR R50 or another, for benchmarks."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from mfdetr_cache.cache.annotations import AnnotationContent
from mfdetr_cache.cache.creation import CacheContent
from mfdetr_cache.cache.encoder import EncodedImage
from mfdetr_cache.cache.root import Root
from mfdetr_cache.cache.schema import plan_layout
from mfdetr_cache.cache.writer import CacheWriter
from mfdetr_cache.choices import Compression, Preset
from mfdetr_cache.coco.augmentation import identity_transform
from mfdetr_cache.coco.image_list import ImageEntry
from mfdetr_cache.detectors.preprocess import shortest_edge_size
from mfdetr_cache.head.cost import paper_detector
from mfdetr_cache.identity import detector_identity
from mfdetr_cache.ops.cores import threads_beside_gpu
from mfdetr_cache.ops.masks import encode_mask, run_lengths_of_segmentation
from mfdetr_cache.types import DetectorOutput, DetectorSpec, GroundTruth, ImageGeometry

# Common sizes of COCO images, height and width.
COCO_SIZES = ((480, 640), (427, 640), (640, 480), (640, 427), (500, 375), (375, 500))


def mixed_sizes(count: int) -> list[tuple[int, int]]:
    """Sizes as mixed as those of COCO.

    A quarter of its images have the first size, an eighth each of the next two; the others are 640
    pixels long and spread so that a batch of eight has six network input sizes.
    """
    random = np.random.default_rng(0)
    sizes = []
    for _ in range(count):
        kind, other = random.random(), int(random.integers(360, 500))
        if kind < 0.5:
            sizes.append(COCO_SIZES[0 if kind < 0.25 else 1 if kind < 0.375 else 2])
        else:
            sizes.append((other, 640) if kind < 0.85 else (640, other))
    return sizes


def made_output(spec: DetectorSpec, input_hw: tuple[int, int], seed: int) -> DetectorOutput:
    """Smooth random maps: C1 after a ReLU, encoder levels after a layer norm."""
    generator = torch.Generator().manual_seed(seed)
    maps = {}
    for m in spec.maps:
        size = [-(-side // m.stride) for side in input_hw]
        coarse = torch.randn(1, m.channels, *(-(-s // 3) for s in size), generator=generator)
        values = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
        values += 0.3 * torch.randn(values.shape, generator=generator)
        maps[m.name] = values.relu() if m.role == "c1" else values
    queries = spec.num_queries
    return DetectorOutput(
        torch.randn(1, queries, spec.num_labels, generator=generator) - 4,
        torch.rand(1, queries, 4, generator=generator) * 0.4 + 0.3,
        torch.randn(1, queries, spec.query_dim, generator=generator),
        maps,
    )


def made_ground_truth(size_hw: tuple[int, int], count: int, seed: int) -> GroundTruth:
    """Ellipses; COCO has 7.3 objects an image on average."""
    random = np.random.default_rng(seed)
    height, width = size_hw
    y, x = np.mgrid[:height, :width]
    boxes, runs, areas = [], [], []
    for _ in range(count):
        w, h = random.uniform(0.1, 0.5, 2) * (width, height)
        x0, y0 = random.uniform(0, 1, 2) * (width - w, height - h)
        mask = ((x - x0 - w / 2) / w) ** 2 + ((y - y0 - h / 2) / h) ** 2 <= 0.25
        boxes.append((x0, y0, x0 + w, y0 + h))
        runs.append(run_lengths_of_segmentation(encode_mask(mask), size_hw))
        areas.append(float(mask.sum()))
    return GroundTruth(
        np.arange(1, count + 1),
        np.ones(count, np.int64),
        np.ones(count, np.int64),
        np.array(boxes, np.float32),
        np.array(areas),
        np.zeros(count, np.bool_),
        tuple(runs),
    )


def made_content(
    preset: Preset,
    compression: Compression = "zstd",
    images: int = 12,
    spec: DetectorSpec | None = None,
    sizes: list[tuple[int, int]] | None = None,
) -> CacheContent:
    """What a cache of made-up images is of."""
    spec = spec or paper_detector()
    sizes = sizes or [COCO_SIZES[i % len(COCO_SIZES)] for i in range(images)]
    identity = {
        "detector": detector_identity(spec),
        "images": {"count": images, "sha256": ""},
        "views": ["base"],
        "view_seed": None,
        "preset": preset,
        "compression": compression,
    }
    layout = plan_layout(spec, set(map(input_size, sizes)), images, preset, compression)
    return CacheContent(
        root=Root(identity, spec, layout),
        images=[ImageEntry(i + 1, f"{i}.jpg", size, i) for i, size in enumerate(sizes)],
        transforms={"base": [identity_transform(s) for s in sizes]},
        labels=AnnotationContent(
            {"name": "made", "sha256": ""},
            [{"id": 1, "name": "thing"}],
            (-1, 1, *(-1,) * (spec.num_labels - 2)),
            {"base": [made_ground_truth(s, 7, i) for i, s in enumerate(sizes)]},
        ),
    )


def input_size(size_hw: tuple[int, int]) -> tuple[int, int]:
    """What an image is resized to."""
    return shortest_edge_size(size_hw, 800, 1333)


def made_cache(
    path: Path,
    preset: Preset,
    compression: Compression = "zstd",
    images: int = 12,
    spec: DetectorSpec | None = None,
    sizes: list[tuple[int, int]] | None = None,
) -> Path:
    """Write a cache of made-up images unless it is there."""
    content = made_content(preset, compression, images, spec, sizes)
    with (
        CacheWriter.open_or_create(path, content) as writer,
        ThreadPoolExecutor(threads_beside_gpu(8)) as pool,
    ):

        def encoded(row: int) -> EncodedImage:
            size = content.images[row].size_hw
            geometry = ImageGeometry(size, input_size(size), input_size(size))
            output = made_output(content.root.spec, input_size(size), row)
            return writer.encoder.encode(row, geometry, output)

        for part in writer.pending_parts():
            writer.begin_part(part)
            rows = writer.rows_of_part(part)
            for row, image in zip(rows, pool.map(encoded, rows), strict=True):
                writer.add(row, image)
            writer.seal_part()
    return path
