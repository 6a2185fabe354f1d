"""A head at the start of a training, with its mask basis fitted to the annotations."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.config import to_dict
from mfdetr_cache.errors import HeadError
from mfdetr_cache.head.build import build_head
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.head.folder import CONFIG_FILE, HeadFolder
from mfdetr_cache.head.mask_embedding import SIDE as MASK_SIDE
from mfdetr_cache.head.mask_embedding import MaskCodec
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.identity import differences
from mfdetr_cache.matching.objects import object_masks
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.rows import trainable_rows

# Images whose annotated masks a basis is learned from: some 30,000 objects of COCO.
_BASIS_IMAGES = 4000


def new_head(config: HeadConfig, cache: FeatureCache, train: TrainConfig) -> MaskHead:
    """A head with fresh weights from torch's random state; a mask basis, if any, is fitted."""
    head = build_head(config, cache.spec)
    if head.codec is not None:

        def masks_of(row: int) -> NDArray[np.float32]:
            truth, size_hw = cache.ground_truth(row), cache.original_hw(row)
            return object_masks(truth, size_hw, train.held_out, MASK_SIDE)

        fit_codec(head.codec, trainable_rows(cache, train), masks_of)
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


def fit_codec(
    codec: MaskCodec, rows: Sequence[int], masks_of: Callable[[int], NDArray[np.float32]]
) -> None:
    """Fit a mask basis to the annotations of at most 4000 of these images.

    ``masks_of(row)`` returns the masks of an image, shape (G, 28, 28).
    """
    if len(rows) > _BASIS_IMAGES:
        rows = sorted(np.random.default_rng(0).permutation(rows)[:_BASIS_IMAGES].tolist())
    codec.fit(torch.from_numpy(np.concatenate([masks_of(row) for row in rows])))
