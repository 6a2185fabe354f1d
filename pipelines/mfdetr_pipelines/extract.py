"""Extract: every image through the frozen detector once, into a cache."""

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mfdetr_cache.cache.creation import CacheContent
from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.schema import (
    BASE_VIEW,
    row_arrays,
)
from mfdetr_cache.cache.storage.open import open_storage
from mfdetr_cache.cache.writer import CacheWriter
from mfdetr_cache.coco.annotations import CocoSplit, load_coco_split
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.errors import (
    CacheError,
    DatasetError,
    ImageError,
)
from mfdetr_cache.evaluation.coco_metrics import CocoMetrics, coco_ground_truth, evaluate_results
from mfdetr_cache.evaluation.detections import detections_of
from mfdetr_cache.evaluation.results import box_results
from mfdetr_cache.extraction.config import ExtractConfig
from mfdetr_cache.extraction.content import plan_cache
from mfdetr_cache.extraction.stream import Extraction
from mfdetr_cache.reporter import Reporter
from mfdetr_pipelines.ray_engine import fill_parts

# A COCO-trained DETR has a box AP of 30 or more; a wrongly assembled one was seen at 3.5. A fresh
# dataset's hard categories may pull a right one down, so this warns and does not stop.
IMPLAUSIBLE_BOX_AP = 0.10


