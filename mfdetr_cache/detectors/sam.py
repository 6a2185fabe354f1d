"""Segment Anything of transformers, prompted with boxes: an untrained baseline."""

from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image

from mfdetr_cache.errors import DetectorError


class SamPrompter:
    """SAM, SAM 2 or HQ-SAM from a folder or hub id; DetectorError if it cannot be loaded."""

    def __init__(self, weights: str, device: torch.device) -> None:
        try:
            self._processor: Any = transformers.AutoProcessor.from_pretrained(
                weights, trust_remote_code=False
            )
            model: Any = transformers.AutoModelForMaskGeneration.from_pretrained(
                weights, trust_remote_code=False
            )
        except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise DetectorError(f"cannot load SAM from {weights}: {reason}") from error
        self._model = model.to(device).eval()
        self._device = device

    @torch.no_grad()
    def __call__(
        self, image: Image.Image, boxes_xyxy: NDArray[np.float32]
    ) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """Masks (N, H, W) at the size of an RGB image, and SAM's predicted IoU, (N,).

        The boxes, (N, 4), N >= 1, are in pixels of the image, which is encoded once.
        """
        inputs = self._processor(
            images=image, input_boxes=[boxes_xyxy.tolist()], return_tensors="pt"
        )
        sizes = {k: inputs[k] for k in ("original_sizes", "reshaped_input_sizes") if k in inputs}
        accepted = {k: v.to(self._device) for k, v in inputs.items() if k not in sizes}
        output = self._model(**accepted, multimask_output=False)
        masks = self._processor.post_process_masks(output.pred_masks.cpu(), **sizes)[0]
        found = np.asarray(masks[:, 0]).astype(np.bool_)
        return found, output.iou_scores.cpu().double().numpy().reshape(-1)
