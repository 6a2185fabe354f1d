"""Filling a cache: the detector, the passes over the images, the check at the end."""

import functools
import math
import shutil
import time
from dataclasses import replace

import numpy as np

from mfdetr_cache.cache.creation import CacheContent
from mfdetr_cache.cache.foundation import read_root
from mfdetr_cache.cache.partition import WHOLE, Partition
from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.schema import BASE_VIEW, Part
from mfdetr_cache.cache.storage.open import open_storage
from mfdetr_cache.cache.writer import CacheWriter, require_same_content
from mfdetr_cache.coco.annotations import CocoSplit, load_to_extract
from mfdetr_cache.coco.labelled import LabelledSplit, label_split
from mfdetr_cache.detectors.protocol import Detector
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.errors import CacheError
from mfdetr_cache.evaluation.cached_boxes import judge_orientations, judged_box_metrics
from mfdetr_cache.extraction.content import plan_cache
from mfdetr_cache.extraction.stream import Extraction, tell_changed_images
from mfdetr_cache.ops.devices import torch_device
from mfdetr_cache.reporter import Reporter, SilentReporter
from mfdetr_pipelines.config.extract import ExtractConfig
from mfdetr_pipelines.extract import ExtractSummary
from mfdetr_pipelines.ray_engine import on_cluster


def run_filling(config: ExtractConfig, split: CocoSplit, reporter: Reporter) -> ExtractSummary:
    """Fill the cache of a split that was read, as :func:`~mfdetr_pipelines.extract.run_extract`."""
    detector, labelled, content = _planned(config, split)
    for warning in labelled.match.warnings:
        reporter.warn(warning)
    partition = config.work.part or WHOLE
    _announce(config, content, partition, reporter)
    started = time.perf_counter()
    with CacheWriter.open_or_create(config.cache, content, partition) as writer:
        untold: dict[int, int] = {}
        if config.work.engine == "ray":
            extracted, detector_seconds = _fill_on_cluster(config, writer, reporter)
        else:
            worker = _worker(config, detector, writer, reporter)
            worker.run(writer.pending_parts())
            worker.tell_oddities()
            extracted, detector_seconds = worker.num_extracted, worker.detector_seconds
            untold = worker.untold
    seconds = time.perf_counter() - started
    cache = FeatureCache.open(config.cache)
    box = None
    if partition == WHOLE:
        cache.require_complete()
    if cache.is_complete:
        judge_orientations(cache, untold, reporter)
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
        categories=labelled.match.table,
        left_out={f"{faults.noun}s": faults.unusable for faults in split.faults},
    )


def _planned(
    config: ExtractConfig, split: CocoSplit
) -> tuple[Detector, LabelledSplit, CacheContent]:
    names = [category.name for category in split.categories]
    detector = load_detector(config.detector, config.weights, config.options, names)
    labelled = label_split(split, detector.spec, config.labels)
    return detector, labelled, plan_cache(labelled, detector, config.maps, config.views)


def _worker(
    config: ExtractConfig, detector: Detector, writer: CacheWriter, reporter: Reporter
) -> Extraction:
    device, skip_bad = torch_device(config.device), config.on_bad_image == "skip"
    return Extraction(config.files.images, detector, device, writer, reporter, skip_bad=skip_bad)


def _fill_on_cluster(
    config: ExtractConfig, writer: CacheWriter, reporter: Reporter
) -> tuple[int, float]:
    pending = writer.pending_parts()
    tell_changed_images(writer, config.files.images, reporter)
    sizes = {part: len(writer.rows_of_part(part)) for part in pending}
    total = writer.num_rows
    reporter.start("extract", total, "images", done=total - sum(sizes.values()))
    extracted, seconds = 0, 0.0
    fill = functools.partial(_fill_part, config)
    for part, (images, num_bytes, detector_seconds) in on_cluster(fill, pending, config.work):
        extracted += images
        seconds += detector_seconds
        reporter.advance(sizes[part], num_bytes=num_bytes)
    reporter.finish()
    return extracted, seconds


# What the last extraction of this worker process needs, by its settings; these have no hash.
_KEPT: dict[str, tuple[Detector, CacheContent]] = {}


def _prepared(config: ExtractConfig) -> tuple[Detector, CacheContent]:
    key = repr(config)
    if key not in _KEPT:
        _KEPT.clear()
        split = load_to_extract(config.files, config.on_bad_annotation, config.limit)
        detector, _, content = _planned(config, split)
        # The cache keeps the parts it was created with, whatever this version would choose.
        storage = open_storage(config.cache)
        root = read_root(storage)
        require_same_content(storage, root, content)
        _KEPT[key] = detector, replace(content, root=root)
    return _KEPT[key]


def _fill_part(config: ExtractConfig, part: Part) -> tuple[int, int, float]:
    """Fill one part, on a worker of a cluster; its images, bytes and seconds in the detector."""
    detector, content = _prepared(config)
    writer = CacheWriter(open_storage(config.cache), content)
    worker = _worker(config, detector, writer, SilentReporter())
    worker.run([part])
    return worker.num_extracted, worker.num_bytes, worker.detector_seconds


def _announce(
    config: ExtractConfig, content: CacheContent, partition: Partition, reporter: Reporter
) -> None:
    """Say what is coming and refuse a disk that cannot hold it."""
    needed = estimated_bytes(content)
    storage = open_storage(config.cache)
    layout = content.root.layout
    views = f" in {len(layout.views)} views" if len(layout.views) > 1 else ""
    line = (
        f"{len(content.images)} images of {content.labels.source['name']}{views} through "
        f"{content.root.spec.name} as {layout.preset}; at most {needed / 1e9:.2f} GB (before "
        "compression)"
    )
    if partition != WHOLE:
        line += f"; this is part {partition} of the work"
    if storage.folder is None:
        reporter.say(f"{line}, into {storage.name}")
        return
    folder = storage.folder.absolute()
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    ours = sum(storage.sizes("").values())
    reporter.say(f"{line}, {free / 1e9:.1f} GB free")
    if needed > free + ours and not config.force:
        raise CacheError(
            f"{storage.name} needs up to {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "choose another disk, use --limit, or pass --force"
        )


def estimated_bytes(content: CacheContent) -> int:
    """An upper bound of the bytes of a cache before compression: all images like the largest."""
    arrays = content.root.arrays[BASE_VIEW].values()
    each = sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in arrays)
    return each * len(content.root.layout.views)
