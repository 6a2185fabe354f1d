"""Which rows of a cache are trained on."""

from collections.abc import Sequence

import numpy as np

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.errors import TrainingError
from mfdetr_cache.matching.objects import trainable_objects
from mfdetr_cache.training.config import TrainConfig


def trainable_rows(cache: FeatureCache, train: TrainConfig) -> list[int]:
    """Rows with something to learn from.

    Args:
        cache: A complete cache.
        train: Training settings: which categories are hidden, which images are kept to measure on,
            and of how many of the others the masks are seen.

    Returns:
        Rows in order, at least one.

    Raises:
        TrainingError: If there is none.
    """
    if train.val_split:
        cache, _ = cache.split(train.val_split)
    rows = [row for row in cache.rows if _can_teach(cache, row, train.held_out)]
    if not rows:
        raise TrainingError(
            f"no image of {cache.path} has an object to learn from (only crowds, categories the "
            "detector does not know, or nothing); extract a split with instance masks"
        )
    return kept_rows(rows, train.label_fraction, train.seed)


def kept_rows(rows: Sequence[int], fraction: float, seed: int) -> list[int]:
    """A part of some rows; smaller parts lie inside larger ones of the same seed.

    Args:
        rows: In rising order.
        fraction: How much of them, in (0, 1].
        seed: Which they are.

    Returns:
        At least one, in rising order.
    """
    order = np.random.default_rng((seed, len(rows))).permutation(len(rows))
    kept = order[: max(1, round(fraction * len(rows)))]
    return [rows[i] for i in sorted(kept)]


def _can_teach(cache: FeatureCache, row: int, held_out: Sequence[int]) -> bool:
    return bool(len(trainable_objects(cache.ground_truth(row), held_out)))
