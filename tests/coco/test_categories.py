import pytest

from mfdetr_cache.coco.categories import categories_of_labels
from mfdetr_cache.coco.image_list import Category
from mfdetr_cache.errors import DatasetError

CATEGORIES = [Category(1, "person"), Category(44, "bottle"), Category(90, "tooth-brush")]


def test_names_decide() -> None:
    assert categories_of_labels(["Bottle", "tooth brush", "sofa"], CATEGORIES, "d") == (44, 90, -1)


def test_91_outputs_are_category_ids() -> None:
    found = categories_of_labels([f"LABEL_{i}" for i in range(91)], CATEGORIES, "d")
    assert (found[1], found[44], found[90], found[2]) == (1, 44, 90, -1)


def test_equal_counts_follow_ascending_ids() -> None:
    assert categories_of_labels(["a", "b", "c"], list(reversed(CATEGORIES)), "d") == (1, 44, 90)


def test_no_rule_is_an_error() -> None:
    with pytest.raises(DatasetError, match="no name is in both"):
        categories_of_labels(["a", "b"], CATEGORIES, "some detector")
