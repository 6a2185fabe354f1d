"""A split as a detector is trained on it: its categories matched with the detector's labels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mfdetr_cache.coco.annotations import CocoSplit
from mfdetr_cache.coco.categories import LabelMatch, MatchedCategory, called, match_labels
from mfdetr_cache.coco.ids import named
from mfdetr_cache.coco.image_list import Category, ImageEntry
from mfdetr_cache.coco.options import OBJECT, RENUMBERED, LabelOptions
from mfdetr_cache.errors import DatasetError
from mfdetr_cache.types import DetectorSpec, GroundTruth

# The category of --class-agnostic.
_ANY = Category(1, OBJECT, 1)


@dataclass(frozen=True, slots=True)
class LabelledSplit:
    """A split with the categories that were chosen; those that share a label are one.

    ``chosen`` is what the user chose of this, as plain values: part of what annotations are.
    """

    split: CocoSplit
    match: LabelMatch
    chosen: dict[str, Any]

    def header(
        self, *, renumbered: bool = False
    ) -> tuple[dict[str, Any], list[dict[str, Any]], tuple[int, ...]]:
        """Source, ``{"id", "name"}`` of each category, and category of each label, in a cache.

        The source is what these labels are made from. It also tells of what has other ids in the
        cache than in the file: where these cannot be used, or the images of a cache that had ids
        before, which are ``renumbered``.
        """
        images = renumbered or any(e.written_id != e.image_id for e in self.split.images)
        categories = any(c.written_id != c.category_id for c in self.split.categories)
        ours = ["images"] * images + ["categories"] * categories
        told = {RENUMBERED: ours} if ours else {}
        source = {"name": self.split.name, "sha256": self.split.sha256, **self.chosen, **told}
        return source, self.split.plain_categories, self.match.label_categories

    def objects_of(self, entry: ImageEntry | None) -> GroundTruth:
        """The objects of an image, with their labels; none of an image that is not listed."""
        labels = {c: i for i, c in reversed(list(enumerate(self.match.label_categories))) if c >= 0}
        return self.split.ground_truth(entry, labels)


def label_split(
    split: CocoSplit, spec: DetectorSpec, options: LabelOptions | None = None
) -> LabelledSplit:
    """Match the categories of a split with the labels of a detector; by their names if no options.

    DatasetError if a category or label that was named is unknown, or no label has a category.
    """
    options = options or LabelOptions()
    if options.only:
        split = _only(split, options.only)
    counts = split.objects_per_category()
    if options.class_agnostic:
        return LabelledSplit(
            one_category(split), _one_label(split, spec, counts), options.identity()
        )
    match = match_labels(spec.label_names, split.categories, spec.name, counts, options.map)
    if match.same_as:
        kept = tuple(c for c in split.categories if c.category_id not in match.same_as)
        split = _with_categories(split, kept, lambda old: match.same_as.get(old, old))
    return LabelledSplit(split, match, options.identity())


def one_category(split: CocoSplit) -> CocoSplit:
    """The split as if every object were of one category, of id 1."""
    return _with_categories(split, (_ANY,), lambda _: _ANY.category_id)


def _with_categories(
    split: CocoSplit, categories: tuple[Category, ...], category_of: Callable[[int], int]
) -> CocoSplit:
    """The split with other categories, and the objects whose new category is one of them."""
    ids = {c.category_id for c in categories}
    annotations = {
        image_id: [
            replace(a, category_id=new)
            for a in objects
            if (new := category_of(a.category_id)) in ids
        ]
        for image_id, objects in split.annotations.items()
    }
    return replace(split, categories=categories, annotations=annotations)


def _one_label(split: CocoSplit, spec: DetectorSpec, counts: Mapping[int, int]) -> LabelMatch:
    nothing = spec.score_function == "softmax"
    classes = spec.num_labels - nothing
    labels = (_ANY.category_id,) * classes + (-1,) * nothing
    rows = [
        MatchedCategory(c.name, OBJECT, counts.get(c.category_id, 0), "any")
        for c in split.categories
    ]
    return LabelMatch(labels, table=tuple(rows))


def _only(split: CocoSplit, names: Sequence[str]) -> CocoSplit:
    chosen = {name: called(split.categories, name) for name in names}
    unknown = [name for name, found in chosen.items() if not found]
    if unknown:
        listed = named(c.name for c in split.categories)
        raise DatasetError(
            f"--only {unknown[0]}: the dataset has no such category; it has {listed}"
        )
    ids = {c.category_id for found in chosen.values() for c in found}
    kept = tuple(c for c in split.categories if c.category_id in ids)
    return _with_categories(split, kept, lambda own: own)
