"""New annotations for the images of a cache, brought to its rows and views."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mfdetr_cache.cache.annotations import AnnotationContent
from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.coco.annotations import CocoSplit
from mfdetr_cache.coco.augmentation import transform_ground_truth
from mfdetr_cache.coco.image_list import ImageEntry
from mfdetr_cache.coco.labelled import LabelledSplit
from mfdetr_cache.errors import DatasetError
from mfdetr_cache.types import GroundTruth

_NOTHING = GroundTruth(
    annotation_ids=np.zeros(0, np.int64),
    category_ids=np.zeros(0, np.int64),
    labels=np.zeros(0, np.int64),
    boxes_xyxy=np.zeros((0, 4), np.float32),
    areas=np.zeros(0, np.float64),
    is_crowd=np.zeros(0, np.bool_),
    run_lengths=(),
)


@dataclass(frozen=True, slots=True)
class Relabelling:
    """Annotations for a cache.

    ``unlisted`` images of the cache are not in the file and have no objects; ``unused`` images
    of the file are not in the cache.
    """

    content: AnnotationContent
    unlisted: int
    unused: int


def relabelling(cache: FeatureCache, labelled: LabelledSplit) -> Relabelling:
    """Bring the objects of an annotation file to the rows and views of a cache.

    A new extraction would hold the same. DatasetError if none of its images is in the cache, or
    one has another size there.
    """
    split = labelled.split
    entries = _entries_of_rows(cache, split)
    originals = [
        _NOTHING if (entry := entries.get(row)) is None else labelled.objects_of(entry)
        for row in range(cache.layout.num_rows)
    ]

    def moved(view: str) -> list[GroundTruth]:
        return [
            transform_ground_truth(truth, cache.original_hw(row), cache.views[view].transform(row))
            for row, truth in enumerate(originals)
        ]

    content = AnnotationContent(
        source=labelled.source,
        categories=[{"id": c.category_id, "name": c.name} for c in split.categories],
        label_categories=labelled.match.label_categories,
        objects={view: moved(view) for view in cache.views},
    )
    rows, images = cache.layout.num_rows, len(split.images)
    return Relabelling(content, rows - len(entries), images - len(entries))


def _entries_of_rows(cache: FeatureCache, split: CocoSplit) -> Mapping[int, ImageEntry]:
    """Images of the file by row: by their names, or by their ids where no name is in both."""
    by_name = {entry.file_name: entry for entry in split.images}
    rows = range(cache.layout.num_rows)
    entry_of_row = {row: e for row in rows if (e := by_name.get(cache.file_name(row)))}
    if not entry_of_row:
        by_id = {entry.image_id: entry for entry in split.images}
        entry_of_row = {row: e for row in rows if (e := by_id.get(cache.image_id(row)))}
    if not entry_of_row:
        raise DatasetError(
            f"{split.name} lists no image of {cache.path} by name or id; its first is "
            f"{split.images[0].file_name}, that of the cache {cache.file_name(0)}"
        )
    for row, entry in entry_of_row.items():
        if entry.size_hw != cache.original_hw(row):
            raise DatasetError(
                f"{split.name}: {entry.file_name} is {entry.size_hw[1]} x {entry.size_hw[0]} and "
                f"{cache.original_hw(row)[1]} x {cache.original_hw(row)[0]} in {cache.path}: "
                "another image; extract it again"
            )
    return entry_of_row
