"""Compare: heads and results files on the same images, with intervals of their differences."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pycocotools.coco import COCO

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.coco.annotations import CocoSplit, load_coco_split
from mfdetr_cache.coco.categories import category_names
from mfdetr_cache.coco.results import load_results
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.errors import CacheError, DatasetError
from mfdetr_cache.evaluation.bootstrap import PairedDifference, WeightedAP, differences_to_first
from mfdetr_cache.evaluation.close_ups import CloseUp, close_ups, selections
from mfdetr_cache.evaluation.coco_metrics import (
    CocoMetrics,
    Result,
    evaluate_results,
    ground_truth_of_split,
)
from mfdetr_cache.evaluation.measure import (
    ground_truth_of,
    measure,
    open_to_measure,
    require_same_truth,
)
from mfdetr_cache.files import write_atomically
from mfdetr_cache.ops.devices import keep_freed_memory, torch_device
from mfdetr_cache.reporter import Reporter
from mfdetr_pipelines.config.compare import CompareConfig
from mfdetr_pipelines.pages.page import Panel, PanelRow, Section, html_page, require_page_place


@dataclass(frozen=True, slots=True)
class ComparedSubject:
    """One head or results file.

    Attributes:
        against_first: Difference of mask AP to the first with a 95 % interval; None for the first.
    """

    name: str
    mask: CocoMetrics
    boundary: CocoMetrics
    against_first: PairedDifference | None


@dataclass(frozen=True, slots=True)
class CompareSummary:
    """What was compared, on how many images."""

    num_images: int
    subjects: tuple[ComparedSubject, ...]


def run_compare(config: CompareConfig, reporter: Reporter) -> CompareSummary:
    """Measure every subject and draw images for the intervals.

    Raises CacheError, HeadError or IdentityError as evaluate does, DatasetError for files that
    cannot be used, and CacheError if the subjects are not of the same images.
    """
    if config.pictures.page is not None:
        require_page_place(config.pictures.page, "--page")
    split = None
    if config.annotations is not None:
        split = load_coco_split(config.annotations, on_bad=config.on_bad_annotation)
        split.tell_faults(reporter)
    found = dict(_masks_of_runs(config, split, reporter))
    truth, file_names = _common_images([cache for cache, _ in found.values()], split)
    masks = {run: results for run, (_, results) in found.items()}
    for file in set(config.subjects) - set(config.runs):
        assert split is not None  # checked with the settings
        masks[file] = _masks_of_file(file, split, truth, file_names, config, reporter)
    ordered = [masks[subject] for subject in config.subjects]
    aps = [[WeightedAP(truth, results)] for results in ordered]
    num_images = len(aps[0][0].image_ids)
    reporter.say(f"paired bootstrap over {num_images} images, {config.samples} samples")
    _write_page(config, truth, ordered, file_names, reporter)
    differences = [None, *differences_to_first(aps, config.samples)]
    compared = []
    for subject, results, difference in zip(config.subjects, ordered, differences, strict=True):
        mask = evaluate_results(truth, results, "segm")
        boundary = evaluate_results(truth, results, "boundary")
        compared.append(ComparedSubject(str(subject), mask, boundary, difference))
    return CompareSummary(num_images, tuple(compared))


def _masks_of_runs(
    config: CompareConfig, split: CocoSplit | None, reporter: Reporter
) -> Iterable[tuple[Path, tuple[FeatureCache, list[Result]]]]:
    device = torch_device(config.device)
    keep_freed_memory()
    locations = config.cache if len(config.cache) > 1 else config.cache * len(config.runs)
    for run, location in zip(config.runs, locations, strict=True):
        cache, folder = open_to_measure(
            config.local_cache.before(location), run, reporter, config.which
        )
        if split is not None and cache.annotations.source["sha256"] != split.sha256:
            raise CacheError(f"{cache.path} has other annotations than {config.annotations}")
        reporter.say(str(run))
        _, masks = measure(cache, folder.head.to(device), device, reporter, scoring=config.scoring)
        yield run, (cache, masks)


def _common_images(
    caches: Sequence[FeatureCache], split: CocoSplit | None
) -> tuple[COCO, dict[int, str]]:
    """The objects of the images that every subject is measured on, and the files of these."""
    if not caches:
        assert split is not None  # checked with the settings
        files = {entry.image_id: entry.file_name for entry in split.images}
        return ground_truth_of_split(split), files
    first, *others = caches
    for other in others:
        require_same_truth(first, other)
    return ground_truth_of(first), {first.image_id(row): first.file_name(row) for row in first.rows}


def _masks_of_file(
    path: Path,
    split: CocoSplit,
    truth: COCO,
    file_names: Mapping[int, str],
    config: CompareConfig,
    reporter: Reporter,
) -> list[Result]:
    found = load_results(path, split, config.on_bad_annotation)
    found.faults.tell(reporter)
    # After a relabelling the ids of the cache's images may be those of another file.
    by_name = {name: image_id for image_id, name in file_names.items()}
    own = {
        e.image_id: e.image_id
        if file_names.get(e.image_id) == e.file_name
        else by_name.get(e.file_name, e.image_id)
        for e in split.images
    }
    masks = [{**r, "image_id": own[r["image_id"]]} for r in found.with_field("segmentation")]
    masks = [r for r in masks if r["image_id"] in truth.imgs]
    if found.results and not masks:
        raise DatasetError(f"{path} has no masks of these images")
    return masks


def _write_page(
    config: CompareConfig,
    truth: COCO,
    masks: Sequence[Sequence[Result]],
    file_names: Mapping[int, str],
    reporter: Reporter,
) -> None:
    page, images = config.pictures.page, config.pictures.images
    if page is None or images is None:
        return
    names = [subject.name for subject in config.subjects]
    if len(set(names)) < len(names):
        names = [str(subject) for subject in config.subjects]
    categories = category_names(truth.dataset["categories"])

    def row(shown: CloseUp) -> PanelRow:
        file_name = file_names[shown.image_id]
        photo = load_image(images / file_name, shown.size_hw)
        panels = tuple(Panel(*panel) for panel in shown.panels(photo, names))
        return PanelRow(f"{categories[shown.category_id]}, {file_name}", panels)

    chosen = selections(close_ups(truth, masks), config.pictures.objects)
    sections = [Section(name, rows=tuple(map(row, found))) for name, found in chosen.items()]
    write_atomically(page, html_page(" and ".join(names), sections).encode())
    reporter.say(f"close-ups: {page}")
