"""Rows of a cache through its detector again, as they were extracted."""

from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.schema import BASE_VIEW
from mfdetr_cache.coco.augmentation import transform_image
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.detectors.protocol import Detector
from mfdetr_cache.detectors.registry import load_same_detector
from mfdetr_cache.errors import ImageError
from mfdetr_cache.extraction.batches import batches_of_part
from mfdetr_cache.identity import detector_identity
from mfdetr_cache.ops.devices import to_device
from mfdetr_cache.types import DetectorOutput


def detector_of_cache(cache: FeatureCache, weights: str, device: torch.device) -> Detector:
    """The detector that a cache was made with; IdentityError if ``weights`` are of another one."""
    identity = detector_identity(cache.spec)
    detector = load_same_detector(cache.spec.detector, weights, identity, f"cache {cache.path}")
    return detector.to(device)


def extract_again(
    cache: FeatureCache,
    detector: Detector,
    view: str,
    rows: Collection[int],
    images: Path,
    device: torch.device,
) -> Iterator[tuple[int, DetectorOutput]]:
    """Run the detector on rows in the batches that extraction made of their parts.

    On one kind of device the numbers are those of the extraction, to the bit. Yields each row
    with its output, a batch of one; ImageError if the image of a row cannot be read.
    """
    layout = cache.layout
    for number in sorted({row // layout.images_per_part for row in rows}):
        part = layout.rows_of_part(number)
        transforms = [cache.views[view].transform(row) for row in part]
        inputs_hw = [
            detector.input_geometry(t.size_hw, t.shortest_edge).input_hw for t in transforms
        ]
        for batch in batches_of_part(part, inputs_hw, device):
            wanted = [row for row in batch if row in rows]
            if not wanted:
                continue
            pixels = []
            for row in batch:
                try:
                    pixels.append(input_of_row(cache, detector, row, images, view))
                except ImageError:
                    if row in wanted:
                        raise
                    # As in the extraction: a black image keeps the place of one that is left out.
                    pixels.append(torch.zeros(3, *inputs_hw[row - part.start]))
            output = detector.forward(to_device(torch.stack(pixels), device))
            for row in wanted:
                yield row, output.of_image(batch.index(row))


def input_of_row(
    cache: FeatureCache, detector: Detector, row: int, images: Path, view: str = BASE_VIEW
) -> Tensor:
    """The detector's input for a row, shape (3, H, W); ImageError if its image cannot be read."""
    image = load_image(images / cache.file_name(row), cache.original_hw(row))
    transform = cache.views[view].transform(row)
    return detector.preprocess(transform_image(image, transform), transform.shortest_edge)
