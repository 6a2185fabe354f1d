"""Cache view: a page that shows the images, detections and maps of a cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from PIL import Image

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.coco.augmentation import transform_image
from mfdetr_cache.coco.categories import category_names
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.evaluation.detections import detections_of
from mfdetr_cache.evaluation.overlay import PANEL_SIDE, OverlayItem, draw_overlay
from mfdetr_cache.files import write_atomically
from mfdetr_cache.reporter import Reporter
from mfdetr_cache.types import CachedImage
from mfdetr_pipelines.config.cache import ViewConfig
from mfdetr_pipelines.pages.chart import bars, draw
from mfdetr_pipelines.pages.page import Panel, PanelRow, Section, html_page, require_page_place

_SHOWN_BOXES = 12
_LEAST_SCORE = 0.3
_BINS = 60


@dataclass(frozen=True, slots=True)
class ViewSummary:
    """The page, and the number of images on it over all views shown."""

    page: Path
    images: int


def run_view(config: ViewConfig, reporter: Reporter) -> ViewSummary:
    """Write an HTML page with images, detections, maps as colours, histograms and sizes.

    The images are spread over the cache, each in its first views. CacheError if the cache is
    missing, unfinished or damaged.
    """
    require_page_place(config.out, "--out")
    cache = FeatureCache.open(config.cache)
    cache.require_complete()
    count = min(config.count, len(cache))
    rows = [cache.rows[int(i)] for i in np.linspace(0, len(cache) - 1, count)]
    views = cache.layout.views[:2]
    reporter.start("draw", len(rows) * len(views), "images")
    shown: list[PanelRow] = []
    values: dict[str, list[NDArray[np.float32]]] = {}
    for row in rows:
        for view in views:
            image = cache.read(row, view=view)
            for name, stored in image.maps.items():
                found = np.asarray(stored.to_array(), np.float32).reshape(-1)
                values.setdefault(name, []).append(found[:: max(1, len(found) // 20_000)])
            shown.append(_panel_row(cache, image, view, config.images))
            reporter.advance()
    reporter.finish()
    joined = {name: np.concatenate(parts) for name, parts in values.items()}
    write_atomically(config.out, _page(cache, shown, joined).encode())
    return ViewSummary(config.out, len(shown))


def principal_colours(features: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The first three principal components of a map (h, w, C) as RGB (h, w, 3).

    Each is stretched from its 2nd to its 98th percentile.
    """
    height, width, channels = features.shape
    flat = features.reshape(-1, channels).astype(np.float64)
    flat = flat - flat.mean(axis=0)
    _, vectors = np.linalg.eigh(flat.T @ flat)
    best = vectors[:, ::-1][:, :3]
    # The sign of a direction is arbitrary; the larger side is made the bright one.
    projected = flat @ (best * np.sign(best.sum(axis=0) + 1e-12))
    if projected.shape[1] < 3:
        projected = np.pad(projected, ((0, 0), (0, 3 - projected.shape[1])))
    low, high = np.percentile(projected, (2, 98), axis=0)
    scaled = (projected - low) / np.maximum(high - low, 1e-12)
    pixels: NDArray[np.uint8] = (255 * scaled.clip(0, 1)).astype(np.uint8)
    return pixels.reshape(height, width, 3)


def _panel_row(cache: FeatureCache, image: CachedImage, view: str, images: Path | None) -> PanelRow:
    size_hw = image.geometry.original_hw
    shown = Image.new("RGB", (size_hw[1], size_hw[0]), (128, 128, 128))
    if images is not None:
        original = load_image(images / image.file_name, cache.original_hw(image.row))
        shown = transform_image(original, cache.views[view].transform(image.row))
    detections = draw_overlay(shown, _boxes(cache, image), PANEL_SIDE)
    panels = [Panel("detections", detections)]
    for name, stored in image.maps.items():
        height, width = stored.hw
        features = np.asarray(stored.to_array(), np.float32).reshape(height, width, -1)
        colours = Image.fromarray(principal_colours(features))
        title = f"{name}: {height} x {width} x {features.shape[2]}"
        # As wide as the image: a map covers it all, whatever its cells are.
        panels.append(
            Panel(title, colours.resize(detections.size, Image.Resampling.NEAREST), False)
        )
    return PanelRow(f"{image.file_name}, view {view}", tuple(panels))


def _boxes(cache: FeatureCache, image: CachedImage) -> list[OverlayItem]:
    detections = detections_of(image, cache.spec)
    names = category_names(cache.categories)
    items = []
    for index in range(min(len(detections), _SHOWN_BOXES)):
        score = float(detections.class_scores[index])
        if score < _LEAST_SCORE:
            break
        category = cache.label_categories[int(detections.labels[index])]
        x0, y0, x1, y1 = (float(v) for v in detections.boxes_xyxy[index])
        text = f"{names.get(category, '?')} {score:.2f}"
        items.append(OverlayItem(text, (x0, y0, x1, y1), None))
    return items[::-1]


def _page(
    cache: FeatureCache, shown: Sequence[PanelRow], values: Mapping[str, NDArray[np.float32]]
) -> str:
    views = len(cache.layout.views)
    facts = {
        "cache": cache.path,
        "detector": f"{cache.spec.name}, weights {cache.spec.weights_sha256[:16]}",
        "dataset": str(cache.annotations.source["name"]),
        "images": f"{len(cache)} in {views} view{'' if views == 1 else 's'}",
        "maps": f"{cache.layout.preset}, {cache.layout.compression}, C1 {cache.layout.c1}",
        "size": f"{cache.stored_bytes / 1e6:.1f} MB",
    }
    about_maps = (
        "Maps are shown by the three directions in which each varies most (PCA per image), as red, "
        "green and blue; their values are those a mask network gets."
    )
    about_values = (
        "How often a value occurs, on a logarithmic scale: what follows a ReLU is mostly zero."
    )
    return html_page(
        "What is in this cache",
        [
            Section(facts=facts),
            Section(text=about_maps, rows=shown),
            Section("Values", text=about_values),
            Section(charts=[_histogram(name, v) for name, v in values.items()]),
            Section("Bytes", charts=[_sizes(cache)]),
        ],
    )


def _histogram(name: str, values: NDArray[np.float32]) -> str:
    low, high = np.percentile(values, (0.1, 99.9))

    def plot(axes: Axes) -> None:
        axes.hist(values, bins=_BINS, range=(low, high), log=True)
        axes.set_title(
            f"{name}: mean {values.mean():.2g}, spread {values.std():.2g}", size="medium"
        )
        axes.yaxis.set_visible(False)
        axes.locator_params(axis="x", nbins=4)
        axes.ticklabel_format(axis="x", scilimits=(-3, 3))

    return draw(plot, 3.4, 1.8).to_svg()


def _sizes(cache: FeatureCache) -> str:
    sizes = {k: v for k, v in cache.stored_bytes_of_arrays().items() if v > 0}
    largest = dict(sorted(sizes.items(), key=lambda item: -item[1])[:10])
    megabytes = [size / 1e6 for size in largest.values()]
    labels = [f"{size:.2f} MB" for size in megabytes]

    def plot(axes: Axes) -> None:
        bars(axes, list(largest), megabytes, labels)

    return draw(plot, 8, 0.3 + 0.24 * len(largest)).to_svg()
