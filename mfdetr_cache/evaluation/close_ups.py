"""Close-ups of annotated objects, with the masks that several heads or tools give them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools.coco import COCO

from mfdetr_cache.evaluation.coco_metrics import Result
from mfdetr_cache.evaluation.overlay import PANEL_SIDE, OverlayItem, draw_overlay
from mfdetr_cache.ops.masks import RunLengths, crop_run_lengths, rle_iou, run_lengths_of_counts

# Photo around an object's box, as a share of the box on each side.
_MARGIN = 0.2
# Objects that every subject overlaps less than this are not found: that is the detector's doing.
_FOUND = 0.1
_COLOUR = 1


@dataclass(frozen=True, slots=True)
class CloseUp:
    """An annotated object and the mask that overlaps it most, of every subject.

    Sizes and boxes are in pixels of the image.

    Attributes:
        annotation: Its annotated mask.
        masks: The subjects' masks; None for a subject without any in this image and category.
        ious: Their IoU with the annotation, shape (subjects,).
    """

    image_id: int
    size_hw: tuple[int, int]
    category_id: int
    box_xywh: tuple[float, float, float, float]
    annotation: RunLengths
    masks: tuple[RunLengths | None, ...]
    ious: NDArray[np.float64]

    def panels(self, image: Image.Image, names: Sequence[str]) -> list[tuple[str, Image.Image]]:
        """The photo around the object, alone, with the annotation and with each subject's mask."""
        x, y, width, height = self.box_xywh
        dx, dy = _MARGIN * width + 2, _MARGIN * height + 2
        window_xyxy = (
            max(0, round(x - dx)),
            max(0, round(y - dy)),
            min(image.width, round(x + width + dx)),
            min(image.height, round(y + height + dy)),
        )
        photo = image.crop(window_xyxy)

        def drawn(mask: RunLengths | None) -> Image.Image:
            shown = None if mask is None else crop_run_lengths(mask, self.size_hw, window_xyxy)
            return draw_overlay(photo, [OverlayItem("", None, shown, _COLOUR)], PANEL_SIDE)

        subjects = zip(names, self.ious, self.masks, strict=True)
        return [
            ("image", draw_overlay(photo, [], PANEL_SIDE)),
            ("annotation", drawn(self.annotation)),
            *((f"{name}, IoU {100 * iou:.0f}", drawn(mask)) for name, iou, mask in subjects),
        ]


def close_ups(ground_truth: COCO, subjects: Sequence[Sequence[Result]]) -> list[CloseUp]:
    """Every annotated object that some subject finds; no crowds, none without a mask.

    ``subjects`` are the COCO mask results of each, RLE.
    """
    results: list[dict[tuple[int, int], list[dict[str, object]]]] = []
    for subject in subjects:
        by_place = defaultdict(list)
        for result in subject:
            by_place[result["image_id"], result["category_id"]].append(result["segmentation"])
        results.append(by_place)
    found = []
    for annotation in ground_truth.dataset["annotations"]:
        if annotation["iscrowd"] or "segmentation" not in annotation:
            continue
        of_image = ground_truth.imgs[annotation["image_id"]]
        size_hw = (int(of_image["height"]), int(of_image["width"]))
        place = (annotation["image_id"], annotation["category_id"])
        best = [_best(annotation["segmentation"], of[place], size_hw) for of in results]
        ious = np.array([iou for iou, _ in best])
        if ious.max() >= _FOUND:
            x, y, width, height = annotation["bbox"]
            found.append(
                CloseUp(
                    image_id=place[0],
                    size_hw=size_hw,
                    category_id=place[1],
                    box_xywh=(x, y, width, height),
                    annotation=run_lengths_of_counts(annotation["segmentation"]["counts"], size_hw),
                    masks=tuple(mask for _, mask in best),
                    ious=ious,
                )
            )
    return found


def _best(
    annotated: dict[str, object], masks: Sequence[dict[str, object]], size_hw: tuple[int, int]
) -> tuple[float, RunLengths | None]:
    """The highest IoU of masks with an annotated one, and its mask; 0 and None without any."""
    if not masks:
        return 0.0, None
    iou = rle_iou(masks, [annotated])[:, 0]
    index = int(iou.argmax())
    return float(iou[index]), run_lengths_of_counts(masks[index]["counts"], size_hw)


def selections(objects: Sequence[CloseUp], count: int) -> dict[str, list[CloseUp]]:
    """At most ``count`` objects under each heading, none twice: see the headings."""
    by_difference = sorted(objects, key=lambda o: float(np.ptp(o.ious)), reverse=True)
    by_quality = sorted(objects, key=lambda o: float(o.ious.mean()))
    steps = np.linspace(0, len(objects) - 1, min(count, len(objects)))
    wanted = {
        "Where they differ most": by_difference,
        "Worst of all that are found": by_quality,
        "From the worst to the best, evenly": [by_quality[round(step)] for step in steps],
    }
    chosen: dict[str, list[CloseUp]] = {}
    taken: set[int] = set()
    for heading, candidates in wanted.items():
        fresh = [o for o in candidates if id(o) not in taken][:count]
        taken |= {id(o) for o in fresh}
        chosen[heading] = fresh
    return chosen
