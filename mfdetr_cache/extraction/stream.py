"""Extraction pipeline: decoding, the detector, encoding and writing run concurrently."""

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from mfdetr_cache.cache.encoder import EncodedImage
from mfdetr_cache.cache.schema import BASE_VIEW, Part, stored_maps
from mfdetr_cache.cache.writer import CacheWriter
from mfdetr_cache.coco.augmentation import transform_image
from mfdetr_cache.coco.options import CLASS_AGNOSTIC
from mfdetr_cache.detectors.images import load_with_oddities
from mfdetr_cache.detectors.protocol import Detector
from mfdetr_cache.errors import ImageError, StoppedError
from mfdetr_cache.extraction.batches import batches_of_part
from mfdetr_cache.extraction.host_copy import HostCopy
from mfdetr_cache.matching.crops import c1_crops
from mfdetr_cache.ops.any_class import any_class
from mfdetr_cache.ops.cores import threads_beside_gpu
from mfdetr_cache.ops.devices import DeviceTime, keep_freed_memory, to_device
from mfdetr_cache.ops.quantisation import ENCODINGS
from mfdetr_cache.read_ahead import read_ahead
from mfdetr_cache.reporter import Reporter
from mfdetr_cache.types import C1Crops, DetectorOutput, ImageGeometry

# Images that are decoded before their batch is complete; encoded ones that wait to be written.
_PREFETCH = 8
# Threads that decode beside a CPU.
_DECODERS = 2
# Threads that quantise and compress while a GPU computes.
_MOST_ENCODERS = 8
# Parts that are written to disk while the next one is filled.
_PUBLISHED_AT_ONCE = 2


@dataclass
class _Decoded:
    """An image on its way to the detector; a black one, and why, where it cannot be read.

    The other rows of its batch then have the same bytes once that image has been mended.
    """

    geometry: ImageGeometry
    pixel_values: Tensor
    file_bytes: int = 0
    problem: str = ""
    oddities: tuple[str, ...] = ()
    untold: int = 1


@dataclass
class Extracted:
    """What an extraction came to.

    Attributes:
        detector_seconds: Time in which the device computed.
        oddities: Kinds of image files that can be read and perhaps are not what they seem, and how
            many there were.
        told: The warning of the first image of each kind, and of each that was left out.
        untold: EXIF orientation of rows that were perhaps annotated before it was applied.
    """

    num_images: int = 0
    num_bytes: int = 0
    detector_seconds: float = 0.0
    oddities: Counter[str] = field(default_factory=Counter)
    told: dict[str, str] = field(default_factory=dict)
    untold: dict[int, int] = field(default_factory=dict)

    def add(self, other: "Extracted") -> None:
        """Add what another process came to."""
        self.num_images += other.num_images
        self.num_bytes += other.num_bytes
        self.detector_seconds += other.detector_seconds
        self.oddities += other.oddities
        self.told = other.told | self.told
        self.untold |= other.untold


# Rows of a part whose images go through the detector together.
_Batch = tuple[Part, tuple[int, ...]]


@dataclass
class _Item:
    """One image on its way to the writer; one that is never encoded is left out."""

    part: Part
    row: int
    encoded: Future[EncodedImage] | None
    problem: str = ""
    file_bytes: int = 0


def num_encoders(device: torch.device) -> int:
    """Number of threads that quantise and compress: one beside a CPU, whose cores are in use."""
    return 1 if device.type == "cpu" else threads_beside_gpu(_MOST_ENCODERS)


def num_decoders(device: torch.device) -> int:
    """Number of threads that read and preprocess images."""
    return _DECODERS if device.type == "cpu" else max(_DECODERS, num_encoders(device))


