"""The two caches of an ablation: one to train from, one to measure on."""

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
        training: Of the training split.
        validation: Of the images that are measured on.
        validation_id: Identity of these images: a cache's, or ``split`` where they are the images
            of ``training`` that the setting ``val_split`` leaves out of training.
    """

    training: FeatureCache
    validation: FeatureCache
    validation_id: str


def open_caches(cache: Location, val_cache: Location | None, rows: Sequence[AblationRow]) -> Caches:
    """Open the caches of an ablation.

    Args:
        cache: Of the training split.
        val_cache: Of the validation split; None for the images that ``val_split`` leaves out.
        rows: Rows to train.

    Returns:
        Both.

    Raises:
        CacheError: If a cache is missing, unfinished or damaged, or too small to be divided.
        IdentityError: If they come from different detectors.
        ConfigError: If there is nothing to measure on, or rows would be measured on other images.
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
