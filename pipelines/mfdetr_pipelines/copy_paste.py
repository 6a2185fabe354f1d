"""``mfdetr copy-paste``: a dataset with objects pasted onto its images, in COCO format."""

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from mfdetr_cache.coco.annotations import CocoSplit, load_coco_split, require_images
from mfdetr_cache.coco.copy_paste import (
    LEAST_PIXELS_TO_PASTE,
    Scene,
    can_be_pasted,
    copy_paste,
    num_donors,
)
from mfdetr_cache.coco.ids import SourceId
from mfdetr_cache.coco.image_list import ImageEntry
from mfdetr_cache.coco.json_file import read_json
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.errors import ConfigError, DatasetError
from mfdetr_cache.files import (
    PARTIAL,
    is_taken,
    make_folder,
    owned_results,
    write_atomically,
    writing,
)
from mfdetr_cache.ops.masks import (
    compress_run_lengths,
    decode_run_lengths,
    encode_mask,
    plain_rle,
)
from mfdetr_cache.reporter import Reporter
from mfdetr_pipelines.config.copy_paste import CopyPasteConfig

IMAGES, ANNOTATIONS = "images", "instances.json"
_PENDING = IMAGES + PARTIAL
# JPEG's own losses stay below those of COCO's images.
_QUALITY = 95


@dataclass(frozen=True, slots=True)
class CopyPasteSummary:
    """Folder and annotation file of the new dataset; ``num_images`` includes the originals."""

    images: Path
    annotations: Path
    num_images: int
    num_objects: int


def run_copy_paste(config: CopyPasteConfig, reporter: Reporter) -> CopyPasteSummary:
    """Write a dataset: every image unchanged, and copies with pasted objects.

    One that the same settings made of the same annotations, and of images of the same names and
    sizes in bytes, is left as it is. ConfigError if the number of copies is invalid or the folder
    in use, ImageError if an image is missing, DatasetError if the data cannot be used or has
    no object to paste, OutputError if the folder cannot be written.
    """
    files = config.files
    split = load_coco_split(files.annotations, files.images, on_bad=config.on_bad_annotation)
    split.tell_faults(reporter)
    require_images(files.images, split, "check --images")
    made_of = {
        "annotations": split.sha256,
        "images": _names_and_bytes(files.images, split),
        "copies": config.copies,
        "seed": config.seed,
    }
    made = _made_before(config.out, made_of)
    if made is None:
        _require_empty(config.out)
    elif (config.out / IMAGES).is_dir():
        return _summary(config.out, made)
    maker = _Maker(config, split)
    with owned_results(config.out):
        if made is None:
            _require_empty(config.out)
        return maker.write(made_of, reporter)


def _names_and_bytes(folder: Path, split: CocoSplit) -> str:
    """A hash of names and sizes in bytes: other images under the same annotations have others."""
    listed = "".join(
        f"{e.file_name}\0{(folder / e.file_name).stat().st_size}\n" for e in split.images
    )
    return sha256(listed.encode()).hexdigest()


def _made_before(out: Path, made_of: Mapping[str, Any]) -> dict[str, Any] | None:
    """The document of such a dataset; its images come last."""
    with contextlib.suppress(DatasetError):
        document = read_json(out / ANNOTATIONS, "annotation file", "").document
        if isinstance(document, dict) and document.get("info") == made_of:
            return document
    return None


def _summary(out: Path, document: Mapping[str, Any]) -> CopyPasteSummary:
    num_images, num_objects = len(document["images"]), len(document["annotations"])
    return CopyPasteSummary(out / IMAGES, out / ANNOTATIONS, num_images, num_objects)


def _require_empty(out: Path) -> None:
    if is_taken(out):
        raise ConfigError(f"{out} is no empty folder; nothing was touched, choose another --out")


