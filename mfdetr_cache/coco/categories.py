"""Which category of a dataset each output of a detector stands for."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mfdetr_cache.coco.ids import SourceId, by_unique_name, known_id, named, with_numbers
from mfdetr_cache.coco.image_list import Category
from mfdetr_cache.errors import DatasetError

Rule = Literal["map", "name", "order", "id", "any", ""]

# The paper's detectors have an output for every id up to COCO's largest, 90.
_COCO_OUTPUTS = 91


@dataclass(frozen=True, slots=True)
class MatchedCategory:
    """A category of the dataset and the detector's label it was matched to; None where it has none.

    ``rule`` is what decided: ``map`` as the user said, ``name``, ``order`` of the ids, or the
    ``id`` itself; ``any`` where all classes are one.
    """

    name: str
    label: str | None
    objects: int
    rule: Rule


@dataclass(frozen=True, slots=True)
class LabelMatch:
    """The labels of a detector and the categories of a dataset, brought together.

    Attributes:
        label_categories: Category id of every label, -1 where the dataset has none.
        same_as: Category id to the one whose label it shares; all others are their own.
        table: One row per category, in the order of the file.
        warnings: What the user should know before anything long begins.
    """

    label_categories: tuple[int, ...]
    same_as: dict[int, int] = field(default_factory=dict)
    table: tuple[MatchedCategory, ...] = ()
    warnings: tuple[str, ...] = ()


def match_labels(
    label_names: Sequence[str],
    categories: Sequence[Category],
    detector: str,
    objects: Mapping[int, int] = {},
    mapped: Mapping[str, str] = {},
) -> LabelMatch:
    """Match the labels of a detector with the categories of a dataset.

    What the user maps comes first, then names decide, whatever their capitals and hyphens. Where
    the detector has placeholders such as ``LABEL_3`` for names, its outputs follow the categories
    by ascending id if there are as many, without categories that nothing is annotated with if that
    gives as many; 91 outputs, or one more than the largest id, are indexed by category id, as
    Deformable DETR, H-DETR and DINO are trained.

    Names are in the order of the detector's outputs; ``objects`` are the annotated ones of each
    category id; ``mapped`` has the name of the label that a category, by name or id, is taken for.
    DatasetError if it names what there is not, two annotated categories have the name of one label,
    or no rule gives a single category.
    """
    as_told = _by_map(label_names, categories, mapped, detector)
    by_name = _by_name(label_names, categories, objects, as_told)
    labels = as_told | by_name
    rules: dict[int, Rule] = {**dict.fromkeys(by_name, "name"), **dict.fromkeys(as_told, "map")}
    if not labels:
        labels, rule = _by_number(label_names, categories, objects, detector)
        rules = dict.fromkeys(labels, rule)
    label_categories, same_as = [-1] * len(label_names), {}
    for category in categories:
        label = labels.get(category.category_id, -1)
        if label >= 0 and label_categories[label] >= 0:
            same_as[category.category_id] = label_categories[label]
        elif label >= 0:
            label_categories[label] = category.category_id
    table = tuple(
        MatchedCategory(
            c.name,
            label_names[labels[c.category_id]] if c.category_id in labels else None,
            objects.get(c.category_id, 0),
            rules.get(c.category_id, ""),
        )
        for c in categories
    )
    return LabelMatch(tuple(label_categories), same_as, table, _warnings(table, detector))


def _by_map(
    label_names: Sequence[str],
    categories: Sequence[Category],
    mapped: Mapping[str, str],
    detector: str,
) -> dict[int, int]:
    """Category id to label, as the user says."""
    found = {}
    by_label = {plain_name(name): label for label, name in reversed(list(enumerate(label_names)))}
    for name, target in mapped.items():
        chosen = called(categories, name)
        if not chosen:
            raise DatasetError(
                f"--map {name}={target}: the dataset has no category {name!r}; it has "
                f"{named(c.name for c in categories)}"
            )
        if plain_name(target) not in by_label:
            raise DatasetError(
                f"--map {name}={target}: {detector} has no label {target!r}; it has "
                f"{named(label_names)}"
            )
        found.update({c.category_id: by_label[plain_name(target)] for c in chosen})
    return found


def _by_name(
    label_names: Sequence[str],
    categories: Sequence[Category],
    counts: Mapping[int, int],
    done: Container[int],
) -> dict[int, int]:
    """Category id to label of the same name, where the detector has real names."""
    of_name: dict[str, list[Category]] = defaultdict(list)
    for category in categories:
        if category.category_id not in done:
            of_name[plain_name(category.name)].append(category)
    found: dict[int, int] = {}
    for label, name in enumerate(label_names):
        same = of_name.pop(plain_name(name), [])
        annotated = [c for c in same if counts.get(c.category_id, 0)]
        if len(annotated) > 1:
            ids = " and ".join(str(c.written_id) for c in annotated)
            raise DatasetError(
                f"the categories {ids} are both called {same[0].name!r} and both annotated: give "
                f"them different names, or take both for one with --map "
                f"{annotated[-1].written_id}={name} --map {annotated[0].written_id}={name}"
            )
        if same:
            found[(annotated or same)[0].category_id] = label
    return found


def _by_number(
    label_names: Sequence[str],
    categories: Sequence[Category],
    counts: Mapping[int, int],
    detector: str,
) -> tuple[dict[int, int], Rule]:
    """Category id to label, by the order of the ids or the ids themselves."""
    ids = sorted(c.category_id for c in categories)
    annotated = [i for i in ids if counts.get(i, 0)]
    outputs = len(label_names)
    real = [name for name in label_names if not re.fullmatch(_PLACEHOLDER, plain_name(name))]
    if not real:
        # Roboflow's first category is the name of the dataset, and never annotated.
        without_root = ids[1:] if ids[0] == 0 and not counts.get(0, 0) else ids
        for candidates in (ids, annotated, without_root):
            if len(candidates) == outputs:
                return {i: label for label, i in enumerate(candidates)}, "order"
        if ids[0] >= 0 and (
            (outputs == _COCO_OUTPUTS and ids[-1] < outputs) or outputs == ids[-1] + 1
        ):
            return {i: i for i in ids}, "id"
    advice = (
        "say which is which with --map category=label, or use --class-agnostic for masks of any box"
        if real
        else "name its outputs with --labels names.txt, one name a line in their order, or as "
        "id2label in its config.json"
    )
    raise DatasetError(
        f"{detector} has {outputs} labels ({', '.join(label_names[:3])}, ...) and the "
        f"dataset {len(ids)} categories ({', '.join(c.name for c in categories[:3])}, ...): no "
        f"name is in both, so no box could ever be right; {advice}"
    )


_PLACEHOLDER = r"(label|class)? ?\d+|n/a"


def _warnings(table: Sequence[MatchedCategory], detector: str) -> tuple[str, ...]:
    found = []
    lacking = [r for r in table if r.label is None and r.objects]
    if lacking:
        objects = sum(r.objects for r in lacking)
        total = sum(r.objects for r in table)
        listed = named(f"{r.name} ({r.objects})" for r in lacking)
        found.append(
            f"{len(lacking)} annotated categories have no label of {detector}, {objects} of "
            f"{total} objects: {listed}; nothing is learned from them (--map category=label gives "
            "one)"
        )
    guessed = [r for r in table if r.rule in ("order", "id")]
    if guessed:
        how = "the order of their ids" if guessed[0].rule == "order" else "their ids"
        pairs = named(f"{r.name} = {r.label}" for r in guessed)
        found.append(
            f"the labels of {detector} have no names; categories are matched by {how}: {pairs}"
        )
    return tuple(found)


def called(categories: Sequence[Category], name: str) -> list[Category]:
    """The categories that a user means: of this name, else of this id.

    Capitals and hyphens count only where several differ in them.
    """
    of_name = [c for c in categories if plain_name(c.name) == plain_name(name)]
    exact = [c for c in of_name if c.name == name]
    # Where names are numbers, as of digits, one may be the id of another.
    return exact or of_name or [c for c in categories if str(c.written_id) == name]


def by_names_too(categories: Mapping[SourceId, Category]) -> dict[SourceId, Category]:
    """Categories by everything that can only mean one: ids, and names in any capitals."""
    names = [(c.name, c) for c in categories.values()]
    return with_numbers({**by_unique_name(names, plain_name), **categories})


def known_category(value: object, found: Mapping[SourceId, Category]) -> Category | None:
    """Which of :func:`by_names_too` a ``category_id`` means."""
    written = known_id(value, found)
    if isinstance(written, str) and written not in found:
        written = plain_name(written)
    return None if written is None else found.get(written)


def plain_name(name: str) -> str:
    """A name as people compare it: without capitals, hyphens and underscores."""
    same = unicodedata.normalize("NFKC", name).casefold()
    return " ".join(same.replace("_", " ").replace("-", " ").split())


def category_names(categories: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """Names of categories, ``{"id", "name"}`` each, as caches, heads and pycocotools keep them."""
    return {int(c["id"]): str(c["name"]) for c in categories}
