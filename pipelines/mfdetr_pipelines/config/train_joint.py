from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from mfdetr_cache.choices import Augmentation, Tune
from mfdetr_cache.coco.layouts import ANNOTATIONS
from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.errors import ConfigError
from mfdetr_cache.options import FOLDER, Built, Only, Option
from mfdetr_cache.training.config import Length
from mfdetr_cache.training.recipes import Recipe
from mfdetr_pipelines.config.shared import DetectorName, OnBadAnnotation
from mfdetr_pipelines.config.training import RecipeOptions, TrainingRun


@dataclass(frozen=True, slots=True)
class LiveValidation:
    """Validation.

    Attributes:
        val_images: Image folder of the validation split, measured at the end.
        val_annotations: Its COCO instances JSON.
        val_every: Measure every N steps too, through the detector as it is then; with --tune
            nothing the best weights of the head are kept.
    """

    val_images: Annotated[Path | None, FOLDER] = None
    val_annotations: Annotated[Path | None, ANNOTATIONS] = None
    val_every: int | None = None

    def __post_init__(self) -> None:
        if (self.val_images is None) != (self.val_annotations is None):
            raise ConfigError("--val-images and --val-annotations go together")
        if self.val_every is not None and self.val_every < 1:
            raise ConfigError(f"--val-every must be 1 or more, not {self.val_every}")


@dataclass(frozen=True, slots=True)
class TrainJointConfig(TrainingRun):
    """Train a mask network and its detector together, without a cache (Table 16).

    For testing what freezing costs: the same recipe with the detector frozen, its encoder and
    decoder tuned, or all of it, at a tenth of the head's learning rate. Several GPUs are used as by
    train-head.

    Example:
        mfdetr train-joint --weights DETECTOR --images coco/train2017
        --annotations coco/annotations/instances_train2017.json --out runs/joint --tune all

    Attributes:
        weights: Its checkpoint file, folder or hub id.
        images: Image folder of the training split.
        annotations: Its COCO instances JSON.
        out: Run folder: head, detector, settings, metrics.
        tune: What is tuned beside the head: nothing, encoder-decoder or all.
        detector_lr: The detector's learning rate as a share of the head's.
        augment: Augment every image anew in every epoch: none, deformable-detr or
            large-scale-jitter.
        limit: Only the first N images.
    """

    weights: Annotated[str, Option(metavar="NAME")]
    images: Annotated[Path, FOLDER]
    annotations: Annotated[Path, ANNOTATIONS]
    out: Annotated[Path, Option(metavar="FOLDER")]
    recipe: Annotated[Recipe, Built(RecipeOptions)]
    detector: DetectorName = "auto"
    tune: Annotated[Tune, Option(metavar="PART")] = "encoder-decoder"
    detector_lr: float = 0.1
    augment: Annotated[Augmentation, Option(metavar="POLICY")] = "none"
    on_bad_annotation: OnBadAnnotation = "stop"
    limit: int | None = None
    length: Length = field(default_factory=Length)
    validation: LiveValidation = field(default_factory=LiveValidation)
    options: Annotated[
        DetectorOptions, Only("num_queries", "encoder_layer", "input_size", "labels", "prompt")
    ] = field(default_factory=DetectorOptions)

    def __post_init__(self) -> None:
        if not 0 < self.detector_lr <= 1:
            raise ConfigError(f"--detector-lr {self.detector_lr}: a share above 0 and at most 1")
