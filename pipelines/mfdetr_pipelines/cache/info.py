"""Cache info: a description of a cache from its metadata and manifests alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mfdetr_cache.cache.annotations import version_numbers
from mfdetr_cache.cache.certificate import Certificate, read_certificates
from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.schema import FORMAT_VERSION, stored_maps
from mfdetr_cache.cache.storage.open import Location


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """One array of a cache: shape of one image, bytes in all sealed parts and their share."""

    name: str
    shape: str
    dtype: str
    stored_bytes: int
    share: float
    source: str


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """Description of a cache.

    Attributes:
        dataset: Name of the annotation file.
        annotations_id: Identity of the labels, stored in heads too.
        rows: Images of the split.
        images: Images with features.
        objects: Annotated objects of these.
        skipped: Images left out, with the reason.
        ratio: Uncompressed bytes over stored bytes.
        certificates: Measured cost of its preset in mask AP.
    """

    cache_id: str
    format_version: int
    preset: str
    compression: str
    views: tuple[str, ...]
    detector: str
    weights_sha256: str
    dataset: str
    annotations_sha256: str
    annotations_id: str
    annotations_version: int
    annotations_versions: tuple[int, ...]
    rows: int
    images: int
    objects: int
    skipped: tuple[dict[str, Any], ...]
    complete: bool
    parts: int
    parts_missing: int
    stored_bytes: int
    bytes_per_image: float
    ratio: float
    arrays: tuple[ArrayInfo, ...]
    identity: dict[str, Any]
    certificates: tuple[Certificate, ...]


def describe_cache(path: Location) -> CacheInfo:
    """Describe a cache, complete or not; CacheError if there is none or it cannot be read."""
    cache = FeatureCache.open(path)
    stored = cache.stored_bytes
    sizes = cache.stored_bytes_of_arrays()
    arrays = tuple(
        ArrayInfo(name, shape, spec.dtype, sizes[name], sizes[name] / max(stored, 1), source)
        for name, shape, source in _shown_arrays(cache)
        if (spec := cache.base.arrays.get(name))
    )
    return CacheInfo(
        cache_id=cache.cache_id,
        format_version=FORMAT_VERSION,
        preset=cache.layout.preset,
        compression=cache.layout.compression,
        views=cache.layout.views,
        detector=cache.spec.name,
        weights_sha256=cache.spec.weights_sha256,
        dataset=str(cache.annotations.source["name"]),
        annotations_sha256=str(cache.annotations.source["sha256"]),
        annotations_id=cache.annotations.annotations_id,
        annotations_version=cache.annotations.number,
        annotations_versions=version_numbers(cache.storage),
        rows=cache.layout.num_rows,
        images=len(cache),
        objects=sum(len(cache.ground_truth(r)) for r in cache.rows),
        skipped=cache.skipped,
        complete=cache.is_complete,
        parts=len(cache.layout.parts),
        parts_missing=len(cache.missing_parts),
        stored_bytes=stored,
        bytes_per_image=stored / max(len(cache), 1),
        ratio=cache.raw_bytes / max(stored, 1),
        arrays=arrays,
        identity=cache.identity,
        certificates=read_certificates(cache.storage),
    )


def _shown_arrays(cache: FeatureCache) -> Iterator[tuple[str, str, str]]:
    """Name, values of one image and source of what an image is made of."""
    spec = cache.spec
    for name, width in (
        ("class_logits", spec.num_labels),
        ("boxes_cxcywh_norm", 4),
        ("queries", spec.query_dim),
    ):
        yield name, f"{spec.num_queries} x {width}", "decoder"
    for m in stored_maps(spec, cache.layout):
        yield f"maps/{m.name}/values", f"{m.channels} at 1/{m.stride}", m.source
        yield f"maps/{m.name}/affine", "low, step", m.source
