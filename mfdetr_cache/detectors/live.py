"""A live detector: its output in the form of a cached image, and its own masks."""

import numpy as np
import torch
from PIL import Image

from mfdetr_cache.detectors.amp import AmpDetector
from mfdetr_cache.detectors.class_agnostic import ClassAgnosticDetector
from mfdetr_cache.detectors.protocol import Detector, MaskingDetector
from mfdetr_cache.ops.quantisation import StoredMap
from mfdetr_cache.types import CachedImage, GroundTruth


def with_own_masks(detector: Detector) -> MaskingDetector | None:
    """The detector inside of its wrappers, if it gives masks itself."""
    inner: object = detector
    while isinstance(inner, (AmpDetector, ClassAgnosticDetector)):
        inner = inner.detector
    return inner if isinstance(inner, MaskingDetector) else None


def live_image(
    detector: Detector, image: Image.Image, name: str, device: torch.device
) -> CachedImage:
    """The :class:`CachedImage` of an RGB image, computed now, not rounded, without ground truth."""
    size_hw = (image.height, image.width)
    output = detector.forward(detector.preprocess(image)[None].to(device)).cpu()
    return CachedImage(
        row=0,
        image_id=0,
        file_name=name,
        geometry=detector.input_geometry(size_hw),
        class_logits=output.class_logits[0].numpy(),
        boxes_cxcywh_norm=output.boxes_cxcywh_norm[0].numpy(),
        queries=output.queries[0].numpy(),
        maps={k: StoredMap.plain(v[0].permute(1, 2, 0).numpy()) for k, v in output.maps.items()},
        ground_truth=GroundTruth(
            annotation_ids=np.zeros(0, np.int64),
            category_ids=np.zeros(0, np.int64),
            labels=np.zeros(0, np.int64),
            boxes_xyxy=np.zeros((0, 4), np.float32),
            areas=np.zeros(0, np.float64),
            is_crowd=np.zeros(0, np.bool_),
            run_lengths=(),
        ),
    )
