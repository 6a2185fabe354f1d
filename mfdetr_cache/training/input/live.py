"""Images for training without a cache: decoded, transformed and annotated anew for every step."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mfdetr_cache.choices import Policy
from mfdetr_cache.coco.annotations import CocoSplit
from mfdetr_cache.coco.augmentation import (
    identity_transform,
    sample_transform,
    transform_ground_truth,
    transform_image,
)
from mfdetr_cache.coco.categories import categories_of_labels
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.detectors.protocol import Detector, fixed_input_hw
from mfdetr_cache.errors import TrainingError
from mfdetr_cache.matching.objects import object_masks, trainable_objects
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.rows import kept_rows
from mfdetr_cache.types import GroundTruth, ImageGeometry


@dataclass(frozen=True, slots=True)
class Picture:
    """An image as one step shows it.

    Attributes:
        image_id: COCO image id.
        file_name: Relative to the image folder.
        row: Place in the split.
        pixel_values: The network's input, float32, shape (3, H, W).
        geometry: Sizes of picture and input.
        truth: What is in the picture, in its own pixels.
    """

    image_id: int
    file_name: str
    row: int
    pixel_values: Tensor
    geometry: ImageGeometry
    truth: GroundTruth


class LiveData:
    """The images of a split that have something to learn from.

    Args:
        split: The split.
        images: Its image folder.
        detector: Says how an image becomes its input.
        train: Which annotations may be seen.
        augment: Show every image in another way in every epoch; None shows it as it is.

    Attributes:
        rows: Places in the split, in rising order.
        label_categories: Category id of every label of the detector, -1 where there is none.

    Raises:
        DatasetError: If the detector's labels and the dataset's categories have nothing in common.
        TrainingError: If there is nothing to learn from.
    """

    def __init__(
        self,
        split: CocoSplit,
        images: Path,
        detector: Detector,
        train: TrainConfig,
        augment: Policy | None,
    ) -> None:
        spec = detector.spec
        self.label_categories = categories_of_labels(spec.label_names, split.categories, spec.name)
        label_of = {c: label for label, c in enumerate(self.label_categories) if c >= 0}
        self._truth = [split.ground_truth(e, label_of) for e in split.images]
        self._split = split
        self._images = images
        self._detector = detector
        self._train = train
        self._augment = augment
        self._fixed = fixed_input_hw(detector) is not None
        held_out = train.held_out
        rows = [i for i, t in enumerate(self._truth) if len(trainable_objects(t, held_out))]
        if not rows:
            raise TrainingError(f"no image of {split.name} has an object to learn from")
        self.rows = kept_rows(rows, train.label_fraction, train.seed)

    def masks(self, row: int, side: int) -> NDArray[np.float32]:
        """Masks of an image's objects over their own boxes.

        Args:
            row: Its place in the split.
            side: Cells along both axes.

        Returns:
            Shape (G, side, side).
        """
        size_hw = self._split.images[row].size_hw
        return object_masks(self._truth[row], size_hw, self._train.held_out, side)

    def picture(self, row: int, epoch: int) -> Picture:
        """An image of an epoch.

        Args:
            row: Its place in the split.
            epoch: Counted from 0; decides the augmentation.

        Returns:
            The picture and what is in it.
        """
        entry = self._split.images[row]
        transform = identity_transform(entry.size_hw)
        if self._augment is not None:
            transform = sample_transform(
                self._augment,
                self._train.seed,
                f"epoch-{epoch}",
                entry.image_id,
                entry.size_hw,
                fixed=self._fixed,
            )
        image = load_image(self._images / entry.file_name, entry.size_hw)
        edge = transform.shortest_edge
        return Picture(
            entry.image_id,
            entry.file_name,
            row,
            self._detector.preprocess(transform_image(image, transform), edge),
            self._detector.input_geometry(transform.size_hw, edge),
            transform_ground_truth(self._truth[row], entry.size_hw, transform),
        )
