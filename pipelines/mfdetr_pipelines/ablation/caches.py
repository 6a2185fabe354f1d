"""The training and validation caches of an ablation."""

from collections.abc import Sequence
from dataclasses import dataclass

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.storage.open import Location
from mfdetr_cache.errors import ConfigError
from mfdetr_cache.identity import detector_identity, require_same
from mfdetr_pipelines.ablation.rows import AblationRow


@dataclass(frozen=True, slots=True)
class Caches:
    """Two complete caches of one detector.

    Attributes:
        training: Cache to train from.
        validation: Cache to measure on.
        validation_id: Its cache id, or ``split`` for the ``val_split`` images of ``training``.
    """

    training: FeatureCache
    validation: FeatureCache
    validation_id: str


def open_caches(cache: Location, val_cache: Location | None, rows: Sequence[AblationRow]) -> Caches:
    """Open both caches; without ``val_cache``, measure on the images that ``val_split`` leaves out.

    Raises CacheError (missing, unfinished, damaged, or too small to be split), IdentityError
    (different detectors) or ConfigError (nothing to measure on, or rows with different
    ``val_split``).
    """
    training = FeatureCache.open(cache)
    if val_cache is None:
        splits = {row.recipe.train.val_split for row in rows}
        if len(splits) != 1 or 0 in splits:
            raise ConfigError(
                "give --val-cache, or --val-split N to keep every N-th image of --cache for "
                "measuring"
            )
        training.require_complete()
        return Caches(training, training.split(splits.pop())[1], "split")
    validation = FeatureCache.open(val_cache)
    require_same(
        detector_identity(training.spec),
        f"--cache {training.path}",
        detector_identity(validation.spec),
        f"--val-cache {validation.path}",
    )
    training.require_complete()
    validation.require_complete()
    return Caches(training, validation, validation.cache_id)
