"""Fit: a dataset and a detector in, a trained head with figures and pictures out."""

import shlex
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from mfdetr_cache.coco.annotations import load_to_extract
from mfdetr_cache.coco.categories import MatchedCategory
from mfdetr_cache.coco.layouts import find_split, split_to_measure
from mfdetr_cache.detectors.options import DetectorOptions, names_in_file
from mfdetr_cache.errors import SAME_COMMAND, DatasetError, MfdetrError, StoppedError
from mfdetr_cache.evaluation.measure import EvaluateSummary, open_to_measure
from mfdetr_cache.evaluation.overlay import side_by_side
from mfdetr_cache.evaluation.panels import prediction_panels
from mfdetr_cache.extraction.options import ViewOptions
from mfdetr_cache.files import is_taken, make_folder, write_atomically
from mfdetr_cache.head.folder import CONFIG_FILE
from mfdetr_cache.ops.devices import torch_device
from mfdetr_cache.reporter import Reporter, SilentReporter
from mfdetr_cache.training.config import Length
from mfdetr_cache.training.recipes import asked_recipe
from mfdetr_pipelines.config.copy_paste import CopyPasteConfig
from mfdetr_pipelines.config.evaluate import EvaluateConfig
from mfdetr_pipelines.config.extract import ExtractConfig
from mfdetr_pipelines.config.fit import FitConfig
from mfdetr_pipelines.config.train_head import TrainHeadConfig
from mfdetr_pipelines.config.typed import typed
from mfdetr_pipelines.copy_paste import ANNOTATIONS, IMAGES, run_copy_paste
from mfdetr_pipelines.evaluate import run_evaluate
from mfdetr_pipelines.extract import ExtractSummary, run_extract
from mfdetr_pipelines.numbers import metric_table, percent
from mfdetr_pipelines.pages.chart import curves
from mfdetr_pipelines.pages.page import Panel, PanelRow, Section, html_page, require_page_place
from mfdetr_pipelines.picture_files import require_ours, save_picture
from mfdetr_pipelines.train_head import run_train_head

ConfigT = TypeVar("ConfigT")
ResultT = TypeVar("ResultT")

_NUM_PICTURES = 10
# Training images below which pasted objects may help (docs/quality.md).
_FEW = 1000
# Every so many-th training image is measured on where the dataset has no other split.
_HELD_OUT = 5
_TRAIN_CACHE, _VAL_CACHE, _HEAD, _PAGE = "train.zarr", "val.zarr", "head", "report.html"
_PICTURES = "pictures"


@dataclass(frozen=True, slots=True)
class FitSummary:
    """What came of it.

    Attributes:
        pictures: Image, boxes, masks and annotation of some images that were not learned from.
        categories: The categories of what was learned from, and their labels.
        seconds: Time of each step, of this call.
    """

    out: Path
    head: Path
    page: Path
    pictures: tuple[Path, ...]
    categories: tuple[MatchedCategory, ...]
    seconds: dict[str, float]
    cache_bytes: int
    evaluation: EvaluateSummary
    commands: tuple[str, ...]
    next_commands: tuple[str, ...]


class _Steps:
    """Runs one command after the other, saying which and keeping how long it took."""

    def __init__(self, reporter: Reporter) -> None:
        self.seconds: dict[str, float] = {}
        self.commands: list[str] = []
        self.reporter = reporter

    def run(
        self,
        name: str,
        command: str,
        run: Callable[[ConfigT, Reporter], ResultT],
        config: ConfigT,
        **instead: object,
    ) -> ResultT:
        self.commands.append(typed(command, config, **instead))
        self.reporter.say(f"\n$ {self.commands[-1]}")
        started = time.perf_counter()
        result = run(config, self.reporter)
        self.seconds[name] = time.perf_counter() - started
        return result


