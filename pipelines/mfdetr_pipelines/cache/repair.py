"""Cache repair: extract again what is broken or missing, and nothing else."""

import contextlib
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from mfdetr_cache.cache.annotations import AnnotationHeader, header_of, write_annotations
from mfdetr_cache.cache.creation import CacheContent, create_cache
from mfdetr_cache.cache.foundation import FOUNDATION_KEY, Opened, read_opened
from mfdetr_cache.cache.locks import locked
from mfdetr_cache.cache.manifest import manifest_key, read_manifest
from mfdetr_cache.cache.root import Root
from mfdetr_cache.cache.schema import Part
from mfdetr_cache.cache.storage.local import LocalStorage
from mfdetr_cache.cache.storage.open import open_storage
from mfdetr_cache.cache.storage.protocol import Storage
from mfdetr_cache.cache.verify import (
    annotation_versions,
    check_annotations,
    check_foundation,
    check_part,
)
from mfdetr_cache.cache.writer import CacheWriter, other_annotations, require_same_features
from mfdetr_cache.coco.annotations import load_coco_split
from mfdetr_cache.coco.labelled import label_split
from mfdetr_cache.coco.options import LabelOptions
from mfdetr_cache.detectors.options import options_of
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.errors import CacheError
from mfdetr_cache.extraction.content import choices_of, plan_cache
from mfdetr_cache.extraction.stream import Extraction
from mfdetr_cache.identity import detector_identity
from mfdetr_cache.ops.devices import torch_device
from mfdetr_cache.reporter import Reporter
from mfdetr_pipelines.cache.verify import run_verify
from mfdetr_pipelines.config.cache import RepairConfig, VerifyConfig


@dataclass(frozen=True, slots=True)
class RepairSummary:
    """What was mended.

    Attributes:
        parts: Parts that were extracted again.
        foundation_files: Files from the creation of the cache that were written again.
        whole: Whether a full check found no fault afterwards.
    """

    faults: tuple[str, ...]
    parts: tuple[Part, ...]
    foundation_files: int
    num_images: int
    whole: bool


def run_repair(config: RepairConfig, reporter: Reporter) -> RepairSummary:
    """Find every fault, then run the cache's own extraction for these parts.

    CacheError if weights or annotations are not those of the cache, or another process writes it;
    nothing was changed then.
    """
    storage = open_storage(config.cache)
    opened = read_opened(storage)
    root = opened.root
    # What another process seals meanwhile must not be taken for broken.
    with locked(storage):
        found = run_verify(VerifyConfig(storage, full=True), reporter)
        if not found.faults:
            return RepairSummary((), (), 0, 0, whole=True)
        # What cannot be used was left out when the cache was made, or nothing had been extracted.
        rows = root.layout.num_rows
        split = load_coco_split(
            config.annotations, config.images, on_bad="skip", limit=rows, needs="nothing"
        )
        options = options_of(detector_identity(root.spec))
        detector = load_detector(root.spec.detector, config.weights, options)
        known = _labels_of_file(storage, root, split.sha256)
        if known is not None:
            # The file may have been renamed since.
            split = replace(split, name=str(known.source["name"]))
        chosen = None if known is None else LabelOptions.of(known.source)
        labelled = label_split(split, detector.spec, chosen)
        planned = plan_cache(labelled, detector, *choices_of(root))
        content = replace(planned, root=replace(planned.root, layout=root.layout))
        # Before anything is touched: another detector or dataset could only make it worse.
        require_same_features(storage, root, content)
        versions = _broken_versions(storage, root, content)
        mended = _mend_foundation(storage, opened, content) + len(versions)
        for number in versions:
            write_annotations(storage, root, number, content.labels)
        for part in found.broken_parts:
            # An object store has no locks: the part may have been written again since.
            if check_part(storage, root, part, full=True).faults:
                storage.delete(manifest_key(part))
        writer = CacheWriter(storage, content)
        device, skip_bad = torch_device(config.device), _has_skipped(storage, root)
        extraction = Extraction(
            config.images, detector, device, writer, reporter, skip_bad=skip_bad
        )
        extracted = extraction.run(writer.pending_parts())
        whole = not run_verify(VerifyConfig(storage, full=True), reporter).faults
    return RepairSummary(found.faults, found.broken_parts, mended, extracted.num_images, whole)


def _labels_of_file(storage: Storage, root: Root, sha256: str) -> AnnotationHeader | None:
    """The newest labels that a cache has from a file, without their objects."""
    for number in reversed(annotation_versions(storage)):
        header = header_of(storage, root, number)
        if header is not None and header.source["sha256"] == sha256:
            return header
    return None


def _has_skipped(storage: Storage, root: Root) -> bool:
    """Whether images were left out, as far as the manifests can still be read."""
    for part in root.layout.parts:
        with contextlib.suppress(CacheError):
            manifest = read_manifest(storage, root, part)
            if manifest is not None and manifest.skipped:
                return True
    return False


def _broken_versions(storage: Storage, root: Root, content: CacheContent) -> list[int]:
    """Damaged versions of the annotations that the given annotation file can mend."""
    ours, others, found = content.labels.annotations_id, [], []
    is_known = False
    for number in annotation_versions(storage):
        header = header_of(storage, root, number)
        if header is None or header.annotations_id != ours:
            others.append("unknown ones" if header is None else str(header.source["name"]))
            continue
        is_known = True
        if check_annotations(storage, root, number, full=True):
            found.append(number)
    if not is_known:
        raise other_annotations(storage, others)
    return found


def _mend_foundation(storage: Storage, opened: Opened, content: CacheContent) -> int:
    """Write what creation wrote again, elsewhere, and take over the files that are broken."""
    if not check_foundation(storage, opened, full=True):
        return 0
    mended = 0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        fresh = LocalStorage(Path(temporary) / "cache")
        create_cache(fresh, content)
        for key in (*read_opened(fresh).foundation.files, FOUNDATION_KEY):
            wanted = fresh.read(key)
            if storage.size(key) != len(wanted) or storage.read(key) != wanted:
                storage.write(key, [wanted])
                mended += 1
    return mended
