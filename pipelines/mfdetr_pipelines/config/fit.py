from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from mfdetr_cache.coco.options import LabelOptions
from mfdetr_cache.detectors.options import sides_of
from mfdetr_cache.options import FILE, FOLDER, Option
from mfdetr_cache.training.config import Length
from mfdetr_cache.training.recipes import AUTO
from mfdetr_pipelines.config.shared import DetectorName, OnBadAnnotation, OnDevice
from mfdetr_pipelines.config.training import RECIPE_OR_AUTO

_VIEWS, _VIEWS_OF_COPIES = 4, 1


@dataclass(frozen=True, slots=True)
class FitConfig(OnDevice):
    """From a dataset and a detector to masks: extract, train, evaluate, draw, in one command.

    Every step is a command of its own, printed as it begins. The same command goes on where a
    stopped one left off. Ends with a page of figures and pictures, and the commands to go on with.

    Example:
        mfdetr fit --dataset animals --weights rfdetr-animals.pth --out runs/animals

    Attributes:
        dataset: Folder of a dataset in the layout of COCO, Roboflow or YOLO.
        weights: The detector: hub id, folder in its layout, or a checkpoint of its authors' code.
        out: Folder for caches, head, pictures and page.
        train_split: Split to learn from.
        val_split: Split to measure on; by default the one that is called val or valid, else test.
            Without any, every fifth training image is left out of training for it.
        input_size: Size of the detector's input where its training had another than the weights
            tell: 640, or HEIGHTxWIDTH; of detectors that keep the shape of an image SHORTERxLONGER.
        num_queries: Queries per image, where the detector's training had another number than its
            weights tell.
        labels: Names of the detector's classes, one a line in the order of its outputs, where its
            weights have none or wrong ones.
        copies: Copies of every training image with objects of others pasted onto it (mfdetr
            copy-paste), which help where few images are learned by heart; 6 are usual.
        views: Augmented passes per training image, 4 by default and 1 beside --copies. Each adds to
            the cache what the plain pass takes.
        recipe: How the head is made and trained.
    """

    dataset: Annotated[Path, FOLDER]
    weights: Annotated[str, Option(metavar="NAME")]
    out: Annotated[Path, Option(metavar="FOLDER")]
    train_split: Annotated[str, Option(metavar="NAME")] = "train"
    val_split: Annotated[str | None, Option(metavar="NAME")] = None
    detector: DetectorName = "auto"
    input_size: Annotated[tuple[int, ...], Option(metavar="SIZE", parse=sides_of)] = ()
    num_queries: int | None = None
    labels: Annotated[Path | None, FILE] = None
    on_bad_annotation: OnBadAnnotation = "stop"
    copies: Annotated[int, Option(takes_zero=True)] = 0
    views: Annotated[int | None, Option(takes_zero=True)] = None
    recipe: Annotated[str, RECIPE_OR_AUTO] = AUTO
    length: Length = field(default_factory=Length)
    categories: LabelOptions = field(default_factory=LabelOptions)

    @property
    def num_views(self) -> int:
        """The augmented passes."""
        if self.views is not None:
            return self.views
        return _VIEWS_OF_COPIES if self.copies else _VIEWS
