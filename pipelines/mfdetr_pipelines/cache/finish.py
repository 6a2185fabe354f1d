"""Cache finish: whether a cache that several processes fill is complete."""

from collections import defaultdict
from dataclasses import dataclass

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.storage.open import Location
from mfdetr_cache.evaluation.cached_boxes import judged_box_metrics
from mfdetr_cache.evaluation.coco_metrics import CocoMetrics
from mfdetr_cache.reporter import Reporter


@dataclass(frozen=True, slots=True)
class FinishSummary:
    """Parts of the cache; those that lack, one line per view, or the box AP of what is cached."""

    parts: int
    parts_missing: int
    missing: tuple[str, ...]
    box: CocoMetrics | None


def run_finish(location: Location, reporter: Reporter) -> FinishSummary:
    """Look for missing parts; if there is none, measure the cached boxes.

    Implausibly low box AP is a warning. CacheError if there is no cache.
    """
    cache = FeatureCache.open(location)
    numbers: dict[str, list[int]] = defaultdict(list)
    for part in cache.missing_parts:
        numbers[part.view].append(part.number)
    missing = tuple(f"view {view}: parts {_ranges(parts)}" for view, parts in numbers.items())
    box = None if missing else judged_box_metrics(cache, reporter)
    return FinishSummary(len(cache.layout.parts), len(cache.missing_parts), missing, box)


def _ranges(numbers: list[int]) -> str:
    """Increasing numbers as text: 0-2, 5."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