class _Maker:
    def __init__(self, config: CopyPasteConfig, split: CocoSplit) -> None:
        self._config = config
        self._files = config.files
        self._split = split
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []
        self._taken = {_as_one_file(e.file_name) for e in split.images}
        self._written_category = {c.category_id: c.written_id for c in split.categories}
        written = [i for e in split.images for i in (e.image_id, e.written_id)]
        self._next_id = max(i for i in written if isinstance(i, int)) + 1
        self._donors = [e for e in split.images if self._gives(e)]
        if not self._donors:
            raise DatasetError(
                f"{self._files.annotations} has no object of {LEAST_PIXELS_TO_PASTE} pixels or "
                "more that is no crowd: nothing to paste"
            )

    def write(self, made_of: Mapping[str, Any], reporter: Reporter) -> CopyPasteSummary:
        out, copies, entries = self._config.out, self._config.copies, self._split.images
        pending = out / _PENDING
        with writing(pending):
            # What a call that was stopped left: other options may have made it.
            if pending.is_dir() and not pending.is_symlink():
                shutil.rmtree(pending)
            else:
                pending.unlink(missing_ok=True)
        make_folder(pending)
        document = {
            "info": made_of,
            "images": self._images,
            "annotations": self._annotations,
            "categories": [{"id": c.written_id, "name": c.name} for c in self._split.categories],
        }
        reporter.start("copy-paste", len(entries) * (1 + copies), "pictures")
        for entry in entries:
            for copy in range(copies + 1):
                self._paste(entry, copy) if copy else self._keep(entry)
                reporter.advance()
        reporter.finish()
        write_atomically(out / ANNOTATIONS, json.dumps(document).encode())
        with writing(out / IMAGES):
            pending.rename(out / IMAGES)
        return _summary(out, document)

    def _keep(self, entry: ImageEntry) -> None:
        """An image as it is."""
        target = self._config.out / _PENDING / entry.file_name
        make_folder(target.parent)
        with writing(target):
            shutil.copyfile(self._files.images / entry.file_name, target)
        self._add_image(entry.written_id, entry.file_name, entry.size_hw)
        for a in self._split.annotations[entry.image_id]:
            rle = compress_run_lengths(a.run_lengths, entry.size_hw)
            about = (a.category_id, a.is_crowd, a.area, a.box_xywh)
            self._add_object(entry.written_id, *about, rle)

    def _paste(self, entry: ImageEntry, copy: int) -> None:
        """An image with pasted objects; it depends on the seed and the arguments alone."""
        random = np.random.default_rng((self._config.seed, entry.image_id, copy))
        rows = random.integers(0, len(self._donors), num_donors(random))
        donors = [self._scene(self._donors[row]) for row in rows]
        made = copy_paste(self._scene(entry), donors, random)
        file_name = self._free_name(Path(entry.file_name), copy)
        target = self._config.out / _PENDING / file_name
        with writing(target):
            Image.fromarray(made.pixels).save(target, quality=_QUALITY)
        image_id = self._next_id
        self._next_id += 1
        self._add_image(image_id, file_name, made.size_hw)
        found = zip(made.masks, made.category_ids, made.is_crowd, made.num_pixels, strict=True)
        for mask, category_id, is_crowd, area in found:
            rle = encode_mask(mask)
            box_xywh = [int(v) for v in coco_mask.toBbox(rle)]
            self._add_object(image_id, int(category_id), is_crowd, int(area), box_xywh, rle)

    def _add_image(self, image_id: SourceId, file_name: str, size_hw: tuple[int, int]) -> None:
        height, width = size_hw
        about = {"id": image_id, "file_name": file_name, "height": height, "width": width}
        self._images.append(about)

    def _add_object(
        self,
        image_id: SourceId,
        category_id: int,
        is_crowd: bool,  # noqa: FBT001
        area: float,
        box_xywh: Sequence[float],
        rle: dict[str, Any],
    ) -> None:
        about = {
            "image_id": image_id,
            "category_id": self._written_category[category_id],
            "iscrowd": int(is_crowd),
            "area": area,
            "bbox": list(box_xywh),
            "segmentation": plain_rle(rle),
            "id": len(self._annotations) + 1,
        }
        self._annotations.append(about)

    def _free_name(self, original: Path, copy: int) -> str:
        """A file name that no other image has."""
        name = original.with_name(f"{original.stem}-pasted{copy}.jpg")
        while _as_one_file(str(name)) in self._taken:
            name = name.with_name(f"_{name.name}")
        self._taken.add(_as_one_file(str(name)))
        return str(name)

    def _gives(self, entry: ImageEntry) -> bool:
        truth = self._split.ground_truth(entry, {})
        pixels = [int(runs[1::2].sum(dtype=np.int64)) for runs in truth.run_lengths]
        return bool(can_be_pasted(np.array(pixels, np.int64), truth.is_crowd).any())

    def _scene(self, entry: ImageEntry) -> Scene:
        image = load_image(self._files.images / entry.file_name, entry.size_hw)
        truth = self._split.ground_truth(entry, {})
        masks = [decode_run_lengths(runs, entry.size_hw) for runs in truth.run_lengths]
        stacked = np.stack(masks) if masks else np.zeros((0, *entry.size_hw), np.bool_)
        return Scene(np.asarray(image), stacked, truth.category_ids, truth.is_crowd)


def _as_one_file(name: str) -> str:
    """The same for all names that may be one file: ``./a.JPG`` and, on some disks, ``a.jpg``."""
    return str(Path(name)).casefold()
