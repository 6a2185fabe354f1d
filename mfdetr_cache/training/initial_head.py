"""A head at the start of a training, with its mask basis fitted to the annotations."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.config import to_dict
from mfdetr_cache.errors import HeadError
from mfdetr_cache.head.build import build_head
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.head.folder import CONFIG_FILE, HeadFolder
from mfdetr_cache.head.mask_embedding import SIDE as MASK_SIDE
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.identity import differences
from mfdetr_cache.matching.objects import object_masks
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.order import trainable_rows
from mfdetr_cache.types import DetectorSpec, GroundTruth

# Images whose annotated masks a basis is learned from: some 30,000 objects of COCO.
_BASIS_IMAGES = 4000


def new_head(config: HeadConfig, cache: FeatureCache, train: TrainConfig) -> MaskHead:
    """:func:`fitted_head` of a cache."""
    return fitted_head(
        config,
        cache.spec,
        lambda: trainable_rows(cache, train),
        lambda row: (cache.ground_truth(row), cache.original_hw(row)),
        train,
    )


def fitted_head(
    config: HeadConfig,
    spec: DetectorSpec,
    rows_of: Callable[[], Sequence[int]],
    truth_of: Callable[[int], tuple[GroundTruth, tuple[int, int]]],
    train: TrainConfig,
) -> MaskHead:
    """A head with fresh weights from torch's random state; a mask basis, if any, is fitted.

    To the annotations of at most 4000 images, from ``truth_of(row)`` with the size of the image.
    """
    head = build_head(config, spec)
    if head.codec is not None:
        rows = rows_of()
        if len(rows) > _BASIS_IMAGES:
            rows = sorted(np.random.default_rng(0).permutation(rows)[:_BASIS_IMAGES].tolist())
        masks = [object_masks(*truth_of(row), train.held_out, MASK_SIDE) for row in rows]
        head.codec.fit(torch.from_numpy(np.concatenate(masks)))
    return head


def with_weights_of(head: MaskHead, initial: HeadFolder | None) -> MaskHead:
    """The head with the weights of a trained one, if any.

    HeadError if that has another architecture, or was made for maps of other sizes.
    """
    if initial is None:
        return head
    found = differences(to_dict(initial.head.config), to_dict(head.config))
    if found:
        name, there, here = found[0]
        raise HeadError(
            f"--from-head {initial.path}: {name} is {there!r} there and {here!r} here; give its "
            f"settings, as --config {initial.path / CONFIG_FILE} does"
        )
    try:
        head.load_state_dict(initial.head.state_dict())
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:300]
        raise HeadError(
            f"--from-head {initial.path} was trained on maps of other sizes: {reason}"
        ) from error
    return head
