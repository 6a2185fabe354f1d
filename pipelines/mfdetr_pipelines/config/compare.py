from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from mfdetr_cache.choices import OnBad, Scoring, Which
from mfdetr_cache.coco.layouts import ANNOTATIONS
from mfdetr_cache.errors import ConfigError
from mfdetr_cache.options import FOLDER, Option
from mfdetr_pipelines.config.shared import LocalCache, OnDevice


@dataclass(frozen=True, slots=True)
class Pictures:
    """Pictures.

    Attributes:
        page: Write a page of close-ups here: where the subjects differ most, the worst, and some
            between, each beside photo and annotation.
        images: Folder with the images, for --page.
        objects: Close-ups under each heading of the page.
    """

    page: Annotated[Path | None, Option(metavar="FILE")] = None
    images: Annotated[Path | None, FOLDER] = None
    objects: int = 10

    def __post_init__(self) -> None:
        if (self.page is None) != (self.images is None):
            raise ConfigError("--page and --images go together: the page shows the photos")
        if self.objects < 1:
            raise ConfigError(f"--objects {self.objects}: give 1 or more")


@dataclass(frozen=True, slots=True)
class CompareConfig(OnDevice):
    """Compare heads and results files on the same images, with intervals of the differences.

    The first is what the others are compared with. An interval holds the difference of mask AP for
    95 % of the splits that this one could have been (paired bootstrap over images); it says
    nothing of other seeds.

    Example:
        mfdetr compare runs/fast runs/paper mask-rcnn.json --cache val2017.zarr
        --annotations instances_val2017.json

    Attributes:
        subjects: Run folders of train-head, and COCO results files of any tool.
        cache: Cache of the split, for run folders. Repeatable: one for each of them, in order.
        annotations: COCO instances JSON of the split, for results files.
        on_bad_annotation: What to do with an annotation or a result that cannot be used: stop, or
            leave it out.
        which: Weights of the end of the training (last), or of its best validation.
        scoring: As evaluate has it.
        samples: Draws of the bootstrap.
    """

    subjects: Annotated[tuple[Path, ...], Option("SUBJECTS", metavar="RUN|FILE...")]
    cache: Annotated[tuple[str, ...], Option(metavar="CACHE")] = ()
    annotations: Annotated[Path | None, ANNOTATIONS] = None
    on_bad_annotation: OnBad = "stop"
    which: Which = "last"
    scoring: Annotated[Scoring, Option("--score", metavar="RULE")] = "auto"
    samples: int = 1000
    pictures: Pictures = field(default_factory=Pictures)
    local_cache: LocalCache = field(default_factory=LocalCache)

    @property
    def runs(self) -> tuple[Path, ...]:
        """Those of the subjects that are folders."""
        return tuple(s for s in self.subjects if s.is_dir())

    def __post_init__(self) -> None:
        if len(self.subjects) < 2 or len(set(self.subjects)) < len(self.subjects):
            raise ConfigError("give two or more run folders or results files, each once")
        for subject in self.subjects:
            if not subject.exists():
                raise ConfigError(f"{subject}: there is no such run folder or results file")
        runs = len(self.runs)
        if len(self.cache) not in ({1, runs} if runs else {0}):
            raise ConfigError(
                f"--cache is given {len(self.cache)} times for {runs} run folders: give it "
                "once, or once for each of them in order"
            )
        if runs < len(self.subjects) and self.annotations is None:
            raise ConfigError("results files need --annotations, the COCO instances JSON")
        if self.samples < 1:
            raise ConfigError(f"--samples {self.samples}: give 1 or more")
