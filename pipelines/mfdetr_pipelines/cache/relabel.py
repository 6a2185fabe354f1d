"""Cache relabel: new annotations beside the features, without another extraction."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from mfdetr_cache.cache.annotations import (
    AnnotationContent,
    read_annotations,
    version_numbers,
    write_annotations,
)
from mfdetr_cache.cache.locks import locked
from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.relabel import relabelled
from mfdetr_cache.coco.annotations import load_coco_split
from mfdetr_cache.coco.labelled import label_split
from mfdetr_cache.errors import CacheError
from mfdetr_cache.extraction.again import detector_of_cache, extract_again
from mfdetr_cache.matching.crops import c1_crops
from mfdetr_cache.matching.matchers import hungarian_queries
from mfdetr_cache.ops.devices import torch_device
from mfdetr_cache.reporter import Reporter
from mfdetr_cache.types import C1Crops
from mfdetr_pipelines.config.cache import RelabelConfig


@dataclass(frozen=True, slots=True)
class RelabelSummary:
    """What was put beside the features; ``CACHE@version`` chooses it.

    ``is_new`` is false where the newest version is the same. ``unlisted`` images of the cache
    are not in the file and have no objects; ``unused`` images of the file are not in the cache;
    ``images_extracted`` went through the detector, for crops of C1.
    """

    version: int
    annotations_id: str
    is_new: bool
    images: int
    objects: int
    unlisted: int
    unused: int
    images_extracted: int
    num_bytes: int
    seconds: float


def run_relabel(config: RelabelConfig, reporter: Reporter) -> RelabelSummary:
    """Put a new version of the annotations beside the features; earlier versions stay.

    CacheError if the cache is not whole, another process writes it, or crops are missing;
    DatasetError if the annotations are not of its images.
    """
    started = time.perf_counter()
    cache = FeatureCache.open(config.cache)
    cache.require_complete()
    split = load_coco_split(
        config.annotations,
        config.detector.images,
        on_bad=config.on_bad_annotation,
        needs="nothing",
    )
    split.tell_faults(reporter)
    split.tell_missing_masks(reporter)
    labelled = label_split(split, cache.root.spec, config.labels)
    for warning in labelled.match.warnings:
        reporter.warn(warning)
    if cache.layout.c1_roi is not None and config.labels.class_agnostic != cache.is_class_agnostic:
        raise CacheError(
            f"{cache.path} holds C1 as crops around the queries of other labels: extract it again "
            "to change --class-agnostic"
        )
    content, images = relabelled(cache, labelled)
    unlisted = cache.layout.num_rows - images
    with locked(cache.storage):
        newest = version_numbers(cache.storage)[-1]
        record = read_annotations(cache.storage, cache.root, newest)
        is_new = not record.is_of(content)
        if is_new:
            newest += 1
            missing = _rows_without_crops(cache, content)
            content = replace(content, crops=_extracted(cache, content, missing, config, reporter))
            write_annotations(cache.storage, cache.root, newest, content)
            record = read_annotations(cache.storage, cache.root, newest)
    if unlisted:
        reporter.warn(
            f"{unlisted} of {cache.layout.num_rows} images of the cache are not in "
            f"{config.annotations}: they have no objects in this version"
        )
    return RelabelSummary(
        version=newest,
        annotations_id=record.annotations_id,
        is_new=is_new,
        images=images,
        objects=sum(map(len, content.objects[cache.base.name])),
        unlisted=unlisted,
        unused=len(split.images) - images,
        images_extracted=len({row for rows in content.crops.values() for row in rows}),
        num_bytes=sum(f.num_bytes for f in record.columns.files.values()) if is_new else 0,
        seconds=time.perf_counter() - started,
    )


def _rows_without_crops(cache: FeatureCache, content: AnnotationContent) -> Mapping[str, list[int]]:
    """Rows of each view that lack the crop of a query which the new annotations match."""
    if cache.layout.c1_roi is None:
        return {}
    missing: dict[str, list[int]] = {}
    for name, view in cache.views.items():
        for row in view.rows:
            image = view.read(row, ())
            queries = hungarian_queries(
                torch.from_numpy(image.class_logits),
                torch.from_numpy(image.boxes_cxcywh_norm),
                content.objects[name][row],
                image.geometry.original_hw,
            )
            if not np.isin(queries, view.crop_queries(row)).all():
                missing.setdefault(name, []).append(row)
    return missing


def _extracted(
    cache: FeatureCache,
    content: AnnotationContent,
    missing: Mapping[str, list[int]],
    config: RelabelConfig,
    reporter: Reporter,
) -> dict[str, dict[int, C1Crops]]:
    count = sum(map(len, missing.values()))
    if not count:
        return {}
    weights, images = config.detector.weights, config.detector.images
    if weights is None or images is None:
        raise CacheError(
            f"{cache.path} holds C1 as crops, and those of {count} images (all views counted) lack "
            "a query that the new annotations match; give --weights and --images, and the detector "
            "runs on these alone"
        )
    device = torch_device(config.device)
    detector = detector_of_cache(cache, weights, device)
    reporter.start("extract crops", count, "images")
    assert cache.layout.c1_roi is not None
    crops_of: dict[str, dict[int, C1Crops]] = {}
    for view, rows in missing.items():
        for row, output in extract_again(cache, detector, view, rows, images, device):
            geometry = cache.views[view].geometry(row)
            truth = content.objects[view][row]
            crops = c1_crops(output, truth, geometry, cache.layout.c1_roi)
            crops_of.setdefault(view, {})[row] = crops
            reporter.advance()
    reporter.finish()
    return crops_of
