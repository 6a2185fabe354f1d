"""Cache view: a page that shows what is in a cache, for looking instead of reading."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.storage.open import Location
from mfdetr_cache.coco.augmentation import transform_image
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.errors import ConfigError
from mfdetr_cache.evaluation.detections import detections_of
from mfdetr_cache.evaluation.overlay import OverlayItem, draw_overlay
from mfdetr_cache.files import write_atomically
from mfdetr_cache.reporter import Reporter
from mfdetr_cache.types import CachedImage
from mfdetr_pipelines.html_page import Panel, PanelRow, html_page, panel_rows

_SHOWN_BOXES = 12
_LEAST_SCORE = 0.3
_BINS = 60


@dataclass(frozen=True, slots=True)
class ViewSummary:
    """What was drawn.

    Attributes:
        page: The page.
        images: How many images are on it, over all views shown.
    """

    page: Path
    images: int


def run_view(
    location: Location, out: Path, reporter: Reporter, *, images: Path | None, count: int
) -> ViewSummary:
    """Draw images, detections, maps as colours, histograms and sizes.

    Args:
        location: The cache.
        out: The HTML file.
        reporter: Who is told about progress.
        images: Image folder; None shows detections on grey.
        count: How many images, spread over the cache; each in its first views.

    Returns:
        What was drawn.

    Raises:
        CacheError: If the cache is missing, unfinished or damaged.
    """
    if count < 1:
        raise ConfigError(f"--count {count}: give 1 or more")
    cache = FeatureCache.open(location)
    cache.require_complete()
    rows = [cache.rows[int(i)] for i in np.linspace(0, len(cache) - 1, min(count, len(cache)))]
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
            shown.append(_panel_row(cache, image, view, images))
            reporter.advance()
    reporter.finish()
    joined = {name: np.concatenate(parts) for name, parts in values.items()}
    write_atomically(out, _page(cache, shown, joined).encode())
    return ViewSummary(out, len(shown))


def principal_colours(features: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The three directions in which a map varies most, as red, green and blue.

    Args:
        features: Shape (h, w, C).

    Returns:
        Shape (h, w, 3); each direction is stretched from its 2nd to its 98th percentile.
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
    picture = Image.new("RGB", (size_hw[1], size_hw[0]), (128, 128, 128))
    if images is not None:
        original = load_image(images / image.file_name, cache.original_hw(image.row))
        picture = transform_image(original, cache.views[view].transform(image.row))
    panels = [Panel("detections", draw_overlay(picture, _boxes(cache, image)))]
    for name, stored in image.maps.items():
        height, width = stored.hw
        features = np.asarray(stored.to_array(), np.float32).reshape(height, width, -1)
        colours = Image.fromarray(principal_colours(features))
        title = f"{name}: {height} x {width} x {features.shape[2]}"
        # As wide as the image: a map covers it all, whatever its cells are.
        panels.append(Panel(title, colours.resize(picture.size, Image.Resampling.NEAREST), False))
    return PanelRow(f"{image.file_name}, view {view}", tuple(panels))


def _boxes(cache: FeatureCache, image: CachedImage) -> list[OverlayItem]:
    detections = detections_of(image, cache.spec)
    names = {int(c["id"]): str(c["name"]) for c in cache.categories}
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
    cache: FeatureCache, shown: Sequence[PanelRow], values: dict[str, NDArray[np.float32]]
) -> str:
    views = len(cache.layout.views)
    facts = {
        "cache": cache.path,
        "detector": f"{cache.spec.name}, weights {cache.spec.weights_sha256[:16]}",
        "dataset": str(cache.identity["dataset"]["name"]),
        "images": f"{len(cache)} in {views} view{'' if views == 1 else 's'}",
        "maps": f"{cache.layout.preset}, {cache.layout.compression}, C1 {cache.layout.c1}",
        "size": f"{cache.stored_bytes / 1e6:.1f} MB",
    }
    rows = "".join(f"<tr><th>{k}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    histograms = "".join(_histogram(name, found) for name, found in values.items())
    return html_page(
        "What is in this cache",
        f"<table class='facts'>{rows}</table>"
        "<p>Maps are shown by the three directions in which each varies most (PCA per image), as "
        "red, green and blue; their values are those a mask network gets.</p>"
        f"{panel_rows(shown)}<h2>Values</h2><p>How often a value occurs, on a logarithmic scale: "
        "what follows a ReLU is mostly zero.</p>"
        f"<div class='row'>{histograms}</div><h2>Bytes</h2>{_sizes(cache)}",
    )


def _histogram(name: str, values: NDArray[np.float32]) -> str:
    low, high = np.percentile(values, (0.1, 99.9))
    counts, _ = np.histogram(values, bins=_BINS, range=(low, high))
    heights = np.log1p(counts) / np.log1p(max(int(counts.max()), 1))
    bars = "".join(
        f"<rect class='bar' x='{5 * i}' y='{100 - 100 * h:.1f}' width='4' height='{100 * h:.1f}'/>"
        for i, h in enumerate(heights)
    )
    return (
        f"<figure><svg width='{5 * _BINS}' height='120' role='img'>{bars}"
        f"<text x='0' y='116'>{low:.2f}</text>"
        f"<text x='{5 * _BINS}' y='116' text-anchor='end'>{high:.2f}</text></svg>"
        f"<figcaption>{html.escape(name)}: mean {values.mean():.2f}, spread {values.std():.2f}"
        "</figcaption></figure>"
    )


def _sizes(cache: FeatureCache) -> str:
    sizes = {k: v for k, v in cache.stored_bytes_of_arrays().items() if v > 0}
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:10]
    top = max((v for _, v in largest), default=1)
    lines = "".join(
        f"<text x='220' y='{22 * i + 15}' text-anchor='end'>{html.escape(name)}</text>"
        f"<rect class='bar' x='228' y='{22 * i + 4}' width='{400 * size / top:.1f}' height='14'/>"
        f"<text x='{236 + 400 * size / top:.1f}' y='{22 * i + 15}'>{size / 1e6:.2f} MB</text>"
        for i, (name, size) in enumerate(largest)
    )
    return f"<svg width='760' height='{22 * len(largest)}' role='img'>{lines}</svg>"
