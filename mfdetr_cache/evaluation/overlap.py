"""Images that are in two caches, under one name or another."""

from collections import defaultdict

import numpy as np

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.errors import MfdetrError
from mfdetr_cache.reporter import Reporter

# So many images that may be in both caches are looked at. Where one is, the detector's boxes
# differ in the last bits, and in the order of queries that are nearly equal.
_LOOKED_AT, _SAME_BOXES, _MOSTLY = 64, 1e-4, 0.9


def tell_images_in_both(cache: FeatureCache, learned: FeatureCache, reporter: Reporter) -> None:
    """Warn of images of a cache that a head learns from in another one.

    They have one name, or files of one size, and the detector found the same in them.
    """
    try:
        pairs = _alike(cache, learned)
        same = dict(pair for pair in pairs[:_LOOKED_AT] if _is_same(cache, learned, *pair))
    except MfdetrError:
        return  # damaged or unfinished: nothing can be told of it
    if same:
        least = "at least " if len(pairs) > _LOOKED_AT else ""
        row, other = next(iter(same.items()))
        name, there = cache.file_name(row), learned.file_name(other)
        renamed = "" if name == there else f" ({there} there)"
        reporter.warn(
            f"{least}{len(same)} of {len(cache)} images of {cache.path} are also in "
            f"{learned.path}, which the head learned from, such as {name}{renamed}: this is no "
            "validation of these"
        )


def _alike(cache: FeatureCache, learned: FeatureCache) -> list[tuple[int, int]]:
    """Rows of both of the same size in pixels, and of one name or size in bytes."""
    by_name = {learned.file_name(row): row for row in learned.rows}
    by_bytes: dict[int, set[int]] = defaultdict(set)
    for row, size in learned.sizes_of_images:
        by_bytes[size].add(row)
    sizes = dict(cache.sizes_of_images)
    named = [(row, by_name[n]) for row in cache.rows if (n := cache.file_name(row)) in by_name]
    sized = [(row, o) for row in cache.rows for o in by_bytes.get(sizes.get(row, 0), ())]
    theirs = frozenset(learned.rows)
    return [
        (row, other)
        for row, other in dict.fromkeys(named + sized)
        if other in theirs and cache.original_hw(row) == learned.original_hw(other)
    ]


def _is_same(cache: FeatureCache, learned: FeatureCache, row: int, other: int) -> bool:
    ours, earlier = (c.read(r, ()).boxes_cxcywh_norm for c, r in ((cache, row), (learned, other)))
    if ours.shape != earlier.shape:
        return False
    close = np.isclose(ours, earlier, rtol=0, atol=_SAME_BOXES)
    return bool(close.sum() > _MOSTLY * close.size)
