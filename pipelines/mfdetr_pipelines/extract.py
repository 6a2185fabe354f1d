"""Extract: every image through the frozen detector once, into a cache."""

from dataclasses import dataclass, field

from mfdetr_cache.coco.annotations import load_to_extract, require_images
from mfdetr_cache.coco.categories import MatchedCategory
from mfdetr_cache.evaluation.coco_metrics import CocoMetrics
from mfdetr_cache.reporter import Reporter
from mfdetr_pipelines.config.extract import ExtractConfig


@dataclass(frozen=True, slots=True)
class ExtractSummary:
    """What an extraction did.

    Attributes:
        num_extracted: Images this run put there; the rest was there before.
        skipped: Row, image id and reason of what was left out.
        raw_bytes: Bytes of the same values uncompressed.
        seconds: Time of this run, without the final check.
        detector_seconds: Time in the detector's forward, of all processes.
        box: Box AP of what is cached; None while other processes still fill the cache.
        left_out: How many images and annotations cannot be used and were left out.
    """

    cache_id: str
    num_images: int
    num_extracted: int
    skipped: tuple[dict[str, object], ...]
    stored_bytes: int
    raw_bytes: int
    seconds: float
    detector_seconds: float
    box: CocoMetrics | None
    parts_missing: int = 0
    categories: tuple[MatchedCategory, ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)


def run_extract(config: ExtractConfig, reporter: Reporter) -> ExtractSummary:
    """Fill a cache, or finish one that was begun.

    DatasetError if images or annotations cannot be used, DetectorError if the detector cannot
    be loaded, CacheError if the cache cannot be written or is of something else.
    """
    reporter.say(f"reading {config.files.annotations}")
    split = load_to_extract(config.files, config.on_bad_annotation, config.limit)
    split.tell_faults(reporter)
    split.tell_missing_masks(reporter)
    if config.on_bad_image == "stop":
        advice = "check --images, or leave them out with --on-bad-image skip"
        require_images(config.files.images, split, advice)
    # Imported late: it takes seconds to import torch and transformers, and a mistake in the dataset
    # is told without them.
    from mfdetr_pipelines.filling import run_filling

    return run_filling(config, split, reporter)
