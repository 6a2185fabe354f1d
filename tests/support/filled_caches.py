"""Caches of two views whose every value is known, written without a detector."""

from pathlib import Path
from typing import Any

import torch

from mfdetr_cache.cache.annotations import AnnotationContent
from mfdetr_cache.cache.creation import CacheContent
from mfdetr_cache.cache.root import Root
from mfdetr_cache.cache.schema import CacheLayout, MapLayout, Part, plan_layout
from mfdetr_cache.cache.writer import CacheWriter
from mfdetr_cache.choices import Compression, Preset
from mfdetr_cache.coco.augmentation import identity_transform
from mfdetr_cache.coco.image_list import ImageEntry
from mfdetr_cache.identity import detector_identity
from mfdetr_cache.types import DetectorOutput, DetectorSpec, ImageGeometry
from tests.support.caches import append
from tests.support.images import make_ground_truth

VIEWS = ("base", "moved")
SIZES = [(96, 128), (64, 64), (128, 96), (96, 128), (33, 97), (96, 96), (8, 128)]


ALL_PARTS = tuple(Part(v, n) for v in VIEWS for n in range(3))


def make_content(spec: DetectorSpec, sizes: list[tuple[int, int]], **changes: Any) -> CacheContent:
    preset: Preset = changes.pop("preset", "fp16")
    compression: Compression = changes.pop("compression", "zstd")
    layout = plan_layout(spec, set(sizes), len(sizes), preset)
    # Small parts, so that there are several.
    maps = {
        name: MapLayout(m.chunk_tokens, m.part_tokens // layout.images_per_part * 3)
        for name, m in layout.maps.items()
    }
    settings: dict[str, Any] = {
        "identity": {"detector": detector_identity(spec), "images": {"count": len(sizes)}},
        "layout": CacheLayout(len(sizes), 3, preset, compression, VIEWS, maps),
        **changes,
    }
    originals = [(2 * h, 2 * w) for h, w in sizes]
    objects = {
        view: [
            make_ground_truth(hw, count=i % 3, seed=i + 50 * number)
            for i, hw in enumerate(originals)
        ]
        for number, view in enumerate(VIEWS)
    }
    return CacheContent(
        root=Root(spec=spec, **settings),
        images=[
            ImageEntry(10 * i + 1, f"folder/ü{i}.jpg", hw, i) for i, hw in enumerate(originals)
        ],
        transforms={view: [identity_transform(hw) for hw in originals] for view in VIEWS},
        labels=AnnotationContent(
            {"name": "test", "sha256": ""}, [{"id": 1, "name": "thing"}], (1, -1, -1), objects
        ),
    )


def make_output(spec: DetectorSpec, size_hw: tuple[int, int], seed: int) -> DetectorOutput:
    generator = torch.Generator().manual_seed(seed)
    height, width = size_hw
    q = spec.num_queries
    return DetectorOutput(
        torch.randn(1, q, spec.num_labels, generator=generator),
        torch.rand(1, q, 4, generator=generator),
        torch.randn(1, q, spec.query_dim, generator=generator),
        {
            m.name: torch.randn(
                1, m.channels, -(-height // m.stride), -(-width // m.stride), generator=generator
            )
            for m in spec.maps
        },
    )


def fill(
    path: Path, content: CacheContent, sizes: list[tuple[int, int]], stop_after: int = 99
) -> None:
    """Write parts; row 4 is skipped. Parts do not depend on the order they are written in."""
    with CacheWriter.open_or_create(path, content) as writer:
        for part in writer.pending_parts()[:stop_after]:
            writer.begin_part(part)
            for row in writer.rows_of_part(part):
                if row == 4:
                    writer.skip(row, "broken")
                    continue
                geometry = ImageGeometry(content.images[row].size_hw, sizes[row], sizes[row])
                seed = row + 100 * VIEWS.index(part.view)
                append(writer, row, geometry, make_output(content.root.spec, sizes[row], seed))
            writer.seal_part()
