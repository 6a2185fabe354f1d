from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, get_args

from mfdetr_cache.choices import Evaluator, Extra, OnBad, Scoring, Which
from mfdetr_cache.coco.layouts import ANNOTATIONS
from mfdetr_cache.errors import ConfigError
from mfdetr_cache.options import FILE, FOLDER, Built, Option
from mfdetr_pipelines.config.shared import LiveDetector, LocalCache, OnDevice, OptionalCache


@dataclass(frozen=True, slots=True)
class ExtraOptions:
    """What is measured beside mask and box AP.

    Attributes:
        baselines: Measure the floor and the ceiling of these detections.
        boundary: Measure boundary AP.
        oracles: Show what AP would be if masks, scores, boxes, labels or the missing objects were
            perfect.
        confusion: Show which categories are taken for which others, and how many objects are
            missed.
    """

    baselines: Annotated[
        bool, Option(help="Leave out the floor and the ceiling of these detections.")
    ] = True
    boundary: Annotated[bool, Option(help="Leave out boundary AP.")] = True
    oracles: bool = False
    confusion: bool = False

    def build(self) -> frozenset[Extra]:
        """The chosen ones."""
        names: tuple[Extra, ...] = get_args(Extra)
        return frozenset(name for name in names if getattr(self, name))


class TimedDetector(LiveDetector):
    """The detector, timed beside the head, and its own masks where it gives any."""


@dataclass(frozen=True, slots=True)
class ResultsFile:
    """A results file in place of cache and head.

    Attributes:
        results: Measure this COCO results file, of any tool.
        annotations: COCO instances JSON, for --results.
        on_bad_annotation: What to do with an annotation or a result that cannot be used: stop, or
            leave it out.
    """

    results: Annotated[Path | None, FILE] = None
    annotations: Annotated[Path | None, ANNOTATIONS] = None
    on_bad_annotation: OnBad = "stop"


@dataclass(frozen=True, slots=True)
class EvaluateConfig(OnDevice):
    """Measure COCO mask AP of a head, with the detector's box AP and the bounds beside it.

    Example:
        mfdetr evaluate --cache val2017.zarr --head runs/fast --json fast.json

    Attributes:
        cache: Cache of the split to measure on.
        head: Run folder of train-head.
        which: Weights of the end of the training (last), or of its best validation.
        scoring: Class score times predicted IoU (iou, Eq. 13), times mean probability (mean,
            Eq. 2), or alone (class); auto is iou where the head predicts it, else mean.
        evaluator: Who computes AP; both give the same numbers.
        save_results: Write the masks as a COCO results file. A name that ends in .zip gives what
            COCO's evaluation server takes: detections_test-dev2017_NAME_results.zip.
        per_category: Show the AP of every category.
    """

    cache: OptionalCache = None
    head: Annotated[Path | None, FOLDER] = None
    which: Which = "last"
    scoring: Annotated[Scoring, Option("--score", metavar="RULE")] = "auto"
    evaluator: Evaluator = "fast"
    save_results: Annotated[Path | None, Option(metavar="FILE")] = None
    per_category: bool = False
    extras: Annotated[frozenset[Extra], Built(ExtraOptions)] = ExtraOptions().build()
    file: ResultsFile = field(default_factory=ResultsFile)
    live: TimedDetector = field(default_factory=TimedDetector)
    local_cache: LocalCache = field(default_factory=LocalCache)

    def __post_init__(self) -> None:
        results, annotations = self.file.results, self.file.annotations
        if results is not None and "oracles" in self.extras:
            raise ConfigError("--oracles needs --cache and --head: it runs the head again")
        if results is not None and self.save_results is not None:
            raise ConfigError("--save-results needs --cache and --head: it writes their masks")
        if (results is None) != (annotations is None) or (
            results is not None and (self.cache is not None or self.head is not None)
        ):
            raise ConfigError("--results FILE goes with --annotations FILE, and without --cache")
        if results is None and (self.cache is None or self.head is None):
            raise ConfigError("give --cache and --head, or --results and --annotations")
