"""One split of a COCO-format dataset: its images, its categories and its ground truth."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from mfdetr_cache.choices import OnBad
from mfdetr_cache.coco.faults import Faults, keys_of, short
from mfdetr_cache.coco.formats import told_of_format
from mfdetr_cache.coco.ids import SourceId, images_by_name, source_id
from mfdetr_cache.coco.image_list import Category, ImageEntry, read_categories, read_images
from mfdetr_cache.coco.json_file import read_json
from mfdetr_cache.coco.layouts import DatasetFiles, yaml_and_split
from mfdetr_cache.coco.objects import Annotation, read_annotations
from mfdetr_cache.coco.yolo import read_yolo
from mfdetr_cache.errors import DatasetError, ImageError
from mfdetr_cache.reporter import Reporter
from mfdetr_cache.types import GroundTruth

_UNANNOTATED = " (Test images come without: nothing can be learned or measured with them.)"


@dataclass(frozen=True)
class CocoSplit:
    """The annotation file of one split, checked; everything is in the order of the file.

    Attributes:
        name: File name without folder and ending, such as ``instances_val2017``.
        sha256: Hash of the file's bytes.
        annotations: Image id to its annotations.
        faults: What was left out or repaired, of images and of annotations.
    """

    name: str
    sha256: str
    images: tuple[ImageEntry, ...]
    categories: tuple[Category, ...]
    annotations: dict[int, list[Annotation]]
    faults: tuple[Faults, ...] = field(default=(), compare=False)

    def tell_faults(self, reporter: Reporter) -> None:
        """Warn of everything that was left out or repaired."""
        for faults in self.faults:
            faults.tell(reporter)

    def tell_missing_masks(self, reporter: Reporter) -> None:
        """Warn of what nothing can be learned from."""
        masks = [len(a.run_lengths) > 0 for found in self.annotations.values() for a in found]
        if not all(masks):
            reporter.warn(
                f"{masks.count(False)} of {len(masks)} annotations of {self.name} have a box only: "
                "they do not count for masks, and nothing learns from them"
            )
        if not masks:
            reporter.warn(f"{self.name} has no annotations: nothing can be learned or measured yet")

    def objects_per_category(self) -> Counter[int]:
        """Category id to its annotated objects, crowds among them."""
        return Counter(a.category_id for found in self.annotations.values() for a in found)

    @property
    def plain_categories(self) -> list[dict[str, Any]]:
        """``{"id", "name"}`` of each category."""
        return [{"id": c.category_id, "name": c.name} for c in self.categories]

    def ground_truth(
        self, entry: ImageEntry | None, label_of_category: Mapping[int, int]
    ) -> GroundTruth:
        """The objects of one image in the order of the file; no run lengths stand for no mask.

        None are of an image that is not listed. A category without a label of the detector gets
        label -1.
        """
        annotations = [] if entry is None else self.annotations[entry.image_id]
        boxes = np.array([a.box_xywh for a in annotations], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return GroundTruth(
            annotation_ids=np.array([a.annotation_id for a in annotations], dtype=np.int64),
            category_ids=np.array([a.category_id for a in annotations], dtype=np.int64),
            labels=np.array(
                [label_of_category.get(a.category_id, -1) for a in annotations], dtype=np.int64
            ),
            boxes_xyxy=boxes.astype(np.float32),
            areas=np.array([a.area for a in annotations], dtype=np.float64),
            is_crowd=np.array([a.is_crowd for a in annotations], dtype=np.bool_),
            run_lengths=tuple(a.run_lengths for a in annotations),
        )


def require_images(folder: Path, split: CocoSplit, advice: str) -> None:
    """Refuse at once what would otherwise be noticed after hours.

    DatasetError if there is no such folder, ImageError if an image is missing.
    """
    if not folder.is_dir():
        raise DatasetError(f"image folder {folder} does not exist; {advice}")
    missing = [e for e in split.images if not (folder / e.file_name).is_file()]
    if missing:
        name = missing[0].file_name
        below = next(folder.rglob(escape(PurePosixPath(name.replace("\\", "/")).name)), None)
        raise ImageError(
            f"{len(missing)} of {len(split.images)} images are not in {folder}, the first is "
            f"{name}{f' ({below} is there)' if below else ''}; {advice}"
        )


def load_to_extract(files: DatasetFiles, on_bad: OnBad, limit: int | None) -> CocoSplit:
    """What features can be extracted of: also images with boxes only, or with nothing yet.

    Raises DatasetError as :func:`load_coco_split`, and if there is no image folder.
    """
    if not files.images.is_dir():
        raise DatasetError(f"image folder {files.images} does not exist; check --images")
    return load_coco_split(
        files.annotations, files.images, on_bad=on_bad, limit=limit, needs="nothing"
    )


def load_coco_split(
    path: Path,
    images: Path | None = None,
    *,
    on_bad: OnBad = "stop",
    limit: int | None = None,
    needs: Literal["masks", "boxes", "nothing"] = "masks",
) -> CocoSplit:
    """Read and check a COCO ``instances`` file, plain or packed; or ``data.yaml`` in YOLO's layout.

    Nothing of it reaches pycocotools unchecked. Ids of any form become whole numbers; those of the
    file stay where they are such numbers and each is used once. DatasetError if the file is
    missing, is no COCO instances file, lists no image, has no annotation, or has something that
    cannot be used.

    Args:
        path: The file; behind ``data.yaml`` may stand the split, as in ``data.yaml:train``.
        images: Image folder: names are looked up there, and sizes that the file lacks are read.
        on_bad: Refuse the file when an image or annotation cannot be used, or leave these out.
        limit: Only the first so many images; what is wrong with others is not looked at.
        needs: What annotations must have; ``nothing`` if there may be none, as in COCO's test-dev.
    """
    is_yolo = yaml_and_split(path)[0].suffix in (".yaml", ".yml")
    if is_yolo:
        file = read_yolo(path, images)
    else:
        file = read_json(path, "annotation file", "pass a COCO instances JSON")
    document = _checked(file.document, path, unannotated=needs == "nothing")
    # Roboflow's files all have one name; their folder has that of the split.
    name = path.parent.name if file.name.startswith("_annotations") else file.name
    faults = Faults(str(path), "image", total=len(document["images"]))
    listed = read_images(path, document["images"], images, faults, limit)
    categories = read_categories(path, document["categories"])
    faults.stop_if_unusable(on_bad)
    if not listed:
        raise DatasetError(f"annotation file {path} has no image that can be used")
    of_annotations = Faults(str(path), "annotation")
    annotations = read_annotations(
        document["annotations"],
        listed,
        _by_names(document),
        categories,
        of_annotations,
        needs_mask=needs == "masks",
    )
    of_annotations.stop_if_unusable(on_bad)
    if is_yolo:
        of_annotations.repaired.clear()  # the layout has no boxes beside polygons, and no areas
    grouped: dict[int, list[Annotation]] = {e.image_id: [] for e in listed.values()}
    for annotation in annotations:
        grouped[annotation.image_id].append(annotation)
    return CocoSplit(
        name,
        file.sha256,
        tuple(listed.values()),
        tuple(categories.values()),
        grouped,
        (faults, of_annotations),
    )


def _by_names(document: Mapping[str, Any]) -> Mapping[SourceId, SourceId]:
    """The ids of all images of a document, by what its annotations may call them."""
    listed = [
        (written, image)
        for image in document["images"]
        if isinstance(image, dict) and (written := source_id(image.get("id"))) is not None
    ]
    wanted = {source_id(a.get("image_id")) for a in document["annotations"] if isinstance(a, dict)}
    files = ((n, i) for i, image in listed if isinstance(n := image.get("file_name"), str))
    return images_by_name({i: i for i, _ in listed}, files, wanted)


def _checked(document: object, path: Path, *, unannotated: bool) -> dict[str, Any]:
    """A document as COCO instances; there may be no annotations if ``unannotated``."""
    required = ["images", "annotations", "categories"]
    if unannotated and isinstance(document, dict) and not document.get("annotations"):
        required.remove("annotations")
    whole = isinstance(document, dict) and all(isinstance(document.get(k), list) for k in required)
    if not whole and (told := told_of_format(document)):
        raise DatasetError(f"annotation file {path} {told}")
    if not isinstance(document, dict):
        what = short(document)
        if isinstance(document, list):
            first = document[0] if document else None
            what = "a list, as results are"
            what += f" (its first entry has {keys_of(first)})" if isinstance(first, dict) else ""
        raise DatasetError(
            f"annotation file {path} holds {what}; COCO instances are an object with the lists "
            "images, annotations and categories"
        )
    for key in required:
        if not isinstance(document.get(key), list):
            raise DatasetError(
                f"annotation file {path} has no list {key!r}, but "
                f"{short(document[key]) if key in document else keys_of(document)}; is it COCO "
                f"instances?{_UNANNOTATED if key == 'annotations' else ''}"
            )
        if not document[key]:
            raise DatasetError(f"annotation file {path} has an empty list {key!r}: nothing to do")
    document = {**document, "annotations": document.get("annotations") or []}
    first = next(iter(document["annotations"]), None)
    if isinstance(first, dict) and "segments_info" in first:
        raise DatasetError(f"annotation file {path} is a panoptic one; pass COCO instances")
    return document
