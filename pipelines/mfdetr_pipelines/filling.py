"""Filling a cache: the detector, the passes over the images, the check at the end."""

import functools
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

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
from mfdetr_cache.extraction.stream import Extracted, Extraction, tell_changed_images
from mfdetr_cache.ops.cores import threads_beside_gpu
from mfdetr_cache.ops.devices import torch_device
from mfdetr_cache.reporter import Reporter, SilentReporter
from mfdetr_pipelines.config.extract import ExtractConfig
from mfdetr_pipelines.extract import ExtractSummary
from mfdetr_pipelines.process_engine import run_tasks


def run_filling(config: ExtractConfig, split: CocoSplit, reporter: Reporter) -> ExtractSummary:
    """Fill the cache of a split that was read, as :func:`~mfdetr_pipelines.extract.run_extract`."""
    detector, labelled, content = _planned(config, split)
    for warning in labelled.match.warnings:
        reporter.warn(warning)
    partition = config.work.part or WHOLE
    _announce(config, content, partition, reporter)
    started = time.perf_counter()
    with CacheWriter.open_or_create(config.cache, content, partition) as writer:
        pending = writer.pending_parts()
        num_pending = sum(len(writer.rows_of_part(part)) for part in pending)
        workers = min(_num_processes(config, num_pending), len(pending))
        if config.work.engine == "ray" or workers > 1:
            filled = _fill_in_tasks(config, writer, pending, workers, reporter)
        else:
            filled = _fill(config, detector, writer, pending, reporter)
        for what, count in filled.oddities.items():
            reporter.warn(f"{count} {what}")
    seconds = time.perf_counter() - started
    cache = FeatureCache.open(config.cache)
    box = None
    if partition == WHOLE:
        cache.require_complete()
    if cache.is_complete:
        judge_orientations(cache, filled.untold, reporter)
        box = judged_box_metrics(cache, reporter)
    return ExtractSummary(
        cache_id=cache.cache_id,
        num_images=len(cache),
        num_extracted=filled.num_images,
        skipped=cache.skipped,
        stored_bytes=cache.stored_bytes,
        raw_bytes=cache.raw_bytes,
        seconds=seconds,
        detector_seconds=filled.detector_seconds,
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


def _fill(
    config: ExtractConfig,
    detector: Detector,
    writer: CacheWriter,
    parts: Sequence[Part],
    reporter: Reporter,
) -> Extracted:
    device, skip_bad = torch_device(config.device), config.on_bad_image == "skip"
    images = config.files.images
    worker = Extraction(images, detector, device, writer, reporter, skip_bad=skip_bad)
    return worker.run(parts)


# A process takes some twenty seconds to start, in which one alone does thousands of small images;
# with its activations it takes some gigabytes of the GPU.
_WORTH_A_PROCESS = 2500
_MOST_PROCESSES = 6
_GPU_BYTES, _HOST_BYTES = 6 * 2**30, 2 * 2**30
_PARTS_OF_A_TASK = 4


def _num_processes(config: ExtractConfig, num_pending: int) -> int:
    """Processes on this machine: as many as were asked for, or as a GPU has work for."""
    device = torch_device(config.device)
    if config.work.workers or config.work.engine == "ray" or device.type != "cuda":
        return max(1, config.work.workers)
    # Each holds the annotations: 8 bytes for one of the file were measured, 12 with three views.
    each = _HOST_BYTES + (8 + 2 * config.views.count) * config.files.annotations.stat().st_size
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    most = min(threads_beside_gpu(_MOST_PROCESSES), num_pending // _WORTH_A_PROCESS, half // each)
    if most <= 1:
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(most, free // _GPU_BYTES))


def _fill_in_tasks(
    config: ExtractConfig,
    writer: CacheWriter,
    pending: Sequence[Part],
    workers: int,
    reporter: Reporter,
) -> Extracted:
    """Fill parts on a cluster, or in several processes here."""
    tell_changed_images(writer, config.files.images, reporter)
    sizes = {part: len(writer.rows_of_part(part)) for part in pending}
    total = writer.num_rows
    most = 1
    if config.work.engine == "local":
        reporter.say(f"in {workers} processes")
        # Several parts, so that one is computed while the one before is written to disk.
        most = max(1, min(_PARTS_OF_A_TASK, len(pending) // (4 * workers)))
    tasks = [tuple(pending[i : i + most]) for i in range(0, len(pending), most)]
    fill = functools.partial(_fill_parts, config)
    reporter.start("extract", total, "images", done=total - sum(sizes.values()))
    filled = Extracted()
    for parts, found in run_tasks(fill, tasks, config.work, workers):
        for what, warning in found.told.items():
            if what not in filled.told:
                reporter.warn(warning)
        filled.add(found)
        reporter.advance(sum(sizes[part] for part in parts), num_bytes=found.num_bytes)
    reporter.finish()
    return filled


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


def _fill_parts(config: ExtractConfig, parts: Sequence[Part]) -> Extracted:
    """Fill some parts, in a process of its own; what it warns of is told when they are done."""
    detector, content = _prepared(config)
    writer = CacheWriter(open_storage(config.cache), content)
    return _fill(config, detector, writer, parts, SilentReporter())


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
