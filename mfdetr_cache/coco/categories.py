"""Which category of a dataset each output of a detector stands for."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mfdetr_cache.coco.image_list import Category
from mfdetr_cache.errors import DatasetError


def categories_of_labels(
    label_names: Sequence[str], categories: Sequence[Category], detector: str
) -> tuple[int, ...]:
    """The category id of every label of a detector, -1 where the dataset has none.

    Names decide where the detector has real ones. Otherwise as many outputs as there are
    categories follow the categories by ascending id; 91 outputs, or one more than the largest id,
    are indexed by category id, as Deformable DETR, H-DETR and DINO are trained.

    Args:
        label_names: The detector's names, in the order of its outputs.
        categories: The dataset's categories.
        detector: The detector's name, for the message.

    Returns:
        One category id per label.

    Raises:
        DatasetError: If no rule gives a single category.
    """
    by_name = {_plain(c.name): c.category_id for c in categories}
    named = tuple(by_name.get(_plain(name), -1) for name in label_names)
    if any(category_id >= 0 for category_id in named):
        return named
    ids = sorted(c.category_id for c in categories)
    if len(label_names) == len(ids):
        return tuple(ids)
    if len(label_names) == 91 and ids[-1] <= 90:
        return tuple(i if i in ids else -1 for i in range(91))
    placeholders = all(re.fullmatch(r"label \d+", _plain(name)) for name in label_names)
    if placeholders and len(label_names) == ids[-1] + 1:
        return tuple(i if i in ids else -1 for i in range(len(label_names)))
    raise DatasetError(
        f"{detector} has {len(label_names)} labels ({', '.join(label_names[:3])}, ...) and the "
        f"dataset {len(ids)} categories ({', '.join(c.name for c in categories[:3])}, ...): no "
        "name is in both, so no box could ever be right; use the detector's own dataset"
    )


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", " ").replace("-", " ")


def category_names(categories: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """Names of categories as caches, heads and pycocotools keep them.

    Args:
        categories: ``{"id", "name"}`` each.

    Returns:
        Category id to name.
    """
    return {int(c["id"]): str(c["name"]) for c in categories}
