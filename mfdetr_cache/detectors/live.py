"""An image as the detector sees it now, in the form in which a cache would hold it."""

import numpy as np
import torch
from PIL import Image

from mfdetr_cache.detectors.protocol import Detector
from mfdetr_cache.ops.quantisation import StoredMap
from mfdetr_cache.types import CachedImage, GroundTruth


def live_image(
    detector: Detector, image: Image.Image, name: str, device: torch.device
) -> CachedImage:
    """What a cache would hold of an image, computed now and not rounded.

    Args:
        detector: The frozen detector, on the device.
        image: An RGB image.
        name: Its file name.
        device: Where the detector is.

    Returns:
        The image without ground truth.
    """
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
