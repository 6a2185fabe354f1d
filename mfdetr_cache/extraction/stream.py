"""Extraction pipeline: decoding, the detector, encoding and writing run concurrently."""

import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mfdetr_cache.cache.creation import CacheContent
from mfdetr_cache.cache.encoder import EncodedImage
from mfdetr_cache.cache.schema import BASE_VIEW, Part, stored_maps
from mfdetr_cache.cache.writer import CacheWriter
from mfdetr_cache.coco.annotations import CocoSplit
from mfdetr_cache.coco.augmentation import transform_image
from mfdetr_cache.coco.options import CLASS_AGNOSTIC
from mfdetr_cache.detectors.images import load_with_oddities
from mfdetr_cache.detectors.protocol import Detector
from mfdetr_cache.errors import (
    ImageError,
    StoppedError,
)
from mfdetr_cache.matching.crops import c1_crops
from mfdetr_cache.ops.any_class import any_class
from mfdetr_cache.ops.cores import threads_beside_gpu
from mfdetr_cache.ops.devices import keep_freed_memory
from mfdetr_cache.read_ahead import read_ahead
from mfdetr_cache.reporter import Reporter
from mfdetr_cache.types import ImageGeometry

_PREFETCH = 8


# Threads that quantise and compress while a GPU computes.
_MOST_ENCODERS = 8


@dataclass(frozen=True, slots=True)
class ImageSource:
    """The images of an extraction.

    Attributes:
        split: The dataset.
        folder: Image folder.
        skip_bad: Skip an image that cannot be read, instead of stopping.
    """

    split: CocoSplit
    folder: Path
    skip_bad: bool = False


@dataclass
class _Decoded:
    """An image on its way to the detector, or the reason why there is none."""

    geometry: ImageGeometry
    pixel_values: Tensor | None
    problem: str
    oddities: tuple[str, ...] = ()


@dataclass
class _Item:
    """One image on its way to the writer; one that is never encoded is left out."""

    part: Part
    row: int
    encoded: Future[EncodedImage] | None
    problem: str = ""


def num_encoders(device: torch.device) -> int:
    """Number of threads that quantise and compress.

    One beside a CPU, whose cores the detector uses; several beside a GPU, which outputs images
    faster than one thread compresses them.
    """
    if device.type == "cpu":
        return 1
    return threads_beside_gpu(_MOST_ENCODERS)


