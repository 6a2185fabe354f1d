"""New annotations for the images of a cache, brought to its rows and views."""

from collections.abc import Mapping

from mfdetr_cache.cache.annotations import AnnotationContent
from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.coco.annotations import CocoSplit
from mfdetr_cache.coco.augmentation import transform_ground_truth
from mfdetr_cache.coco.image_list import ImageEntry
from mfdetr_cache.coco.labelled import LabelledSplit
from mfdetr_cache.errors import DatasetError
from mfdetr_cache.types import GroundTruth


def relabelled(cache: FeatureCache, labelled: LabelledSplit) -> tuple[AnnotationContent, int]:
    """The objects of an annotation file by row and view of a cache, as an extraction has them.

    Images that the file does not list have none. Also returns how many images are in both.
    DatasetError if there are none, or one has another size in the cache.
    """
    entries = _entries_of_rows(cache, labelled.split)
    originals = [labelled.objects_of(entries.get(row)) for row in range(cache.layout.num_rows)]

    def moved(view: str) -> list[GroundTruth]:
        return [
            transform_ground_truth(truth, cache.original_hw(row), cache.views[view].transform(row))
            for row, truth in enumerate(originals)
        ]

    objects = {view: moved(view) for view in cache.views}
    moved_ids = any(e.image_id != cache.image_id(row) for row, e in entries.items())
    header = labelled.header(renumbered=moved_ids)
    return AnnotationContent(*header, objects), len(entries)


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
