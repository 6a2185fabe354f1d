"""The objects found in an image, in the forms that other tools take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mfdetr_cache.errors import ConfigError
from mfdetr_cache.evaluation.inference import MaskPrediction
from mfdetr_cache.evaluation.overlay import OverlayItem, draw_overlay
from mfdetr_cache.ops.masks import RunLengths, compress_run_lengths, decode_run_lengths, plain_rle
from mfdetr_cache.ops.masks_pasting import paste_probabilities_in_image, run_lengths_in_box


@dataclass(frozen=True)
class Segmentation:
    """The objects of one image, by falling score.

    Attributes:
        size_hw: Height and width of the image in pixels.
        run_lengths: Mask of each object on the image, length N.
        boxes_xyxy: In pixels of the image, float32, shape (N, 4).
        scores: Final scores s_i in [0, 1], float32, shape (N,).
        category_ids: Of the dataset the head was trained on, int64, shape (N,).
        names: Category names, length N.
        mask_probs: Probability of each object's mask over its box, float32, length N of (r, r).
    """

    size_hw: tuple[int, int]
    run_lengths: tuple[RunLengths, ...]
    boxes_xyxy: NDArray[np.float32]
    scores: NDArray[np.float32]
    category_ids: NDArray[np.int64]
    names: tuple[str, ...]
    mask_probs: tuple[NDArray[np.float32], ...]

    @classmethod
    def of(
        cls,
        prediction: MaskPrediction,
        label_categories: Sequence[int],
        names: Mapping[int, str],
        size_hw: tuple[int, int],
        threshold: float,
        top_k: int = 100,
    ) -> "Segmentation":
        """The best label of every query, from ``threshold`` on; at most ``top_k`` objects.

        ``label_categories`` are the category ids of each label, -1 for none.
        """
        categories = [label_categories[label] for label in prediction.detections.labels.tolist()]
        masks = prediction.mask_index.tolist()
        chosen: dict[int, int] = {}  # mask to detection
        for index in np.argsort(-prediction.confidences, kind="stable").tolist():
            if prediction.confidences[index] < threshold or len(chosen) == top_k:
                break
            if categories[index] >= 0:
                chosen.setdefault(masks[index], index)
        boxes = prediction.boxes_xyxy.double().numpy()[list(chosen)]
        probs = tuple(prediction.mask_probs.numpy()[list(chosen)])
        category_ids = [categories[index] for index in chosen.values()]
        return cls(
            size_hw,
            tuple(run_lengths_in_box(p, b, size_hw) for p, b in zip(probs, boxes, strict=True)),
            boxes.astype(np.float32),
            prediction.confidences[list(chosen.values())].astype(np.float32),
            np.array(category_ids, np.int64),
            tuple(names.get(c, str(c)) for c in category_ids),
            probs,
        )

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        """A line for each object: name, score, box and size of the mask in pixels."""
        height, width = self.size_hw
        longest = max(map(len, self.names), default=0)
        lines = [f"{len(self)} objects in {width} x {height} pixels"]
        each = zip(self.names, self.scores, self.boxes_xyxy, self.run_lengths, strict=True)
        for name, score, box_xyxy, runs in each:
            box = " ".join(f"{v:.0f}" for v in box_xyxy)
            pixels = int(runs[1::2].sum())
            lines.append(f"{name:{longest}}  {score:.2f}  box {box}  mask {pixels} px")
        return "\n".join(lines)

    @property
    def masks(self) -> NDArray[np.bool_]:
        """True inside, at the image's size, shape (N, H, W); made anew at every call."""
        masks = np.empty((len(self), *self.size_hw), np.bool_)
        for mask, runs in zip(masks, self.run_lengths, strict=True):
            mask[:] = decode_run_lengths(runs, self.size_hw)
        return masks

    def probabilities(self, index: int) -> NDArray[np.uint8]:
        """How probable an object's mask is, 255 for certain, at the image's size, shape (H, W).

        The mask is where it is 128 or more; outside the object's box it is 0.
        """
        box = self.boxes_xyxy[index].astype(np.float64)
        return paste_probabilities_in_image(self.mask_probs[index], box, self.size_hw)

    def overlay(self) -> list[OverlayItem]:
        """Mask, box, and name with score of each object, the best one last, on top."""
        each = zip(self.names, self.scores, self.boxes_xyxy.tolist(), self.run_lengths, strict=True)
        items = [OverlayItem(f"{name} {score:.2f}", box, runs) for name, score, box, runs in each]
        return items[::-1]

    def draw(self, image: Image.Image) -> Image.Image:
        """A copy of the image with masks, outlines, boxes and labels."""
        return draw_overlay(image, self.overlay())

    def to_torchvision(self) -> dict[str, torch.Tensor]:
        """Torchvision's form: boxes (N, 4), labels (N,), scores (N,), binary masks (N, 1, H, W)."""
        return {
            "boxes": torch.from_numpy(self.boxes_xyxy),
            "labels": torch.from_numpy(self.category_ids),
            "scores": torch.from_numpy(self.scores),
            "masks": torch.from_numpy(self.masks[:, None].astype(np.float32)),
        }

    def to_supervision(self) -> Any:  # noqa: ANN401  an optional package
        """``supervision.Detections`` with masks and ``data["class_name"]``.

        ConfigError if the package ``supervision`` is not installed.
        """
        try:
            import supervision
        except ImportError:
            raise ConfigError("to_supervision needs: pip install supervision") from None
        return supervision.Detections(
            xyxy=self.boxes_xyxy,
            mask=self.masks,
            confidence=self.scores,
            class_id=self.category_ids.astype(int),
            data={"class_name": np.array(self.names)},
        )

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """COCO results, one per object, masks as compressed RLE."""
        results = []
        for index, runs in enumerate(self.run_lengths):
            x0, y0, x1, y1 = self.boxes_xyxy[index].tolist()
            results.append(
                {
                    "image_id": image_id,
                    "category_id": int(self.category_ids[index]),
                    "score": float(self.scores[index]),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "segmentation": plain_rle(compress_run_lengths(runs, self.size_hw)),
                }
            )
        return results


@dataclass(frozen=True, slots=True)
class TimedSegmentation:
    """The segmentation of a picture, RGB, with the seconds in detector and mask network."""

    picture: Image.Image
    result: Segmentation
    detector_seconds: float
    head_seconds: float
