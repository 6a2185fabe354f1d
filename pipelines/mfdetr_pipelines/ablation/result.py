"""Results of the rows of an ablation, and their differences to the first row."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pycocotools.coco import COCO

from mfdetr_cache.evaluation.bootstrap import PairedDifference, WeightedAP, differences_to_first
from mfdetr_cache.evaluation.coco_metrics import CocoMetrics
from mfdetr_pipelines.ablation.job import Job
from mfdetr_pipelines.ablation.plan import plan_of
from mfdetr_pipelines.ablation.rows import AblationRow

# Draws of the paired bootstrap; the interval's ends move by a few hundredths of its width.
_BOOTSTRAP_SAMPLES = 400


@dataclass(frozen=True, slots=True)
class RowResult:
    """Result of a row.

    Attributes:
        train_seconds: Mean training time of a seed.
        boundary: Boundary AP, mean over the seeds, in [0, 1]; None without a result.
        box: Box AP of the detector, likewise.
        head_ms: Median time of the mask network per evaluated image, in milliseconds.
        problem: Why there is no result; empty if there is one.
        against_first: Difference of AP to the first row with a 95 % interval; None for the first.
        total_hours: Hours of its training, detector training and extraction; None if unknown.
    """

    row: AblationRow
    seeds: tuple[CocoMetrics, ...] = ()
    train_seconds: float = 0.0
    images_per_second: float = 0.0
    boundary: float | None = None
    box: float | None = None
    head_ms: float = 0.0
    problem: str = ""
    against_first: PairedDifference | None = None
    total_hours: float | None = None

    def mean(self, name: str = "AP") -> float | None:
        """Mean over the seeds of ``AP``, ``AP50`` and so on, in [0, 1]; None without a result."""
        values = [getattr(m, name) for m in self.seeds]
        return statistics.mean(values) if values else None

    def spread(self) -> float | None:
        """Standard deviation of AP over the seeds, in [0, 1]; None for fewer than two."""
        values = [m.AP for m in self.seeds]
        return statistics.stdev(values) if len(values) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """As plain values; metrics in [0, 1]."""
        metrics = {n: self.mean(n) for n in ("AP", "AP50", "AP75", "APS", "APM", "APL")}
        return {
            **plan_of(self.row),
            **metrics,
            "AP_spread": self.spread(),
            "boundary_AP": self.boundary,
            "box_AP": self.box,
            "seeds": [m.to_dict() for m in self.seeds],
            "train_seconds": self.train_seconds,
            "images_per_second": self.images_per_second,
            "head_ms": self.head_ms,
            "total_hours": self.total_hours,
            "problem": self.problem,
            "against_first": None if self.against_first is None else asdict(self.against_first),
        }


def collect(
    row: AblationRow, jobs: Sequence[Job], problem: str, detector_hours: float | None
) -> RowResult:
    """The result of a row over its jobs, which are done unless there is a problem.

    ``detector_hours`` is the time of detector training and extraction, if known. ``against_first``
    is filled in by :func:`compared_with_first`.
    """
    if problem:
        return RowResult(row, problem=problem)
    done = [result for job in jobs if (result := job.read_result()) is not None]

    def mean(name: str) -> float:
        return statistics.mean(float(result[name]) for result in done)

    def ap(kind: str) -> float | None:
        # Rows that were measured before there was a boundary AP keep their result.
        found = [result[kind]["AP"] for result in done if kind in result]
        return statistics.mean(found) if len(found) == len(done) else None

    seconds = mean("train_seconds")
    return RowResult(
        row,
        seeds=tuple(CocoMetrics(**result["mask"]) for result in done),
        train_seconds=seconds,
        images_per_second=mean("images_per_second"),
        boundary=ap("boundary"),
        box=ap("box"),
        head_ms=mean("head_ms"),
        total_hours=None if detector_hours is None else detector_hours + seconds / 3600,
    )


def compared_with_first(
    results: Sequence[RowResult], jobs: Sequence[Job], ground_truth: COCO
) -> tuple[RowResult, ...]:
    """The results with the difference of AP to the first row that has a result."""
    names = [r.row.name for r in results if r.seeds]
    if len(names) < 2:
        return tuple(results)
    aps = [
        [WeightedAP(ground_truth, j.read_masks()) for j in jobs if j.name == name] for name in names
    ]
    found = dict(zip(names[1:], differences_to_first(aps, _BOOTSTRAP_SAMPLES), strict=True))
    return tuple(replace(r, against_first=found.get(r.row.name)) for r in results)
