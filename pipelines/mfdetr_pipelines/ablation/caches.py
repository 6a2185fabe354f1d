"""The caches that rows of an ablation learn from and are measured on: given, or extracted."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.storage.open import Location
from mfdetr_cache.coco.options import LabelOptions
from mfdetr_cache.detectors.options import DetectorOptions, options_of
from mfdetr_cache.errors import CacheError, ConfigError, IdentityError, MfdetrError, StoppedError
from mfdetr_cache.evaluation.measure import require_same_truth
from mfdetr_cache.evaluation.overlap import tell_images_in_both
from mfdetr_cache.extraction.content import choices_of
from mfdetr_cache.extraction.options import MapOptions, ViewOptions
from mfdetr_cache.reporter import Reporter
from mfdetr_cache.training.settings import require_one_detector
from mfdetr_pipelines.ablation.rows import DETECTOR_SETTINGS, AblationRow
from mfdetr_pipelines.config.ablate import AblateConfig
from mfdetr_pipelines.config.extract import ExtractConfig
from mfdetr_pipelines.extract import run_extract

KeyT = TypeVar("KeyT")

# Augmented views where --cache has none: with the plain one, as many as the paper has epochs.
_VIEWS = 5


@dataclass(frozen=True, slots=True)
class Caches:
    """Two complete caches of one detector.

    Attributes:
        validation_id: Its cache id, or ``split`` for the ``val_split`` images of ``training``.
    """

    training: FeatureCache
    validation: FeatureCache
    validation_id: str


@dataclass(frozen=True, slots=True)
class Choices:
    """How a cache was extracted, or is to be."""

    options: DetectorOptions
    maps: MapOptions
    views: ViewOptions

    @classmethod
    def of(cls, cache: FeatureCache) -> "Choices":
        """Those of a cache."""
        return cls(options_of(cache.identity["detector"]), *choices_of(cache.root))

    def has(self, settings: Mapping[str, Any]) -> bool:
        """Whether all of a row's settings are so."""
        return self.changed(settings) == self

    def changed(self, settings: Mapping[str, Any]) -> "Choices":
        """The same with a row's settings."""
        views = self.views
        if "view_policy" in settings:
            views = replace(views, count=views.count or _VIEWS, policy=settings["view_policy"])
        if "views" in settings:
            views = replace(views, count=settings["views"])
        options = {k: v for k, v in settings.items() if k in DETECTOR_SETTINGS}
        return Choices(replace(self.options, **options), self.maps, views)


@dataclass(frozen=True, slots=True)
class MissingCache:
    """A cache that a row asks for, and that was not given.

    Attributes:
        like: The given cache that it is to be like, but for the settings.
        settings: What is to differ.
        is_training: Whether it is learned from, not measured on.
    """

    path: Path
    like: FeatureCache
    settings: Mapping[str, Any]
    is_training: bool

    @property
    def choices(self) -> Choices:
        """How it is to be extracted."""
        return Choices.of(self.like).changed(self.settings)

    @property
    def num_bytes(self) -> int:
        """About: views are taken for equally large."""
        before = 1 + Choices.of(self.like).views.count
        return self.like.stored_bytes * (1 + self.choices.views.count) // before

    @property
    def text(self) -> str:
        """Where, what and how large."""
        options = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in self.settings.items())
        size = f"about {self.num_bytes / 1e9:.2f} GB"
        return f"{self.path}: as {self.like.path}, with {options}; {size}"


