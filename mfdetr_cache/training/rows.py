"""The rows of a cache that are trained on."""

from collections.abc import Sequence

import numpy as np

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.errors import TrainingError
from mfdetr_cache.matching.objects import trainable_objects
from mfdetr_cache.training.config import TrainConfig


def trainable_rows(cache: FeatureCache, train: TrainConfig) -> list[int]:
    """Rows with at least one object to learn from, in order; TrainingError if there is none.

    Respects ``held_out``, ``val_split`` and ``label_fraction``.
    """
    if train.val_split:
        cache, _ = cache.split(train.val_split)
    rows = [
        row for row in cache.rows if len(trainable_objects(cache.ground_truth(row), train.held_out))
    ]
    if not rows:
        raise TrainingError(
            f"no image of {cache.path} has an object to learn from (only crowds, categories the "
            "detector does not know, or nothing); extract a split with instance masks"
        )
    return kept_rows(rows, train.label_fraction, train.seed)


def kept_rows(rows: Sequence[int], fraction: float, seed: int) -> list[int]:
    """A random fraction of rows, at least one; with one seed, smaller fractions are subsets."""
    order = np.random.default_rng((seed, len(rows))).permutation(len(rows))
    kept = order[: max(1, round(fraction * len(rows)))]
    return [rows[i] for i in sorted(kept)]
