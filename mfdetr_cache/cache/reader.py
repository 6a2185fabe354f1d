"""Reads a cache, from any number of threads, refusing what is damaged or unfinished."""

import copy
import functools
import itertools
from collections.abc import Iterator
from typing import Any

from mfdetr_cache.cache.annotations import Annotations, newest_version, read_annotations
from mfdetr_cache.cache.foundation import Foundation, Opened, read_opened
from mfdetr_cache.cache.manifest import Manifest, manifest_key, read_manifest, sizes_of_images
from mfdetr_cache.cache.schema import BASE_VIEW, Part
from mfdetr_cache.cache.storage.open import Location, open_storage
from mfdetr_cache.cache.storage.protocol import Storage
from mfdetr_cache.cache.view import CacheView
from mfdetr_cache.coco.class_agnostic import class_agnostic_spec
from mfdetr_cache.coco.options import CLASS_AGNOSTIC
from mfdetr_cache.coco.versions import picture_of
from mfdetr_cache.errors import MEND, CacheError
from mfdetr_cache.types import CachedImage, GroundTruth, ImageGeometry

# Missing parts that are looked at to say why they are missing: a store may take a while for each.
_LOOKED_AT = 100


class FeatureCache(Foundation):
    """A cache, open for reading. Iterating and indexing go over the stored images of ``base``.

    Attributes:
        annotations: Which version of the annotations is read, and what it is of.
        categories: ``{"id", "name"}`` of the dataset's categories.
        label_categories: Category id of each detector label, -1 for none.
        is_class_agnostic: Whether the detector's classes are read as one.
        views: The passes of the detector by name, ``base`` first.
    """

    def __init__(self, storage: Storage, opened: Opened, annotations: int) -> None:
        super().__init__(storage, opened)
        self.cache_id = opened.root.cache_id
        self.identity = opened.root.identity
        self.annotations = read_annotations(storage, opened.root, annotations)
        self.categories = self.annotations.categories
        self.label_categories = self.annotations.label_categories
        self.is_class_agnostic = bool(self.annotations.source.get(CLASS_AGNOSTIC, False))
        if self.is_class_agnostic:
            # The stored logits stay what they are; they are read as those of one label.
            self.spec = class_agnostic_spec(self.root.spec)
            one = self.spec.num_labels
            self.label_categories = (self.label_categories[0], -1)[:one]
        objects = Annotations(storage, self.root, self.annotations)
        self.views = {view: CacheView(self, view, objects) for view in self.layout.views}
        self._chosen: frozenset[int] | None = None

    @classmethod
    def open(cls, location: Location, annotations: int | None = None) -> "FeatureCache":
        """Open a cache for reading; parts may be missing, see :meth:`require_complete`.

        ``annotations`` is the version to read, as ``@N`` at the end of the location; None takes the
        newest. CacheError if there is no cache, this version does not read its format, or what is
        written when a cache is created is damaged.
        """
        storage = open_storage(location)
        opened = read_opened(storage)
        if opened.faults:
            raise CacheError(opened.faults[0])
        if annotations is None:
            annotations = storage.annotations
        if annotations is None:
            annotations = newest_version(storage)
        return cls(storage, opened, annotations)

    @property
    def is_complete(self) -> bool:
        """Whether every part is there."""
        return not self.missing_parts

    def require_complete(self) -> None:
        """Refuse to go on with a cache that is not whole; CacheError."""
        if not self.missing_parts:
            return
        missing = f"{len(self.missing_parts)} of {len(self.layout.parts)} parts are missing"
        advice = "run the same extract again"
        # A sealed part whose files are gone was there once.
        first = self.missing_parts[:_LOOKED_AT]
        if any(self.storage.size(manifest_key(part)) is not None for part in first):
            advice = f"files were lost: {MEND}, or {advice}"
        raise CacheError(f"{self.path} is not finished: {missing}; {advice}")

    def require_c1_map(self, purpose: str) -> None:
        """Refuse a cache that has C1 only around matched queries; the CacheError says for what."""
        if self.layout.c1 == "roi":
            raise CacheError(
                f"{self.path} was extracted with --c1 roi: it holds C1 around matched queries only "
                f"and cannot serve {purpose}; extract this split with --c1 full"
            )

    @property
    def base(self) -> CacheView:
        """The plain test-time view."""
        return self.views[BASE_VIEW]

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows with content, in order; skipped images are not among them."""
        if self._chosen is None:
            return self.base.rows
        return tuple(row for row in self.base.rows if row in self._chosen)

    def split(self, every: int) -> tuple["FeatureCache", "FeatureCache"]:
        """Two caches over the same files: all images but every N-th, to learn from, and these.

        Versions of one picture stay together. CacheError if there are too few for one in each.
        """
        pictures: dict[str, list[int]] = {}
        for row in self.rows:
            pictures.setdefault(picture_of(self.file_name(row)), []).append(row)
        if not 2 <= every <= len(pictures):
            raise CacheError(
                f"{self.path} has {len(pictures)} images: it cannot keep every {every}th for "
                "measuring"
            )
        chosen = frozenset(itertools.chain(*list(pictures.values())[every - 1 :: every]))
        halves = copy.copy(self), copy.copy(self)
        halves[0]._chosen = frozenset(self.rows) - chosen
        halves[1]._chosen = chosen
        return halves

    @functools.cached_property
    def _manifests(self) -> dict[Part, Manifest]:
        manifests = {p: read_manifest(self.storage, self.root, p) for p in self.layout.parts}
        return {p: m for p, m in manifests.items() if m is not None}

    @property
    def sizes_of_images(self) -> list[tuple[int, int]]:
        """Rows with the size in bytes of their image file when it was read, where it is known."""
        return sizes_of_images(self.root, self._manifests)

    @property
    def skipped(self) -> tuple[dict[str, Any], ...]:
        """Row, image id and reason of every image that was left out."""
        return tuple(
            s for p, m in self._manifests.items() if p.view == BASE_VIEW for s in m.skipped
        )

    @property
    def stored_bytes(self) -> int:
        """Bytes of all sealed parts."""
        return sum(f.num_bytes for m in self._manifests.values() for f in m.files.values())

    @property
    def raw_bytes(self) -> int:
        """Bytes of maps and queries as float16 and detections as float32, over all views."""
        spec = self.spec
        decoder_bytes = spec.num_queries * (2 * spec.query_dim + 4 * (spec.num_labels + 4))
        return sum(
            view.map_bytes(r) + decoder_bytes for view in self.views.values() for r in view.rows
        )

    def stored_bytes_of_arrays(self) -> dict[str, int]:
        """Bytes of all sealed parts of every array, over all views, by its name below the view."""
        totals = dict.fromkeys(self.base.arrays, 0)
        for part, manifest in self._manifests.items():
            for name, spec in self.views[part.view].arrays.items():
                totals[name] += manifest.files[spec.key_of_part(part.number)].num_bytes
        return totals

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> CachedImage:
        return self.read(self.rows[index])

    def __iter__(self) -> Iterator[CachedImage]:
        return (self.read(row) for row in self.rows)

    def geometry(self, row: int) -> ImageGeometry:
        """Sizes of a row's image in the view ``base``."""
        return self.base.geometry(row)

    def ground_truth(self, row: int) -> GroundTruth:
        """The annotated objects of a row in the view ``base``."""
        return self.base.ground_truth(row)

    def read(
        self,
        row: int,
        map_names: tuple[str, ...] | None = None,
        view: str = BASE_VIEW,
        *,
        pinned: bool = False,
    ) -> CachedImage:
        """Everything stored for a row in one view, with all maps or those named.

        ``pinned`` decompresses the maps into memory that a GPU copies from by itself. CacheError if
        the row has no content, or its bytes are damaged.
        """
        return self.views[view].read(row, map_names, pinned=pinned)

    def largest_maps(self, map_names: tuple[str, ...]) -> int:
        """Most bytes that :meth:`read` needs for the maps of an image."""
        return max(view.largest_maps(map_names) for view in self.views.values())