@dataclass(frozen=True, slots=True)
class RowCaches:
    """By name of the row: its caches, or what is missing of them, or why it cannot have them."""

    by_row: dict[str, Caches] = field(default_factory=dict)
    missing: dict[str, list[MissingCache]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


def find_caches(config: AblateConfig) -> RowCaches:
    """The caches of every row: its own, or the first given or extracted one that is as it asks.

    Without ``--val-cache``, rows are measured on the images that ``val_split`` leaves out. Raises
    CacheError (missing, unfinished, damaged, or too small to be split), IdentityError (different
    detectors) or ConfigError (nothing to measure on, rows with different ``val_split``, or a cache
    that no row asks for).
    """
    if not config.cache:
        raise ConfigError("give --cache to train from, or --dry-run")
    splits = {row.recipe.train.val_split for row in config.rows}
    if not config.val_cache and (len(splits) != 1 or 0 in splits):
        raise ConfigError(
            "give --val-cache, or --val-split N to keep every N-th image of --cache for measuring"
        )
    trainings, validations = (_Given(config, is_training=which) for which in (True, False))
    found = RowCaches()
    pairs: dict[tuple[str, str], Caches] = {}
    for row in config.rows:
        try:
            training = trainings.asked_by(row)
            is_split = not (config.val_cache or row.val_cache)
            validation = None if is_split else validations.asked_by(row)
            if isinstance(training, MissingCache) or isinstance(validation, MissingCache):
                both = (training, validation)
                found.missing[row.name] = [c for c in both if isinstance(c, MissingCache)]
            else:
                split = row.recipe.train.val_split
                key = (training.path, f"split {split}" if validation is None else validation.path)
                if key not in pairs:
                    pairs[key] = _paired(training, validation, split)
                found.by_row[row.name] = pairs[key]
        except (CacheError, IdentityError) as error:
            if not (row.cache or row.val_cache or row.extract):
                raise
            found.problems[row.name] = str(error)
    _require_one_truth(found)
    trainings.require_asked_for()
    validations.require_asked_for()
    return found


class _Given:
    """The caches of ``--cache``, or of ``--val-cache``."""

    def __init__(self, config: AblateConfig, *, is_training: bool) -> None:
        self._config, self._is_training = config, is_training
        locations = config.cache if is_training else config.val_cache
        self._caches = [self._open(location) for location in locations]
        self._asked_for: set[str] = set()

    def _open(self, location: Location) -> FeatureCache:
        return FeatureCache.open(self._config.local_cache.before(location))

    def asked_by(self, row: AblationRow) -> FeatureCache | MissingCache:
        """A row's own cache, or the first given or extracted one that is as it asks."""
        found = self._find(row)
        self._asked_for.add(str(found.path))
        return found

    def _find(self, row: AblationRow) -> FeatureCache | MissingCache:
        own, folder, settings = row.cache, "train", row.extract
        if not self._is_training:
            own, folder = row.val_cache, "val"
            settings = {k: v for k, v in settings.items() if k in DETECTOR_SETTINGS}
        if own:
            return self._open(own)
        if not self._caches:
            raise CacheError(f"row {row.name!r} has no val_cache, and there is no --val-cache")
        first = self._caches[0]
        for cache in self._caches:
            if _alike(cache, first) and Choices.of(cache).has(settings):
                return cache
        name = ",".join(f"{key}={value}" for key, value in settings.items())
        path = self._config.out / "caches" / f"{folder},{name}.zarr"
        if path.exists() and (cache := FeatureCache.open(path)).is_complete:
            if not _alike(cache, first):
                raise CacheError(f"{cache.path} is not of {first.path}'s detector and images")
            return cache
        return MissingCache(path, first, settings, self._is_training)

    def require_asked_for(self) -> None:
        """Refuse a cache that no row asks for, but for the first."""
        for cache in self._caches[1:]:
            if cache.path not in self._asked_for:
                option = "--cache" if self._is_training else "--val-cache"
                raise ConfigError(f"{option} {cache.path}: no row asks for it; leave it out")


def _paired(training: FeatureCache, validation: FeatureCache | None, val_split: int) -> Caches:
    training.require_complete()
    if validation is None:
        return Caches(training, training.split(val_split)[1], "split")
    require_one_detector(training, validation)
    validation.require_complete()
    return Caches(training, validation, validation.cache_id)


def _alike(cache: FeatureCache, first: FeatureCache) -> bool:
    """Whether two caches are of one detector, with whatever settings, and the same images."""
    return (
        cache.spec.weights_sha256 == first.spec.weights_sha256
        and cache.identity["images"] == first.identity["images"]
    )


def _require_one_truth(found: RowCaches) -> None:
    """A row that is measured on other objects than the first is no row to compare with it."""
    if not found.by_row:
        return
    first = next(iter(found.by_row.values())).validation
    for name, caches in list(found.by_row.items()):
        with noting(found.problems, name):
            if caches.validation is not first:
                require_same_truth(first, caches.validation)
        if name in found.problems:
            del found.by_row[name]


def open_caches(config: AblateConfig, reporter: Reporter) -> RowCaches:
    """The caches of every row; with ``--extract``, those that are missing are extracted first.

    A row that cannot have its caches has a problem. StoppedError if a signal ended it; otherwise
    raises as :func:`~mfdetr_pipelines.ablation.caches.find_caches`.
    """
    found = find_caches(config)
    failed: dict[Path, str] = {}
    if config.extraction.extract and found.missing:
        failed = _extract(config, found, reporter)
        found = find_caches(config)
    for name, missing in found.missing.items():
        lacks = "; ".join(cache.text for cache in missing)
        why = [failed[cache.path] for cache in missing if cache.path in failed]
        why += [f"no given cache is as it asks; --extract would make {lacks}"]
        found.problems.setdefault(name, why[0])
    for pair in {id(caches): caches for caches in found.by_row.values()}.values():
        if pair.validation_id != "split":
            tell_images_in_both(pair.validation, pair.training, reporter)
    return found


def wanted_caches(found: RowCaches) -> dict[Path, MissingCache]:
    """What is missing, each once."""
    return {cache.path: cache for missing in found.missing.values() for cache in missing}


@contextmanager
def noting(problems: dict[KeyT, str], key: KeyT) -> Iterator[None]:
    """Note what is wrong with one of many and go on with the others, unless a signal ended it."""
    try:
        yield
    except StoppedError:
        raise
    except MfdetrError as error:
        problems[key] = str(error)


def _extract(config: AblateConfig, found: RowCaches, reporter: Reporter) -> dict[Path, str]:
    """Extract what is missing; what was wrong where."""
    wanted = wanted_caches(found)
    total = sum(cache.num_bytes for cache in wanted.values())
    extractions = [extraction_of(cache, config) for cache in wanted.values()]
    reporter.say(f"{len(wanted)} caches to extract, about {total / 1e9:.2f} GB together:")
    for cache in wanted.values():
        reporter.say(cache.text)
    failed: dict[Path, str] = {}
    for path, extraction in zip(wanted, extractions, strict=True):
        with noting(failed, path):
            run_extract(extraction, reporter)
    return failed


def extraction_of(wanted: MissingCache, config: AblateConfig) -> ExtractConfig:
    """How a cache is to be extracted.

    ConfigError if the detector's weights, the images or the annotations are not given.
    """
    given, chosen, cache = config.extraction, wanted.choices, wanted.like
    images, annotations, names = (
        (given.train_images, given.train_annotations, "--train-images and --train-annotations")
        if wanted.is_training
        else (config.images, given.val_annotations, "--images and --val-annotations")
    )
    if given.weights is None or images is None or annotations is None:
        raise ConfigError(f"{wanted.path} takes --weights, {names}: those of {cache.path}")
    # What cannot be used was left out when the other was made.
    return ExtractConfig(
        weights=given.weights,
        cache=wanted.path,
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
