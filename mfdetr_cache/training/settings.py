"""Checks and conversion of the options of a training."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.schema import C1RoiLayout
from mfdetr_cache.cache.storage.open import Location
from mfdetr_cache.coco.categories import called, category_names, plain_name
from mfdetr_cache.coco.image_list import Category
from mfdetr_cache.config import nearest, to_dict
from mfdetr_cache.errors import ConfigError
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.identity import detector_identity, require_same
from mfdetr_cache.ops.devices import keep_freed_memory, torch_device
from mfdetr_cache.training.config import Length, TrainConfig
from mfdetr_cache.training.order import steps_per_epoch

# Settings that are about a cache, and what they must be without one.
_WITHOUT_CACHE = {"views": "all", "shuffle": "images", "val_split": 0}


def training_device(name: str, amp: Literal["off", "bf16", "fp16"]) -> torch.device:
    """The device of ``--device``, checked, with this process's memory prepared for training."""
    device = torch_device(name)
    keep_freed_memory()
    if device.type == "cpu" and amp == "fp16":
        raise ConfigError("amp=fp16 needs a GPU; on a CPU use amp=bf16 or amp=off")
    return device


def with_batch_size(train: TrainConfig, batch_size: int | Literal["auto"] | None) -> TrainConfig:
    """Training settings with the batch size of ``--batch-size``; ``auto`` keeps the recipe's."""
    if not isinstance(batch_size, int):
        return train
    if batch_size < 1:
        raise ConfigError(f"--batch-size must be 1 or more, not {batch_size}")
    return replace(train, batch_size=batch_size)


def with_length(train: TrainConfig, length: Length, num_rows: int) -> TrainConfig:
    """Training settings with the length of ``--epochs`` or ``--max-steps``, if one is given."""
    if length.max_steps is not None:
        return replace(train, steps=length.max_steps)
    if length.epochs is not None:
        per_epoch = steps_per_epoch(num_rows, train.batch_size)
        return replace(train, steps=max(1, round(length.epochs * per_epoch)))
    return train


def category_ids(names: Sequence[str], categories: Sequence[dict[str, Any]]) -> tuple[int, ...]:
    """Ids, in rising order, of the categories that ``--hold-out`` names or numbers."""
    known = [Category(i, name, i) for i, name in category_names(categories).items()]
    ids: set[int] = set()
    for name in names:
        found = called(known, name.strip())
        if not found:
            like = nearest(plain_name(name), [plain_name(c.name) for c in known])
            raise ConfigError(f"--hold-out {name}: no such category{like}")
        ids.update(c.category_id for c in found)
    return tuple(sorted(ids))


def open_validation(
    cache: FeatureCache, location: Location | None, val_split: int, head: HeadConfig
) -> FeatureCache | None:
    """The validation cache, or every ``val_split``-th image of ``cache``; None for neither.

    It is complete, of the same detector (else IdentityError), and has C1 where the head reads it.
    """
    if location is not None:
        validation = FeatureCache.open(location)
        require_one_detector(cache, validation)
        validation.require_complete()
    elif val_split:
        validation = cache.split(val_split)[1]
    else:
        return None
    if head.use_c1:
        validation.require_c1_map("validation")
    return validation


def require_one_detector(cache: FeatureCache, validation: FeatureCache) -> None:
    """Refuse a validation cache of another detector; the IdentityError says what differs."""
    require_same(
        detector_identity(cache.spec),
        f"--cache {cache.path}",
        detector_identity(validation.spec),
        f"--val-cache {validation.path}",
    )


def require_validation(every: int | None, what: str, validation: object | None) -> None:
    """Refuse ``--val-every`` where there is no validation; ``what`` names options that give one."""
    if every is not None and validation is None:
        raise ConfigError(f"--val-every needs {what}")


def require_live(train: TrainConfig, *, is_tuned: bool) -> None:
    """Refuse settings that cannot work with a live detector, or have no effect."""
    if train.amp == "fp16" and is_tuned:
        raise ConfigError(
            "amp=fp16 would let the detector's gradients vanish: use amp=bf16, or --tune nothing"
        )
    for name, value in _WITHOUT_CACHE.items():
        if getattr(train, name) != value:
            raise ConfigError(
                f"--set {name}={getattr(train, name)} does nothing without a cache; leave it out"
            )


def settings_of_crops(crops: C1RoiLayout, head: HeadConfig) -> dict[str, Any]:
    """Settings of head and training that crops of C1 leave no choice of."""
    # Crops of another size may still serve the same coarse grid, or be the only one.
    size, coarse = crops.roi_size, head.roi_size
    is_finer = bool(head.fine_size) and size > coarse and size % coarse == 0
    return {
        "match": "hungarian",
        "gt_box_share": 0.0,
        "box_jitter": 0.0,
        "roi_size": coarse if is_finer else size,
        "fine_size": size if is_finer else 0,
        "roi_sampling_ratio": crops.sampling_ratio,
    }


def require_c1(cache: FeatureCache, head: MaskHead, train: TrainConfig) -> None:
    """Refuse settings that need more of C1 than the cache holds."""
    layout = cache.layout
    if head.c1 is None or layout.c1 == "full":
        return
    if head.config.mask_predictor == "refined":
        cache.require_c1_map("a head that moves boxes")
    if layout.c1 == "none":
        raise ConfigError(f"{cache.path} was extracted with --c1 none: pass --set use_c1=false")
    assert layout.c1_roi is not None
    asked = {**to_dict(train), **to_dict(head.config)}
    fixed = settings_of_crops(layout.c1_roi, head.config)
    wrong = [f"{name}={held}" for name, held in fixed.items() if asked[name] != held]
    if wrong:
        raise ConfigError(
            f"{cache.path} holds C1 as crops (--c1 roi), which fix some settings: pass "
            + " ".join(f"--set {w}" for w in wrong)
        )