@dataclass(frozen=True, slots=True)
class ExtractSummary:
    """What an extraction did.

    Attributes:
        cache_id: Hash of the cache's identity.
        num_images: Images in the cache.
        num_extracted: Images this run put there; the rest was there before.
        skipped: Row, image id and reason of what was left out.
        stored_bytes: Bytes of the cache.
        raw_bytes: Bytes of the same values uncompressed.
        seconds: Time of this run, without the final check.
        detector_seconds: Part of it spent in the detector's forward.
        box: Box AP of what is cached; None while other processes still fill the cache.
        parts_missing: Parts that other processes have not filled yet.
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


def run_extract(config: ExtractConfig, reporter: Reporter) -> ExtractSummary:
    """Fill a cache, or finish one that was begun.

    Args:
        config: What to do.
        reporter: Who is told about progress.

    Returns:
        What was done, and the box AP of the cached detections.

    Raises:
        DatasetError: If images or annotations cannot be used.
        DetectorError: If the detector cannot be loaded.
        CacheError: If the cache cannot be written or is of something else.
    """
    if not config.images.is_dir():
        raise DatasetError(f"image folder {config.images} does not exist; check --images")
    if config.limit is not None and config.limit < 1:
        raise DatasetError(f"--limit {config.limit}: give 1 or more images")
    if config.roi_size < 8 or config.roi_size % 8 or config.roi_sampling_ratio < 0:
        raise DatasetError("--roi-size must be a multiple of 8, --roi-sampling-ratio 0 or more")
    if config.views < 0:
        raise DatasetError(f"--views {config.views}: give 0 or more augmented views")
    split = load_coco_split(config.annotations).first(config.limit)
    if config.on_bad_image == "stop":
        advice = "check --images, or leave them out with --on-bad-image skip"
        require_images(config.images, split, advice)
    # Features must not depend on a GPU's shortcuts; convolutions use TF32 unless told not to.
    torch.backends.cudnn.allow_tf32 = False
    detector = load_detector(config.detector, config.weights, config.options)
    content = plan_cache(split, detector, config)
    _announce(config, content, reporter)
    started = time.perf_counter()
    with CacheWriter.open_or_create(config.cache, content, config.partition) as writer:
        if config.engine == "ray":
            extracted, detector_seconds = _fill_on_cluster(config, writer, reporter)
        else:
            worker = Extraction(config, split, content, detector, writer, reporter)
            worker.run(writer.pending_parts())
            extracted, detector_seconds = worker.num_extracted, worker.detector_seconds
    seconds = time.perf_counter() - started
    cache = FeatureCache.open(config.cache)
    box = None
    if config.partition.count == 1:
        cache.require_complete()
    if cache.is_complete:
        box = judged_box_metrics(cache, reporter)
    return ExtractSummary(
        cache_id=cache.cache_id,
        num_images=len(cache),
        num_extracted=extracted,
        skipped=cache.skipped,
        stored_bytes=cache.stored_bytes,
        raw_bytes=cache.raw_bytes,
        seconds=seconds,
        detector_seconds=detector_seconds,
        box=box,
        parts_missing=len(cache.missing_parts),
    )


def _fill_on_cluster(
    config: ExtractConfig, writer: CacheWriter, reporter: Reporter
) -> tuple[int, float]:
    """Every pending part as a task; images extracted and seconds in the detector."""
    pending = writer.pending_parts()
    sizes = {part: len(writer.rows_of_part(part)) for part in pending}
    total = writer.num_rows
    reporter.start("extract", total, "images", done=total - sum(sizes.values()))
    extracted, seconds = 0, 0.0
    for part, done in fill_parts(config, pending, config.cluster):
        extracted += done.images
        seconds += done.detector_seconds
        reporter.advance(sizes[part], num_bytes=done.num_bytes)
    reporter.finish()
    return extracted, seconds


def cached_box_metrics(cache: FeatureCache) -> CocoMetrics:
    """Box AP of the detections in a cache.

    Args:
        cache: A complete cache.

    Returns:
        COCO's summary for boxes.
    """
    results = []
    for row in cache.rows:
        image = cache.read(row, map_names=())
        detections = detections_of(image, cache.spec)
        results += box_results(image.image_id, detections, cache.label_categories)
    truth = (
        (cache.image_id(r), cache.geometry(r).original_hw, cache.ground_truth(r))
        for r in cache.rows
    )
    return evaluate_results(coco_ground_truth(truth, cache.categories), results, "bbox")


def require_images(images: Path, split: CocoSplit, advice: str) -> None:
    """Refuse at once what would otherwise be noticed after hours.

    Args:
        images: Image folder.
        split: What should be in it.
        advice: What to do, for the message.

    Raises:
        DatasetError: If there is no such folder.
        ImageError: If an image is missing.
    """
    if not images.is_dir():
        raise DatasetError(f"image folder {images} does not exist; {advice}")
    missing = [e for e in split.images if not (images / e.file_name).is_file()]
    if missing:
        raise ImageError(
            f"{len(missing)} of {len(split.images)} images are not in {images}, the first is "
            f"{missing[0].file_name}; {advice}"
        )


def _announce(config: ExtractConfig, content: CacheContent, reporter: Reporter) -> None:
    """Say what is coming and refuse a disk that cannot hold it."""
    needed = estimated_bytes(content)
    storage = open_storage(config.cache)
    views = f" in {len(content.views)} views" if len(content.views) > 1 else ""
    line = (
        f"{len(content.image_ids)} images of {content.identity['dataset']['name']}{views} through "
        f"{content.spec.name} as {content.layout.preset}; at most {needed / 1e9:.2f} GB (before "
        "compression)"
    )
    if config.partition.count > 1:
        line += f"; this is part {config.partition} of the work"
    if storage.folder is None:
        reporter.say(f"{line}, into {storage.name}")
        return
    folder = storage.folder.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    ours = sum(storage.sizes("").values())
    reporter.say(f"{line}, {free / 1e9:.1f} GB free")
    if needed > free + ours and not config.force:
        raise CacheError(
            f"{storage.name} needs up to {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "choose another disk, use --limit, or pass --force"
        )


def estimated_bytes(content: CacheContent) -> int:
    """An upper bound of the bytes of a cache, before compression.

    Args:
        content: What the cache will be of.

    Returns:
        Bytes of all parts, every image as large as the largest.
    """
    arrays = row_arrays(content.spec, content.layout, BASE_VIEW).values()
    each = sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in arrays)
    return each * len(content.views)


def judged_box_metrics(cache: FeatureCache, reporter: Reporter) -> CocoMetrics:
    """Box AP of a cache, with a warning where it is too low to be true.

    Args:
        cache: A complete cache.
        reporter: Who is warned.

    Returns:
        COCO's summary for boxes.
    """
    box = cached_box_metrics(cache)
    objects = sum(len(cache.ground_truth(r)) for r in cache.rows)
    if box.AP < IMPLAUSIBLE_BOX_AP and objects:
        reporter.warn(
            f"box AP of the cached detections is {100 * box.AP:.1f}: implausibly low for a "
            "trained detector. Wrong weights, wrong preprocessing or another dataset are likely; "
            "a mask network cannot be better than its boxes"
        )
    return box
