"""Extraction of the caches that rows ask for, each like a given one but for the row's settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.coco.options import LabelOptions
from mfdetr_cache.errors import ConfigError, MfdetrError, StoppedError
from mfdetr_cache.reporter import Reporter
from mfdetr_pipelines.ablation.caches import Choices, MissingCache, RowCaches, find_caches
from mfdetr_pipelines.config.ablate import AblateConfig
from mfdetr_pipelines.config.extract import ExtractConfig
from mfdetr_pipelines.extract import run_extract


def open_caches(config: AblateConfig, reporter: Reporter) -> RowCaches:
    """The caches of every row; with ``--extract``, those that are missing are extracted first.

    A row that cannot have its caches has a problem. StoppedError if a signal ended it; otherwise
    raises as :func:`~mfdetr_pipelines.ablation.caches.find_caches`.
    """
    found = find_caches(config)
    if config.extraction.extract and found.missing:
        problems = _extract(config, found, reporter)
        found = find_caches(config)
        found.problems.update(problems)
    for name, missing in found.missing.items():
        lacks = "; ".join(cache.text for cache in missing)
        found.problems.setdefault(
            name, f"no given cache is as it asks; --extract would make {lacks}"
        )
    return found


def wanted_caches(found: RowCaches) -> dict[Path, MissingCache]:
    """What is missing, each once."""
    return {cache.path: cache for missing in found.missing.values() for cache in missing}


def _extract(config: AblateConfig, found: RowCaches, reporter: Reporter) -> dict[str, str]:
    """Extract what is missing; the problems of rows, by name."""
    wanted = wanted_caches(found)
    total = sum(cache.num_bytes for cache in wanted.values())
    extractions = [
        like(config, c.like, c.path, is_training=c.is_training, settings=c.settings)
        for c in wanted.values()
    ]
    reporter.say(f"{len(wanted)} caches to extract, about {total / 1e9:.2f} GB together:")
    for cache in wanted.values():
        reporter.say(cache.text)
    failed: dict[Path, str] = {}
    for path, extraction in zip(wanted, extractions, strict=True):
        try:
            run_extract(extraction, reporter)
        except StoppedError:
            raise
        except MfdetrError as error:
            failed[path] = str(error)
    return {
        name: failed[cache.path]
        for name, missing in found.missing.items()
        for cache in reversed(missing)
        if cache.path in failed
    }


def like(
    config: AblateConfig,
    cache: FeatureCache,
    path: Path,
    *,
    is_training: bool,
    settings: Mapping[str, Any] | None = None,
) -> ExtractConfig:
    """The extraction of a cache once more, to ``path``, with a row's settings.

    ConfigError if the detector's weights, the images or the annotations are not given.
    """
    chosen, given = Choices.of(cache).changed(settings or {}), config.extraction
    images = given.train_images if is_training else config.images
    annotations = given.train_annotations if is_training else given.val_annotations
    if given.weights is None or images is None or annotations is None:
        names = "--train-images and --train-annotations"
        if not is_training:
            names = "--images and --val-annotations"
        raise ConfigError(f"{path} takes --weights, {names}: those of {cache.path}")
    # What cannot be used was left out when the other was made.
    return ExtractConfig(
        weights=given.weights,
        cache=path,
        images=images,
        annotations=annotations,
        on_bad_annotation="skip",
        detector=cache.spec.detector,
        limit=cache.layout.num_rows,
        on_bad_image="skip" if cache.skipped else "stop",
        options=chosen.options,
        labels=LabelOptions.of(cache.annotations.source),
        maps=chosen.maps,
        views=chosen.views,
        device=config.device,
    )
