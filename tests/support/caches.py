"""Tiny caches as dictionaries, their whole content as plain values, and hostile documents."""

import functools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mfdetr_cache.cache.annotations import AnnotationContent
from mfdetr_cache.cache.creation import CacheContent
from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.root import Root
from mfdetr_cache.cache.schema import CacheLayout, MapLayout, plan_layout
from mfdetr_cache.cache.storage.local import LocalStorage
from mfdetr_cache.cache.storage.open import open_storage
from mfdetr_cache.cache.storage.protocol import Storage
from mfdetr_cache.cache.writer import CacheWriter
from mfdetr_cache.coco.augmentation import ViewTransform, identity_transform
from mfdetr_cache.coco.image_list import ImageEntry
from mfdetr_cache.identity import detector_identity
from mfdetr_cache.types import DetectorOutput, ImageGeometry
from tests.support.images import make_ground_truth, make_spec

VIEWS = ("base", "mirrored-0")
SIZES = [(16, 24), (16, 16), (24, 16), (8, 24), (16, 24)]
ROWS_OF_A_PART = 2
SKIPPED = 1


class DictStorage(Storage):
    """Files in a dictionary."""

    def __init__(self, files: dict[str, bytes], name: str = "made.zarr") -> None:
        self.files = files
        self.name = name

    def read(self, key: str) -> bytes:
        if key not in self.files:
            raise FileNotFoundError(key)
        return self.files[key]

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        data = self.read(key)
        return [data[start : start + size] for start, size in ranges]

    def size(self, key: str) -> int | None:
        return len(self.files[key]) if key in self.files else None

    def sizes(self, prefix: str) -> dict[str, int]:
        return {k: len(v) for k, v in sorted(self.files.items()) if k.startswith(prefix)}

    def write(self, key: str, pieces: Sequence[bytes]) -> None:
        self.files[key] = b"".join(pieces)

    def delete(self, key: str) -> None:
        self.files.pop(key, None)


def tiny_content(
    compression: str = "zstd", seed: int = 0, preset: str = "int8", labels: int = 0
) -> CacheContent:
    """Five images in three parts of two views; other labels change the annotations alone."""
    spec = make_spec(width=8, c1_channels=8, strides=(8, 16), num_queries=6)
    planned = plan_layout(spec, set(SIZES), len(SIZES), preset)  # type: ignore[arg-type]
    maps = {
        name: MapLayout(m.chunk_tokens, m.part_tokens // planned.images_per_part * ROWS_OF_A_PART)
        for name, m in planned.maps.items()
    }
    layout = CacheLayout(len(SIZES), ROWS_OF_A_PART, preset, compression, VIEWS, maps)  # type: ignore[arg-type]
    mirrored = [ViewTransform((0, 0, w, h), flip=True, shortest_edge=0) for h, w in SIZES]
    transforms = {VIEWS[0]: [identity_transform(hw) for hw in SIZES], VIEWS[1]: mirrored}
    identity = {
        "format_version": 2,
        "detector": detector_identity(spec),
        "images": {"count": len(SIZES), "sha256": f"{seed}"},
        "views": list(VIEWS),
        "view_seed": None,
    }
    objects = [
        make_ground_truth(hw, 2, seed=seed + 10 * i + 1000 * labels) for i, hw in enumerate(SIZES)
    ]
    return CacheContent(
        root=Root(identity, spec, layout),
        images=[ImageEntry(100 * seed + i, f"{seed}-{i}.jpg", hw, i) for i, hw in enumerate(SIZES)],
        transforms=transforms,
        labels=AnnotationContent(
            {"name": f"made-{labels}", "sha256": f"{seed} {labels}"},
            [{"id": 1, "name": "thing"}],
            (1, -1, -1),
            dict.fromkeys(VIEWS, objects),
        ),
    )


def tiny_output(content: CacheContent, view: str, row: int, seed: int = 0) -> DetectorOutput:
    generator = torch.Generator().manual_seed(1000 * seed + 100 * VIEWS.index(view) + row)
    height, width = SIZES[row]
    spec = content.root.spec

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator)

    return DetectorOutput(
        random(spec.num_queries, spec.num_labels),
        random(spec.num_queries, 4),
        random(spec.num_queries, spec.query_dim),
        {
            m.name: random(m.channels, -(-height // m.stride), -(-width // m.stride))
            for m in spec.maps
        },
    )


def append(writer: CacheWriter, row: int, geometry: ImageGeometry, output: DetectorOutput) -> int:
    """Encode one image and add it to the open part; returns the bytes added."""
    return writer.add(row, writer.encoder.encode(row, geometry, output))


def fill_part(writer: CacheWriter, content: CacheContent, part: Any, seed: int = 0) -> None:
    """What an extraction does with a part."""
    writer.begin_part(part)
    for row in writer.rows_of_part(part):
        if row == SKIPPED:
            writer.skip(row, "broken")
            continue
        geometry = ImageGeometry(SIZES[row], SIZES[row], SIZES[row])
        append(writer, row, geometry, tiny_output(content, part.view, row, seed))
    writer.seal_part()


@functools.lru_cache
def tiny_files(compression: str = "zstd", seed: int = 0, preset: str = "int8") -> dict[str, bytes]:
    """A whole cache; do not change it."""
    content = tiny_content(compression, seed, preset)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c"
        with CacheWriter.open_or_create(path, content) as writer:
            for part in writer.pending_parts():
                fill_part(writer, content, part, seed)
        storage = LocalStorage(path)
        return {k: storage.read(k) for k in storage.sizes("") if not k.endswith(".lock")}


def require_one_line(error: Exception) -> None:
    """What every refusal must be."""
    assert "\n" not in str(error)
    assert len(str(error)) < 1000


def everything(storage: Storage) -> dict[str, Any]:
    """All that a cache says, as plain values; what reading it must give or refuse."""
    cache = FeatureCache.open(storage)
    cache.require_complete()
    found: dict[str, Any] = {
        "categories": cache.categories,
        "labels": cache.label_categories,
        "skipped": cache.skipped,
        "id": cache.cache_id,
    }
    for name, view in cache.views.items():
        for row in view.rows:
            image = view.read(row)
            found[f"{name} {row}"] = (
                image.image_id,
                image.file_name,
                image.geometry,
                view.transform(row),
                cache.original_hw(row),
                image.class_logits.tobytes(),
                image.boxes_cxcywh_norm.tobytes(),
                np.asarray(image.queries).tobytes(),
                {m: np.asarray(v.to_array()).tobytes() for m, v in image.maps.items()},
                [r.tolist() for r in image.ground_truth.run_lengths],
                image.ground_truth.boxes_xyxy.tolist(),
                image.ground_truth.labels.tolist(),
                image.ground_truth.annotation_ids.tolist(),
            )
    return found


def document_paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the values of a JSON document are."""
    found = [path]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += document_paths(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            found += document_paths(inner, (*path, index))
    return found


def with_value(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of a document in which one value is another; ``...`` takes it out."""
    changed = json.loads(json.dumps(document))
    if not path:
        return value
    place = changed
    for step in path[:-1]:
        place = place[step]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return changed


def contents(location: str | Path) -> dict[str, bytes]:
    """Every file of a cache by its key, but locks."""
    storage = open_storage(location)
    return {k: storage.read(k) for k in storage.sizes("") if not k.endswith(".lock")}


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative path, locks among them."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