def run_fit(config: FitConfig, reporter: Reporter) -> FitSummary:
    """Extract, train, evaluate and draw; what an earlier call has done is not done again.

    Raises what ``extract``, ``train-head`` and ``evaluate`` raise, and MfdetrError if ``out`` is
    not empty and holds no such run.
    """
    is_own = any((config.out / name).exists() for name in (_TRAIN_CACHE, _VAL_CACHE))
    if is_taken(config.out) and not is_own:
        raise MfdetrError(f"{config.out} is not empty; nothing was touched, choose another --out")
    require_page_place(config.out / _PAGE, "--out")
    require_ours(config.out / _PICTURES)
    make_folder(config.out)
    steps, head = _Steps(reporter), config.out / _HEAD
    val_split = config.val_split or split_to_measure(config.dataset)
    if config.copies and val_split is None:
        raise MfdetrError(
            f"--copies {config.copies}: {config.dataset} has no split to measure on, and objects "
            "of held-out training images would be pasted; make one, or leave out --copies"
        )
    if not (config.out / _TRAIN_CACHE).exists():
        _require_masks(config)
    caches: dict[str, ExtractSummary] = {}
    if val_split is not None:
        # First, as it is the shorter one: a wrong detector shows early.
        files: dict[str, Any] = {"dataset": config.dataset, "split": val_split}
        caches[val_split] = _extract(config, steps, files, _VAL_CACHE)
    files = {"dataset": config.dataset, "split": config.train_split}
    if config.copies:
        files = _copy_paste(config, steps)
    learned = _extract(config, steps, files, _TRAIN_CACHE, config.num_views)
    caches[config.train_split] = learned
    _train(config, steps, held_out=val_split is None)
    measured_on = config.out / (_TRAIN_CACHE if val_split is None else _VAL_CACHE)
    measure = EvaluateConfig(str(measured_on), head, device=config.device)
    evaluation = steps.run("evaluate", "evaluate", run_evaluate, measure)
    images = find_split(config.dataset, val_split or config.train_split).images
    started = time.perf_counter()
    pictures = _pictures(config, measured_on, images)
    steps.seconds["pictures"] = time.perf_counter() - started
    summary = FitSummary(
        out=config.out,
        head=head,
        page=config.out / _PAGE,
        pictures=tuple(pictures),
        categories=learned.categories,
        seconds=steps.seconds,
        cache_bytes=sum(c.stored_bytes for c in caches.values()),
        evaluation=evaluation,
        commands=tuple(steps.commands),
        next_commands=_next_commands(config, measured_on, learned.num_images),
    )
    write_atomically(summary.page, _page(config, caches, summary, pictures.values()).encode())
    return summary


def _require_masks(config: FitConfig) -> None:
    """Refuse a training split that nothing can be learned from, before another is extracted."""
    files = find_split(config.dataset, config.train_split)
    split = load_to_extract(files, config.on_bad_annotation, None)
    objects = (a for found in split.annotations.values() for a in found)
    if not any(len(a.run_lengths) and not a.is_crowd for a in objects):
        raise DatasetError(
            f"{files.annotations} has no object with a mask, or crowds alone: nothing can be "
            "learned from it; export the dataset with its polygons or masks"
        )


def _copy_paste(config: FitConfig, steps: _Steps) -> dict[str, Any]:
    # A folder for each number: another one is another dataset.
    out = config.out / f"pasted-{config.copies}"
    paste = CopyPasteConfig(
        out,
        dataset=config.dataset,
        split=config.train_split,
        on_bad_annotation=config.on_bad_annotation,
        copies=config.copies,
    )
    steps.run("paste objects", "copy-paste", run_copy_paste, paste)
    return {"images": out / IMAGES, "annotations": out / ANNOTATIONS}


def _extract(
    config: FitConfig, steps: _Steps, files: Mapping[str, Any], cache: str, views: int = 0
) -> ExtractSummary:
    options = DetectorOptions(
        num_queries=config.num_queries,
        input_size=config.input_size,
        labels=names_in_file(str(config.labels)) if config.labels else (),
    )
    extract = ExtractConfig(
        config.weights,
        str(config.out / cache),
        **files,
        on_bad_annotation=config.on_bad_annotation,
        detector=config.detector,
        options=options,
        labels=config.categories,
        views=ViewOptions(views),
        device=config.device,
    )
    name = f"extract {files.get('split', config.train_split)}"
    found = steps.run(name, "extract", run_extract, extract, labels=config.labels)
    if found.box is not None:
        ap, ap50 = (percent(value) for value in (found.box.AP, found.box.AP50))
        steps.reporter.say(
            f"box AP {ap}, AP50 {ap50}, to compare with what the detector's training said"
        )
    return found


