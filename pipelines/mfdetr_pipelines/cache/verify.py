"""Cache verify: whether a cache is complete and intact, and agrees with the detector."""

from dataclasses import dataclass

import numpy as np

from mfdetr_cache.cache.foundation import read_opened
from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.schema import Part
from mfdetr_cache.cache.storage.open import open_storage
from mfdetr_cache.cache.verify import (
    annotation_versions,
    check_annotations,
    check_foundation,
    check_part,
    unknown_files,
)
from mfdetr_cache.detectors.registry import load_with_options_of
from mfdetr_cache.errors import CacheError
from mfdetr_cache.extraction.again import extract_again
from mfdetr_cache.extraction.stream import told_of_changed_images
from mfdetr_cache.identity import detector_identity, differences
from mfdetr_cache.matching.crops import c1_crops
from mfdetr_cache.ops.devices import torch_device
from mfdetr_cache.ops.quantisation import StoredMap, encode_map
from mfdetr_cache.reporter import Reporter
from mfdetr_cache.types import DetectorOutput
from mfdetr_pipelines.config.cache import VerifyConfig

# A stored map may differ from a new one by what another device or thread count makes of the sums:
# float32 noise of 1e-5, at most one code or one float16 rounding of a few values. A wrong weight
# or preprocessing moves maps by tenths of their spread.
LIVE_TOLERANCE = 0.01


@dataclass(frozen=True, slots=True)
class VerifySummary:
    """Result of a check.

    Attributes:
        unknown_files: Files that do not belong to the cache; looked for with ``full``.
        live_difference: Largest mean difference of a map, over the map's standard deviation.
    """

    parts: int
    bytes_checked: int
    full: bool
    faults: tuple[str, ...]
    broken_parts: tuple[Part, ...]
    unknown_files: tuple[str, ...] = ()
    live_images: int = 0
    live_difference: float = 0.0


def run_verify(config: VerifyConfig, reporter: Reporter) -> VerifySummary:
    """Check a cache without changing it; CacheError if there is no cache."""
    storage = open_storage(config.cache)
    opened = read_opened(storage)
    root = opened.root
    reporter.start("verify", len(root.layout.parts), "parts")
    faults = list(check_foundation(storage, opened, full=config.full))
    for number in annotation_versions(storage):
        faults += check_annotations(storage, root, number, full=config.full)
    broken: list[Part] = []
    total = 0
    for part in root.layout.parts:
        check = check_part(storage, root, part, full=config.full)
        total += check.num_bytes
        faults += check.faults
        if check.faults:
            broken.append(part)
        reporter.advance(num_bytes=check.num_bytes)
    reporter.finish()
    compared, difference = 0, 0.0
    if config.live and not faults:
        found, compared, difference = _compare_live(config, reporter)
        faults += found
    return VerifySummary(
        len(root.layout.parts),
        total,
        config.full,
        tuple(faults),
        tuple(broken),
        unknown_files(storage, opened) if config.full else (),
        compared,
        difference,
    )


def _compare_live(config: VerifyConfig, reporter: Reporter) -> tuple[list[str], int, float]:
    """Compare images, spread evenly over all views, with the detector's output.

    Returns faults, images compared, and the largest mean difference of a map over its standard
    deviation.
    """
    weights, images = config.detector.weights, config.detector.images
    if weights is None or images is None:
        raise CacheError("--live runs the detector again: give --weights and --images")
    cache, device = FeatureCache.open(config.cache), torch_device(config.device)
    identity = detector_identity(cache.spec)
    detector = load_with_options_of(identity, weights)
    other = differences(identity, detector_identity(detector.spec))
    if other:
        field, stored, now = other[0]
        return [f"another detector: {field} is {stored!r} in the cache and {now!r} now"], 0, 0.0
    detector = detector.to(device)
    pairs = [(view, row) for view, opened in cache.views.items() for row in opened.rows]
    chosen = [pairs[int(i)] for i in np.linspace(0, len(pairs) - 1, min(config.live, len(pairs)))]
    changed = told_of_changed_images(cache.sizes_of_images, cache.file_name, images)
    faults = [changed] if changed else []
    worst = 0.0
    reporter.start("compare", len(chosen), "images")
    for view in dict(chosen):
        rows = {row for name, row in chosen if name == view}
        for row, output in extract_again(cache, detector, view, rows, images, device):
            gap, what = _largest_gap(cache, view, row, output.cpu())
            worst = max(worst, gap)
            if gap > LIVE_TOLERANCE:
                file = cache.file_name(row)
                faults.append(
                    f"row {row} ({file}) of view {view}: {what} is off by {gap:.3f} spreads"
                )
            reporter.advance()
    reporter.finish()
    return faults, len(chosen), worst


def _largest_gap(
    cache: FeatureCache, view: str, row: int, output: DetectorOutput
) -> tuple[float, str]:
    stored = cache.read(row, view=view)
    gaps = {
        "class_logits": _gap(stored.class_logits, output.class_logits[0].numpy()),
        "boxes": _gap(stored.boxes_cxcywh_norm, output.boxes_cxcywh_norm[0].numpy()),
        "queries": _gap(np.asarray(stored.queries), output.queries[0].numpy()),
    }
    if stored.c1_crops is not None:
        now = c1_crops(output, stored.ground_truth, stored.geometry, cache.layout.c1_roi)  # type: ignore[arg-type]
        if not np.array_equal(now.query_index, stored.c1_crops.query_index):
            return float("inf"), "the matching of queries"
        gaps["moments of C1"] = _gap(stored.c1_crops.moments, now.moments)
    for name, kept in stored.maps.items():
        tokens = output.maps[name][0].flatten(1).T.numpy()
        again = StoredMap(kept.hw, kept.channels, kept.encoding, *encode_map(tokens, kept.encoding))
        gaps[f"map {name}"] = _gap(kept.to_array(), again.to_array())
    what = max(gaps, key=lambda k: gaps[k])
    return gaps[what], what


def _gap(stored: np.ndarray, now: np.ndarray) -> float:
    """Mean absolute difference over the standard deviation."""
    if stored.shape != now.shape:
        return float("inf")
    spread = max(float(now.astype(np.float32).std()), 1e-12)
    return float(np.abs(stored.astype(np.float32) - now.astype(np.float32)).mean()) / spread
