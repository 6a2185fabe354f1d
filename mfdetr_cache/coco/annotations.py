"""One split of a COCO-format dataset: its images, its categories and its ground truth."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mfdetr_cache.errors import DatasetError
from mfdetr_cache.ops.masks import RunLengths, run_lengths_of_segmentation
from mfdetr_cache.types import GroundTruth


@dataclass(frozen=True, slots=True)
class Category:
    """A COCO category.

    Attributes:
        category_id: Its id in the annotation file; ids may have gaps.
        name: Its name.
    """

    category_id: int
    name: str


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """An image as the annotation file lists it.

    Attributes:
        image_id: COCO image id.
        file_name: Relative to the image folder.
        size_hw: Height and width in pixels.
    """

    image_id: int
    file_name: str
    size_hw: tuple[int, int]


@dataclass(frozen=True)
class CocoSplit:
    """The annotation file of one split, checked.

    Attributes:
        name: File name without folder and ending, such as ``instances_val2017``.
        sha256: Hash of the file's bytes.
        images: In the order of the file.
        categories: In the order of the file.
        annotations: Image id to its raw annotation dictionaries.
    """

    name: str
    sha256: str
    images: tuple[ImageEntry, ...]
    categories: tuple[Category, ...]
    annotations: dict[int, list[dict[str, Any]]]

    def first(self, limit: int | None) -> "CocoSplit":
        """The same split with the first ``limit`` images only.

        Args:
            limit: How many images to keep; None keeps all.

        Returns:
            A split over the same file.
        """
        if limit is None:
            return self
        images = self.images[:limit]
        kept = {e.image_id: self.annotations[e.image_id] for e in images}
        return CocoSplit(self.name, self.sha256, images, self.categories, kept)

    def ground_truth(self, entry: ImageEntry, label_of_category: dict[int, int]) -> GroundTruth:
        """The objects of one image, masks as run lengths.

        Args:
            entry: One of ``images``.
            label_of_category: The detector's label of each category id; a category without one
                gets label -1.

        Returns:
            The objects in the order of the file.

        Raises:
            DatasetError: If a segmentation or a box is malformed.
        """
        raw = self.annotations[entry.image_id]
        boxes = np.zeros((len(raw), 4), dtype=np.float32)
        runs: list[RunLengths] = []
        for index, annotation in enumerate(raw):
            where = f"{self.name}: annotation {annotation['id']} of image {entry.image_id}"
            try:
                x, y, w, h = (float(v) for v in annotation["bbox"])
                runs.append(run_lengths_of_segmentation(annotation["segmentation"], entry.size_hw))
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise DatasetError(
                    f"{where} has no usable bbox and segmentation ({error})"
                ) from error
            boxes[index] = (x, y, x + w, y + h)
        categories = np.array([a["category_id"] for a in raw], dtype=np.int64)
        return GroundTruth(
            annotation_ids=np.array([a["id"] for a in raw], dtype=np.int64),
            category_ids=categories,
            labels=np.array(
                [label_of_category.get(int(c), -1) for c in categories], dtype=np.int64
            ),
            boxes_xyxy=boxes,
            areas=np.array([a["area"] for a in raw], dtype=np.float64),
            is_crowd=np.array([bool(a.get("iscrowd", 0)) for a in raw], dtype=np.bool_),
            run_lengths=tuple(runs),
        )


def load_coco_split(path: Path) -> CocoSplit:
    """Read and check a COCO ``instances`` file.

    Args:
        path: The JSON file.

    Returns:
        The split.

    Raises:
        DatasetError: If the file is missing, is no COCO instances file, lists no image, has no
            annotation, or refers to an unknown image or category.
    """
    if not path.is_file():
        raise DatasetError(f"annotation file {path} does not exist; pass a COCO instances JSON")
    data = path.read_bytes()
    try:
        document = json.loads(data)
    except ValueError as error:
        raise DatasetError(f"annotation file {path} is not JSON ({error})") from error
    if not isinstance(document, dict):
        raise DatasetError(f"annotation file {path} holds no COCO document (no images)")
    for key in ("images", "annotations", "categories"):
        if not isinstance(document.get(key), list):
            raise DatasetError(f"annotation file {path} has no list {key!r}; is it COCO instances?")
        if not document[key]:
            raise DatasetError(f"annotation file {path} has an empty list {key!r}: nothing to do")
    try:
        images = tuple(
            ImageEntry(int(i["id"]), str(i["file_name"]), (int(i["height"]), int(i["width"])))
            for i in document["images"]
        )
        categories = tuple(Category(int(c["id"]), str(c["name"])) for c in document["categories"])
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"annotation file {path}: an image or category lacks {error}") from error
    grouped = _group_annotations(path, document["annotations"], images, categories)
    sha256 = hashlib.sha256(data).hexdigest()
    return CocoSplit(path.stem, sha256, images, categories, grouped)


def _group_annotations(
    path: Path,
    annotations: list[dict[str, Any]],
    images: tuple[ImageEntry, ...],
    categories: tuple[Category, ...],
) -> dict[int, list[dict[str, Any]]]:
    grouped: dict[int, list[dict[str, Any]]] = {e.image_id: [] for e in images}
    if len(grouped) != len(images):
        raise DatasetError(f"annotation file {path} lists an image id twice")
    known = {c.category_id for c in categories}
    for annotation in annotations:
        try:
            number, image_id = annotation["id"], annotation["image_id"]
            category_id = annotation["category_id"]
            float(annotation["area"])
        except (KeyError, TypeError, ValueError) as error:
            raise DatasetError(f"annotation file {path}: an annotation lacks {error}") from error
        if image_id not in grouped:
            raise DatasetError(
                f"annotation file {path}: annotation {number} is of image {image_id}, "
                "which is not in its list of images"
            )
        if category_id not in known:
            raise DatasetError(
                f"annotation file {path}: annotation {number} has category_id {category_id}, "
                "which is not in its list of categories"
            )
        grouped[image_id].append(annotation)
    return grouped
