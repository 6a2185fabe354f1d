from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mfdetr_cache.detectors.options import phrases_of
from mfdetr_cache.errors import ConfigError
from mfdetr_cache.options import FOLDER, Option
from mfdetr_pipelines.config.shared import DetectorName, OnDevice


@dataclass(frozen=True, slots=True)
class PredictConfig(OnDevice):
    """Segment images and videos: copies with masks drawn on them, and the masks as COCO RLE.

    Example:
        mfdetr predict photos/ --weights PekingU/rtdetr_r50vd --head runs/paper --out masks

    Attributes:
        images: Image and video files, folders, patterns.
        weights: The detector the head was trained with.
        head: Run folder of train-head.
        out: Where the drawn images and predictions.json go.
        threshold: Least confidence of what is kept.
        top_k: At most N objects per image.
        probabilities: Write how probable each pixel of each object's mask is too: a gray PNG for an
            object below probabilities/, 255 for certain; the mask is where it is 128 or more.
        prompt: Other classes than the head learned from, as in "elephant. tiger.", for an
            open-vocabulary detector with a class-agnostic head; category ids are 1, 2 and so on.
    """

    images: Annotated[tuple[str, ...], Option("IMAGES", metavar="IMAGES")]
    weights: Annotated[str, Option(metavar="NAME")]
    head: Annotated[Path, FOLDER]
    out: Annotated[Path, Option(metavar="FOLDER")]
    detector: DetectorName = "auto"
    threshold: Annotated[float, Option(takes_zero=True)] = 0.25
    top_k: int = 100
    probabilities: bool = False
    prompt: Annotated[tuple[str, ...], Option(metavar="TEXT", parse=phrases_of)] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise ConfigError(
                f"--threshold {self.threshold:g}: give a confidence from 0 to below 1"
            )
        if self.top_k < 1:
            raise ConfigError(f"--top-k {self.top_k}: give 1 or more objects")
        self.files  # noqa: B018  refused before anything is loaded

    @property
    def files(self) -> list[Path]:
        """The image and video files."""
        # Imported late: help and a mistyped option need not wait for Pillow.
        from mfdetr_pipelines.picture_files import find_images

        return find_images(self.images, self.out)