def _train(config: FitConfig, steps: _Steps, *, held_out: bool) -> None:
    out = config.out / _HEAD
    settings = {"val_split": str(_HELD_OUT)} if held_out else {}
    train = TrainHeadConfig(
        str(config.out / _TRAIN_CACHE),
        out,
        asked_recipe(config.recipe, settings),
        length=config.length,
        resume=(out / CONFIG_FILE).exists(),
        device=config.device,
    )
    asked = {"recipe": config.recipe, "set": ["=".join(item) for item in settings.items()]}
    try:
        steps.run("train the head", "train-head", run_train_head, train, **asked)
    except StoppedError as error:
        # What stopped says how to resume it alone.
        raise StoppedError(SAME_COMMAND) from error


def _next_commands(config: FitConfig, measured_on: Path, num_learned: int) -> tuple[str, ...]:
    """Masks for other photos, what may make them better, and what they lack."""
    head, cache = str(config.out / _HEAD), str(config.out / _TRAIN_CACHE)
    detector = ["--detector", config.detector] if config.detector != "auto" else []
    predict = ["predict", "PHOTOS", "--weights", config.weights, *detector, "--head", head]
    longer = ["train-head", "--cache", cache, "--out", str(config.out / "head-longer")]
    commands = (
        [*predict, "--out", "MASKS"],
        [*longer, "--recipe", config.recipe, "--max-steps", "N"],
        ["evaluate", "--cache", str(measured_on), "--head", head, "--oracles", "--per-category"],
    )
    first, better, last = (shlex.join(("mfdetr", *words)) for words in commands)
    if num_learned < _FEW and not config.copies and measured_on.name == _VAL_CACHE:
        out = Path(f"{config.out}-pasted")
        plain = replace(config, length=Length(), views=None, device="auto")
        better = typed("fit", replace(plain, copies=6, out=out))
    return first, better, last


def _pictures(config: FitConfig, measured_on: Path, images: Path) -> dict[Path, PanelRow]:
    """Panels of images that are spread over those that were measured on, with their files."""
    device = torch_device(config.device)
    cache, folder = open_to_measure(str(measured_on), config.out / _HEAD, SilentReporter())
    head = folder.head.to(device)
    rows = cache.rows[:: max(1, len(cache.rows) // _NUM_PICTURES)][:_NUM_PICTURES]
    made = {}
    make_folder(config.out / _PICTURES)
    for row in rows:
        stem = Path(cache.file_name(row)).stem
        path = config.out / _PICTURES / f"{stem}.png"
        if path in made:  # of another folder
            path = path.with_name(f"{stem}-{row}.png")
        panels = prediction_panels(cache, row, head, images, device)
        save_picture(side_by_side(panels), path)
        made[path] = PanelRow(cache.file_name(row), tuple(Panel(*panel) for panel in panels))
    return made


def _page(
    config: FitConfig,
    caches: Mapping[str, ExtractSummary],
    summary: FitSummary,
    pictures: Iterable[PanelRow],
) -> str:
    columns, cells = metric_table(summary.evaluation.metrics())
    boxes = summary.evaluation.details["box"]["categories"]
    masks = summary.evaluation.details["mask"]["categories"]
    facts = {
        "dataset": str(config.dataset),
        "detector": config.weights,
        **{f"images of {name}": str(c.num_images) for name, c in caches.items()},
        "measured on": f"{summary.evaluation.num_images} images that were not learned from",
        "caches": f"{summary.cache_bytes / 1e6:.0f} MB",
        "mask network": f"{summary.evaluation.parameters / 1e6:.2f} M parameters, recipe "
        f"{config.recipe}",
    }
    return html_page(
        f"Masks for {config.dataset.name}",
        [
            Section(facts=facts),
            Section(
                "How good they are",
                charts=[curves(summary.head).to_svg()],
                columns=["in percent", *columns[1:]],
                cells=cells,
                text="Floor: the box as mask. Ceiling: the annotated mask inside the predicted "
                "box. A mask network lies between them.",
            ),
            Section(
                "By category",
                columns=["", "objects", "box AP", "mask AP"],
                cells=[
                    [m["name"], str(m["objects"]), percent(b["AP"]), percent(m["AP"])]
                    for b, m in zip(boxes, masks, strict=True)
                    if m["objects"]
                ],
            ),
            Section("What they look like", rows=tuple(pictures)),
            Section("What was run", notes=summary.commands),
            Section("How to go on", notes=summary.next_commands),
        ],
    )
