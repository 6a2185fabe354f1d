import pytest

from mfdetr_cache.coco.categories import called, match_labels
from mfdetr_cache.coco.image_list import Category
from mfdetr_cache.errors import DatasetError

CATEGORIES = [Category(1, "person", 1), Category(44, "bottle", 44), Category(90, "tooth-brush", 90)]
PLACEHOLDERS = [f"LABEL_{i}" for i in range(91)]


def test_names_decide() -> None:
    found = match_labels(["Bottle", "tooth brush", "sofa"], CATEGORIES, "d")
    assert found.label_categories == (44, 90, -1)


def test_names_are_compared_as_people_read_them() -> None:
    """Accents composed or not, letters of full width, a space that does not break."""
    categories = [
        Category(1, "cafe\u0301", 1),
        Category(2, "\uff23\uff21\uff32", 2),
        Category(3, "fire\xa0truck", 3),
    ]
    found = match_labels(["fire truck", "car", "caf\xe9"], categories, "d")
    assert found.label_categories == (3, 2, 1)


def test_a_name_that_is_a_number_is_no_id() -> None:
    """As digits have them: the category 3 is that of the name, and not that of the id."""
    digits = [Category(i + 1, str(i), i + 1) for i in range(10)]
    assert called(digits, "3") == [digits[3]]
    assert called(digits, "10") == [digits[9]]
    assert called([Category(1, "Car", 1), Category(2, "car", 2)], "car") == [Category(2, "car", 2)]
    found = match_labels(["x", "three"], digits, "d", mapped={"3": "three"})
    assert found.label_categories == (-1, 4)


def test_91_outputs_are_category_ids() -> None:
    found = match_labels(PLACEHOLDERS, CATEGORIES, "d").label_categories
    assert (found[1], found[44], found[90], found[2]) == (1, 44, 90, -1)


def test_equal_counts_follow_ascending_ids() -> None:
    turned = list(reversed(CATEGORIES))
    assert match_labels(PLACEHOLDERS[:3], turned, "d").label_categories == (1, 44, 90)
    matched = match_labels(PLACEHOLDERS[:3], turned, "d", {1: 5})
    assert "matched by the order of their ids: tooth-brush = LABEL_2, " in matched.warnings[-1]


def test_a_root_category_that_nothing_is_annotated_with_does_not_count() -> None:
    roots = [Category(0, "things", 0), *CATEGORIES]
    found = match_labels(PLACEHOLDERS[:3], roots, "d", {1: 4, 44: 1, 90: 2})
    assert found.label_categories == (1, 44, 90)
    # Nor where a split has no object of another one either.
    found = match_labels(PLACEHOLDERS[:3], roots, "d", {1: 4, 90: 2})
    assert found.label_categories == (1, 44, 90)
    assert match_labels(PLACEHOLDERS[:4], roots, "d", {1: 4}).label_categories == (0, 1, 44, 90)


@pytest.mark.parametrize(
    ("labels", "advice"),
    [
        (["a", "b"], "say which is which with --map category=label"),
        (["a", "b", "c"], "say which is which with --map category=label"),
        (PLACEHOLDERS[:2], "name its outputs with --labels .*, or as id2label"),
    ],
)
def test_no_rule_is_an_error(labels: list[str], advice: str) -> None:
    with pytest.raises(DatasetError, match=f"no name is in both, .*{advice}"):
        match_labels(labels, CATEGORIES, "some detector")


def test_of_two_categories_of_one_name_the_annotated_one_is_meant() -> None:
    twice = [*CATEGORIES, Category(99, "Person", 99)]
    assert match_labels(["person"], twice, "d", {1: 3}).label_categories == (1,)
    assert match_labels(["person"], twice, "d", {99: 3}).label_categories == (99,)
    with pytest.raises(DatasetError, match="1 and 99 are both called 'person' and both annotated"):
        match_labels(["person"], twice, "d", {1: 3, 99: 1})
    both = match_labels(["person"], twice, "d", {1: 3, 99: 1}, {"1": "person", "99": "person"})
    assert (both.label_categories, both.same_as) == ((1,), {99: 1})


def test_what_has_no_label_is_a_warning_with_its_count() -> None:
    found = match_labels(["person", "sofa"], CATEGORIES, "det", {1: 7, 44: 3, 90: 2})
    (warning,) = found.warnings
    assert (
        "2 annotated categories have no label of det, 5 of 12 objects: bottle (3), too" in warning
    )
    rows = [(r.name, r.label, r.objects, r.rule) for r in found.table]
    assert rows == [
        ("person", "person", 7, "name"),
        ("bottle", None, 3, ""),
        ("tooth-brush", None, 2, ""),
    ]
    assert match_labels(["person"], CATEGORIES, "det", {1: 7}).warnings == ()


def test_a_map_comes_before_names() -> None:
    labels = ["person", "Vase", "bottle"]
    found = match_labels(labels, CATEGORIES, "d", {}, {"bottle": "vase", "90": "bottle"})
    assert found.label_categories == (1, 44, 90)
    assert [r.rule for r in found.table] == ["name", "map", "map"]
    shared = match_labels(labels, CATEGORIES, "d", {}, {"Bottle": "person"})
    assert (shared.label_categories, shared.same_as) == ((1, -1, -1), {44: 1})
    with pytest.raises(DatasetError, match="--map cup=vase: the dataset has no category 'cup'"):
        match_labels(labels, CATEGORIES, "d", {}, {"cup": "vase"})
    with pytest.raises(DatasetError, match="--map bottle=cup: d has no label 'cup'"):
        match_labels(labels, CATEGORIES, "d", {}, {"bottle": "cup"})