class Extraction:
    """Decodes images ahead, runs the detector in this thread, encodes and writes in order."""

    def __init__(
        self,
        source: ImageSource,
        content: CacheContent,
        detector: Detector,
        device: torch.device,
        writer: CacheWriter,
        reporter: Reporter,
    ) -> None:
        self._source = source
        self._content = content
        self._device = device
        keep_freed_memory()
        self._detector = detector.to(self._device)
        self._writer = writer
        self._reporter = reporter
        self._work: queue.Queue[_Item | None]
        self._work = queue.Queue(maxsize=_PREFETCH)
        self._encoders = ThreadPoolExecutor(num_encoders(self._device), "encode")
        self._failure: BaseException | None = None
        self.num_extracted = 0
        self.num_bytes = 0
        self.detector_seconds = 0.0
        self._oddities: Counter[str] = Counter()
        self._num_sealed = 0

    def run(self, pending: Sequence[Part]) -> None:
        """Extract the parts that are pending."""
        total = self._writer.num_rows
        layout_rows = [self._writer.rows_of_part(part) for part in pending]
        todo = sum(len(rows) for rows in layout_rows)
        self._reporter.start("extract", total, "images", done=total - todo)
        writing = threading.Thread(target=self._write, name="cache-writer", daemon=True)
        writing.start()
        try:
            ordered = [(p, r) for p, rows in zip(pending, layout_rows, strict=True) for r in rows]
            for (part, row), decoded in zip(ordered, self._decode_ahead(ordered), strict=True):
                self._put(self._item_of(part, row, decoded))
            self._put(None)
        except KeyboardInterrupt:
            kept = total - todo + self._num_sealed
            self._failure = StoppedError(
                f"stopped: {kept} of {total} images are kept in sealed parts, the same command "
                "goes on from there"
            )
            raise self._failure from None
        except BaseException:
            # What is queued belongs to a part that cannot be finished; let the thread go.
            self._failure = self._failure or RuntimeError("extraction stopped")
            raise
        finally:
            writing.join()
            self._encoders.shutdown(cancel_futures=True)
            self._reporter.finish()
        if self._failure is not None:
            raise self._failure

    def tell_oddities(self) -> None:
        """Warn of image files that can be read and perhaps are not what they seem."""
        for what, count in self._oddities.items():
            self._reporter.warn(f"{count} {what}")

    def _put(self, item: _Item | None) -> None:
        while True:
            if self._failure is not None:
                raise self._failure
            try:
                self._work.put(item, timeout=0.2)
            except queue.Full:
                continue
            return

    def _decode(self, view: str, row: int) -> _Decoded:
        entry = self._source.split.images[row]
        transform = self._content.views[view].transforms[row]
        edge = transform.shortest_edge
        geometry = self._detector.input_geometry(transform.size_hw, edge)
        try:
            loaded = load_with_oddities(self._source.folder / entry.file_name, entry.size_hw)
        except ImageError as error:
            return _Decoded(geometry, None, str(error))
        pixels = self._detector.preprocess(transform_image(loaded.image, transform), edge)
        return _Decoded(geometry, pixels, "", loaded.oddities)

    def _decode_ahead(self, ordered: list[tuple[Part, int]]) -> Iterator[_Decoded]:
        with ThreadPoolExecutor(2, "decode") as pool:
            yield from read_ahead(
                lambda item: pool.submit(self._decode, item[0].view, item[1]).result,
                ordered,
                _PREFETCH,
            )

    def _item_of(self, part: Part, row: int, decoded: _Decoded) -> _Item:
        if decoded.pixel_values is None:
            if not self._source.skip_bad:
                raise ImageError(f"{decoded.problem} (--on-bad-image skip leaves such images out)")
            self._reporter.warn(f"skipped: {decoded.problem}")
            return _Item(part, row, None, decoded.problem)
        if part.view == BASE_VIEW:
            self._oddities.update(decoded.oddities)
        started = time.perf_counter()
        output = self._detector.forward(decoded.pixel_values[None].to(self._device))
        crops = None
        if self._content.layout.c1_roi is not None:
            truth = self._content.views[part.view].ground_truth[row]
            seen = output
            if self._content.annotations.get(CLASS_AGNOSTIC):
                logits = any_class(output.class_logits, self._content.spec.score_function)
                seen = replace(output, class_logits=logits)
            crops = c1_crops(seen, truth, decoded.geometry, self._content.layout.c1_roi)
        kept = {m.name for m in stored_maps(self._content.spec, self._content.layout)}
        on_cpu = output.cpu(kept)
        self.detector_seconds += time.perf_counter() - started
        self.num_extracted += 1
        encode = self._writer.encoder.encode
        return _Item(part, row, self._encoders.submit(encode, row, decoded.geometry, on_cpu, crops))

    def _write(self) -> None:
        """The writer thread: one part after the other, sealed when its last row is in."""
        open_part: Part | None = None
        try:
            while self._failure is None:
                try:
                    item = self._work.get(timeout=0.2)
                except queue.Empty:
                    continue
                if item is None or item.part != open_part:
                    if open_part is not None:
                        self._writer.seal_part()
                        self._num_sealed += len(self._writer.rows_of_part(open_part))
                    if item is None:
                        return
                    open_part = item.part
                    self._writer.begin_part(open_part)
                if item.encoded is None:
                    self._writer.skip(item.row, item.problem)
                    self._reporter.advance()
                else:
                    added = self._writer.add(item.row, item.encoded.result())
                    self.num_bytes += added
                    self._reporter.advance(num_bytes=added)
        except BaseException as error:
            self._failure = error
