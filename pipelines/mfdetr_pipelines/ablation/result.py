"""What came of the rows of an ablation, and how each differs from the first."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pycocotools.coco import COCO

from mfdetr_cache.evaluation.bootstrap import PairedDifference, WeightedAP, differences_to_first
from mfdetr_cache.evaluation.coco_metrics import CocoMetrics
from mfdetr_pipelines.ablation.job import Job
from mfdetr_pipelines.ablation.plan import RowPlan

# Draws of the paired bootstrap; the interval's ends move by a few hundredths of its width.
_BOOTSTRAP_SAMPLES = 400


@dataclass(frozen=True, slots=True)
class RowResult:
    """What came of a row.

    Attributes:
        plan: Its cost.
        seeds: Mask metrics of each seed that was trained.
        train_seconds: Mean training time of a seed.
        images_per_second: Mean training speed.
        head_ms: Median time of the mask network per evaluated image, in milliseconds.
        problem: Why it has no result; empty if it has.
        against_first: Its AP beside the first row's, with a 95 % interval; None for the first.
        total_hours: Hours of its training and of what had to come before; None if not known.
    """

    plan: RowPlan
    seeds: tuple[CocoMetrics, ...] = ()
    train_seconds: float = 0.0
    images_per_second: float = 0.0
    head_ms: float = 0.0
    problem: str = ""
    against_first: PairedDifference | None = None
    total_hours: float | None = None

    def mean(self, name: str = "AP") -> float | None:
        """Mean of a metric over the seeds.

        Args:
            name: ``AP``, ``AP50`` and so on.

        Returns:
            In [0, 1]; None without a result.
        """
        values = [getattr(m, name) for m in self.seeds]
        return statistics.mean(values) if values else None

    def spread(self, name: str = "AP") -> float | None:
        """Standard deviation of a metric over the seeds.

        Args:
            name: ``AP``, ``AP50`` and so on.

        Returns:
            In [0, 1]; None for fewer than two seeds.
        """
        values = [getattr(m, name) for m in self.seeds]
        return statistics.stdev(values) if len(values) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values; metrics in [0, 1]."""
        metrics = {n: self.mean(n) for n in ("AP", "AP50", "AP75", "APS", "APM", "APL")}
        return {
            **self.plan.to_dict(),
            **metrics,
            "AP_spread": self.spread(),
            "seeds": [m.to_dict() for m in self.seeds],
            "train_seconds": self.train_seconds,
            "images_per_second": self.images_per_second,
            "head_ms": self.head_ms,
            "total_hours": self.total_hours,
            "problem": self.problem,
            "against_first": None if self.against_first is None else asdict(self.against_first),
        }


def collect(
    plan: RowPlan, jobs: Sequence[Job], problem: str, detector_hours: float | None
) -> RowResult:
    """The result of a row over its seeds.

    Args:
        plan: The row.
        jobs: Its jobs, all done unless there is a problem.
        problem: Why it has no result; empty if it has.
        detector_hours: What training the detector and extracting took, if it is known.

    Returns:
        The result, not yet compared with the first row.
    """
    if problem:
        return RowResult(plan, problem=problem)
    done = [result for job in jobs if (result := job.read_result()) is not None]

    def mean(name: str) -> float:
        return statistics.mean(float(result[name]) for result in done)

    seconds = mean("train_seconds")
    return RowResult(
        plan,
        seeds=tuple(CocoMetrics(**result["mask"]) for result in done),
        train_seconds=seconds,
        images_per_second=mean("images_per_second"),
        head_ms=mean("head_ms"),
        total_hours=None if detector_hours is None else detector_hours + seconds / 3600,
    )


def compared_with_first(
    results: Sequence[RowResult], jobs: Sequence[Job], ground_truth: COCO
) -> tuple[RowResult, ...]:
    """Rows with the difference of their AP to the first row that has a result.

    Args:
        results: One result per row.
        jobs: The jobs of all rows.
        ground_truth: Annotations of the images that were measured on.

    Returns:
        The results in the same order.
    """
    names = [r.plan.row.name for r in results if r.seeds]
    if len(names) < 2:
        return tuple(results)
    aps = [
        [WeightedAP(ground_truth, j.read_masks(), "segm") for j in jobs if j.name == name]
        for name in names
    ]
    found = dict(zip(names[1:], differences_to_first(aps, _BOOTSTRAP_SAMPLES), strict=True))
    return tuple(replace(r, against_first=found.get(r.plan.row.name)) for r in results)