class Extraction:
    """Decodes images ahead, runs the detector in this thread, encodes and writes in order.

    ``images`` is their folder; ``skip_bad`` goes on where one cannot be read.
    """

    def __init__(
        self,
        images: Path,
        detector: Detector,
        device: torch.device,
        writer: CacheWriter,
        reporter: Reporter,
        *,
        skip_bad: bool = False,
    ) -> None:
        keep_freed_memory()
        self._images, self._skip_bad = images, skip_bad
        self._device, self._detector = device, detector.to(device)
        self._writer, self._content = writer, writer.content
        self._reporter = reporter
        self._encoders = ThreadPoolExecutor(num_encoders(device), "encode")
        self._publishers = ThreadPoolExecutor(_PUBLISHED_AT_ONCE, "publish")
        self._publishing: deque[tuple[Part, Future[int]]] = deque()
        self._part: Part | None = None
        self._has_failed = False
        self._found = Extracted()
        self._busy = DeviceTime(device)
        root = self._content.root
        kept = stored_maps(root.spec, root.layout)
        self._kept = [m.name for m in kept if m.role != "c1_roi"]
        self._encoding = ENCODINGS[root.layout.preset]
        self._num_sealed = 0

    def run(self, pending: Sequence[Part]) -> Extracted:
        """Extract the parts that are pending."""
        tell_changed_images(self._writer, self._images, self._reporter)
        total = self._writer.num_rows
        todo = sum(len(self._writer.rows_of_part(part)) for part in pending)
        self._reporter.start("extract", total, "images", done=total - todo)
        writing = ThreadPoolExecutor(1, "cache-writer")
        batches = [(part, rows) for part in pending for rows in self._batches_of(part)]
        # A GPU computes a batch while the one before is encoded and the next one is decoded.
        ahead = 1 if self._device.type == "cpu" else 2
        depth = _PREFETCH + ahead * max((len(rows) for _, rows in batches), default=0)
        written = read_ahead(
            lambda item: writing.submit(self._write, item).result,
            self._in_order(batches, depth),
            _PREFETCH if self._device.type == "cpu" else depth,
        )
        try:
            for _ in written:
                pass
            writing.submit(self._seal).result()
            self._await_published(0)
        except KeyboardInterrupt:
            writing.shutdown(cancel_futures=True)
            self._await_published(0)
            kept = total - todo + self._num_sealed
            raise StoppedError(
                f"stopped: {kept} of {total} images are kept in sealed parts, the same command "
                "goes on from there"
            ) from None
        finally:
            # What is queued belongs to a part that cannot be finished.
            writing.shutdown(cancel_futures=True)
            self._encoders.shutdown(cancel_futures=True)
            self._publishers.shutdown()
            self._reporter.finish()
        self._found.detector_seconds = self._busy.seconds
        return self._found

    def _decode(self, view: str, row: int) -> _Decoded:
        entry = self._content.images[row]
        transform, geometry = self._content.transforms[view][row], self._geometry(view, row)
        path = self._images / entry.file_name
        try:
            loaded = load_with_oddities(path, entry.size_hw)
            file_bytes = path.stat().st_size
        except ImageError as error:
            return _Decoded(geometry, torch.zeros(3, *geometry.input_hw), problem=str(error))
        picture = transform_image(loaded.image, transform)
        pixels = self._detector.preprocess(picture, transform.shortest_edge)
        if self._device.type == "cuda":
            # From here a GPU copies by itself.
            pixels = pixels.pin_memory()
        return _Decoded(geometry, pixels, file_bytes, "", loaded.oddities, loaded.untold)

    def _in_order(self, batches: Sequence[_Batch], depth: int) -> Iterator[_Item]:
        """All rows of the batches' parts in order; what a batch gives too early waits."""
        parts = dict.fromkeys(part for part, _ in batches)
        expected = (row for part in parts for row in self._writer.rows_of_part(part))
        early: dict[int, _Item] = {}
        row = next(expected, None)
        for batch, decoded in zip(batches, self._decode_ahead(batches, depth), strict=True):
            early |= {item.row: item for item in self._items_of(batch, decoded)}
            while row in early:
                yield early.pop(row)
                row = next(expected, None)

    def _batches_of(self, part: Part) -> list[tuple[int, ...]]:
        rows = self._writer.rows_of_part(part)
        inputs_hw = [self._geometry(part.view, row).input_hw for row in rows]
        return batches_of_part(rows, inputs_hw, self._device)

    def _geometry(self, view: str, row: int) -> ImageGeometry:
        transform = self._content.transforms[view][row]
        return self._detector.input_geometry(transform.size_hw, transform.shortest_edge)

    def _decode_ahead(self, batches: Sequence[_Batch], depth: int) -> Iterator[list[_Decoded]]:
        """The images of each batch, ``depth`` images at a time."""
        ordered = [(part.view, row) for part, rows in batches for row in rows]
        with ThreadPoolExecutor(num_decoders(self._device), "decode") as pool:
            decoded = read_ahead(
                lambda item: pool.submit(self._decode, *item).result, ordered, depth
            )
            for _, rows in batches:
                yield list(itertools.islice(decoded, len(rows)))

    def _items_of(self, batch: _Batch, images: list[_Decoded]) -> Iterator[_Item]:
        """Run the detector on a batch and begin to encode what it gives."""
        for image in images:
            if image.problem and not self._skip_bad:
                raise ImageError(f"{image.problem} (--on-bad-image skip leaves such images out)")
        part, rows = batch
        output = self._output_of(images)
        copy = HostCopy(output, self._kept, self._encoding)
        for index, (row, image) in enumerate(zip(rows, images, strict=True)):
            if image.problem:
                self._tell(image.problem, f"skipped: {image.problem}")
                yield _Item(part, row, None, image.problem)
                continue
            if part.view == BASE_VIEW:
                self._note(row, image.oddities)
                if image.untold > 1:
                    self._found.untold[row] = image.untold
            crops = self._crops_of(part.view, row, image.geometry, output.of_image(index))
            encoded = self._encoders.submit(self._encode, row, image.geometry, copy, index, crops)
            self._found.num_images += 1
            yield _Item(part, row, encoded, file_bytes=image.file_bytes)

    def _note(self, row: int, oddities: tuple[str, ...]) -> None:
        """Count what is odd about a file; the first of a kind is told at once, not after hours."""
        for what in oddities:
            self._tell(what, f"{self._content.images[row].file_name} is the first of {what}")
        self._found.oddities.update(oddities)

    def _tell(self, what: str, warning: str) -> None:
        if what not in self._found.told:
            self._found.told[what] = warning
            self._reporter.warn(warning)

    def _output_of(self, images: list[_Decoded]) -> DetectorOutput:
        """What the detector gives for a batch; a GPU may still be computing it."""
        with self._busy.measured():
            pixels = [to_device(image.pixel_values, self._device) for image in images]
            return self._detector.forward(torch.stack(pixels))

    def _encode(
        self, row: int, geometry: ImageGeometry, copy: HostCopy, index: int, crops: C1Crops | None
    ) -> EncodedImage:
        output, maps = copy.of_image(index)
        return self._writer.encoder.encode(row, geometry, output, crops, maps)

    def _crops_of(
        self, view: str, row: int, geometry: ImageGeometry, output: DetectorOutput
    ) -> C1Crops | None:
        """Crops of C1 around the queries that its objects match, where these are stored."""
        layout = self._content.root.layout.c1_roi
        if layout is None:
            return None
        with self._busy.measured():
            if self._content.labels.source.get(CLASS_AGNOSTIC):
                logits = any_class(output.class_logits, self._content.root.spec.score_function)
                output = replace(output, class_logits=logits)
            return c1_crops(output, self._content.labels.objects[view][row], geometry, layout)

    def _write(self, item: _Item) -> None:
        """In the writer's thread: one part after the other, sealed when its last row is in."""
        if self._has_failed:
            return
        try:
            if item.part != self._part:
                self._seal()
                self._part = item.part
                self._writer.begin_part(item.part)
            added = 0
            if item.encoded is None:
                self._writer.skip(item.row, item.problem)
            else:
                added = self._writer.add(item.row, item.encoded.result(), item.file_bytes)
            self._found.num_bytes += added
            self._reporter.advance(num_bytes=added)
        except BaseException:
            self._has_failed = True
            raise

    def _seal(self) -> None:
        """Publish the part that is filled, beside the next one."""
        if self._part is not None:
            self._await_published(_PUBLISHED_AT_ONCE - 1)
            publishing = self._publishers.submit(self._writer.publish, self._writer.end_part())
            self._publishing.append((self._part, publishing))
            self._part = None

    def _await_published(self, most: int) -> None:
        """Wait until ``most`` parts are being published; raises what went wrong with one."""
        while len(self._publishing) > most:
            part, publishing = self._publishing.popleft()
            publishing.result()
            self._num_sealed += len(self._writer.rows_of_part(part))


def tell_changed_images(writer: CacheWriter, images: Path, reporter: Reporter) -> None:
    """Warn of image files that are no longer those whose features a cache has already."""
    entries = writer.content.images
    sizes = writer.sizes_of_images
    if told := told_of_changed_images(sizes, lambda row: entries[row].file_name, images):
        reporter.warn(told)


def told_of_changed_images(
    sizes: Sequence[tuple[int, int]], name_of: Callable[[int], str], images: Path
) -> str:
    """What to say of image files that are not of the size in bytes they had; empty if all are."""
    # One that is gone is told where it is needed.
    paths = ((images / name_of(row), size) for row, size in sizes)
    changed = sorted({p for p, size in paths if p.is_file() and p.stat().st_size != size})
    if not changed:
        return ""
    return (
        f"{len(changed)} images have another size in bytes than when they were extracted, the "
        f"first is {changed[0]}: the cache keeps the features of the files before; if these show "
        "something else, extract into another --cache"
    )
