"""Cache finish: whether a cache that several processes fill is whole."""

from collections import defaultdict
from dataclasses import dataclass

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.storage.open import Location
from mfdetr_cache.evaluation.cached_boxes import judged_box_metrics
from mfdetr_cache.evaluation.coco_metrics import CocoMetrics
from mfdetr_cache.reporter import Reporter


@dataclass(frozen=True, slots=True)
class FinishSummary:
    """What was found.

    Attributes:
        parts: How many parts the cache has.
        parts_missing: How many are missing.
        missing: The missing ones, one line per view.
        box: Box AP of what is cached, once nothing is missing.
    """

    parts: int
    parts_missing: int
    missing: tuple[str, ...]
    box: CocoMetrics | None


def run_finish(location: Location, reporter: Reporter) -> FinishSummary:
    """Look for missing parts; measure the cached boxes when there are none.

    Args:
        location: The cache.
        reporter: Who is warned when the boxes are implausibly bad.

    Returns:
        What was found.

    Raises:
        CacheError: If there is no cache.
    """
    cache = FeatureCache.open(location)
    numbers: dict[str, list[int]] = defaultdict(list)
    for part in cache.missing_parts:
        numbers[part.view].append(part.number)
    missing = tuple(f"view {view}: parts {_ranges(found)}" for view, found in numbers.items())
    box = None if missing else judged_box_metrics(cache, reporter)
    return FinishSummary(len(cache.layout.parts), len(cache.missing_parts), missing, box)


def _ranges(numbers: list[int]) -> str:
    """Numbers in rising order as people write them: 0-2, 5."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
