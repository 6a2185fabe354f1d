"""The machinery of extract: decoding ahead, the detector, encoding and writing behind it."""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import roi_align

from mfdetr_cache.boxes import cxcywh_to_xyxy, scale_boxes
from mfdetr_cache.cache.creation import CacheContent
from mfdetr_cache.cache.schema import C1Mode, C1RoiLayout, Compression, Part, stored_maps
from mfdetr_cache.cache.storage import Location
from mfdetr_cache.cache.writer import WHOLE, CacheWriter, EncodedImage, Partition
from mfdetr_cache.coco.annotations import CocoSplit
from mfdetr_cache.coco.augmentation import Policy, transform_image
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.devices import threads_beside_gpu, torch_device
from mfdetr_cache.errors import (
    ImageError,
    StoppedError,
)
from mfdetr_cache.head.c1_crops import moments_of
from mfdetr_cache.memory import keep_freed_memory
from mfdetr_cache.protocols import Detector, Reporter
from mfdetr_cache.quantisation import Preset, StoredMap
from mfdetr_cache.training.regions import hungarian_queries, with_least_side
from mfdetr_cache.types import C1Crops, DetectorOutput, GroundTruth, ImageGeometry
from mfdetr_pipelines.cluster import Cluster

_PREFETCH = 8
# Threads that quantise and compress while a GPU computes.
_MOST_ENCODERS = 8


@dataclass(frozen=True, slots=True)
class ExtractConfig:
    """What ``mfdetr extract`` is told.

    Attributes:
        detector: Name of the detector.
        weights: Its folder, file or hub id.
        images: Image folder.
        annotations: COCO instances JSON.
        cache: Where the cache goes.
        limit: Only the first so many images.
        device: Where the detector runs.
        options: What the user chose about the detector.
        preset: How the maps are stored.
        compression: How chunks are compressed.
        c1: Keep C1 whole, as crops around matched queries, or not at all.
        roi_size: Cells of a crop, for ``roi``.
        roi_sampling_ratio: RoIAlign samples per bin, for ``roi``; 0 adapts to the box.
        views: How many augmented passes beside the plain one.
        policy: How the pictures of these are made.
        view_seed: Of the augmentation.
        on_bad_image: Stop at an unreadable image, or leave it out.
        force: Start although the disk looks too small.
        partition: Which parts of the cache this process fills.
        engine: Fill them in this process, or as tasks on a Ray cluster.
        cluster: Which cluster.
    """

    detector: str
    weights: str
    images: Path
    annotations: Path
    cache: Location
    limit: int | None = None
    device: str = "cpu"
    options: DetectorOptions = field(default_factory=DetectorOptions)
    preset: Preset = "int8"
    compression: Compression = "zstd"
    c1: C1Mode = "full"
    roi_size: int = 32
    roi_sampling_ratio: int = 0
    views: int = 0
    policy: Policy = "deformable-detr"
    view_seed: int = 0
    on_bad_image: Literal["stop", "skip"] = "stop"
    force: bool = False
    partition: Partition = WHOLE
    engine: Literal["local", "ray"] = "local"
    cluster: Cluster = field(default_factory=Cluster)


@dataclass
class _Decoded:
    """An image on its way to the detector, or the reason why there is none."""

    geometry: ImageGeometry
    pixel_values: Tensor | None
    problem: str


@dataclass
class _Item:
    """One image on its way to the writer; one that is never encoded is left out."""

    part: Part
    row: int
    encoded: Future[EncodedImage] | None
    problem: str = ""


def num_encoders(device: torch.device) -> int:
    """How many threads quantise and compress.

    Args:
        device: Where the detector runs.

    Returns:
        One beside a CPU, whose cores are the detector's; several beside a GPU, which gives images
        faster than one thread compresses them.
    """
    if device.type == "cpu":
        return 1
    return threads_beside_gpu(_MOST_ENCODERS)


def c1_crops(
    output: DetectorOutput, truth: GroundTruth, geometry: ImageGeometry, layout: C1RoiLayout
) -> C1Crops:
    """RoIAligned crops of C1 for the queries that Hungarian matching trains on.

    Args:
        output: The detector's output for one image.
        truth: Its annotated objects.
        geometry: Its sizes.
        layout: Size and sampling of the crops.

    Returns:
        Crops, and the moments of the whole map.
    """
    c1 = output.maps["c1"]
    boxes = output.boxes_cxcywh_norm[0].cpu()
    queries = hungarian_queries(output.class_logits[0].cpu(), boxes, truth, geometry.original_hw)
    chosen = with_least_side(cxcywh_to_xyxy(boxes)[queries].numpy())
    corners = scale_boxes(torch.from_numpy(chosen), geometry.resized_hw)
    rois = torch.cat((torch.zeros(len(queries), 1), corners), dim=1).to(c1)
    size = layout.roi_size
    crops = roi_align(c1, rois, (size, size), 1 / 4, layout.sampling_ratio or -1, aligned=True)
    below = crops.permute(0, 2, 3, 1).reshape(len(queries) * size, size, c1.shape[1])
    return C1Crops(
        query_index=queries,
        crops=StoredMap.plain(below.cpu().numpy()),
        moments=moments_of(c1.double())[0].float().cpu().numpy(),
        c1_hw=(int(c1.shape[-2]), int(c1.shape[-1])),
    )


class Extraction:
    """Decoding ahead, the detector in this thread, encoding and writing behind it, in order."""

    def __init__(
        self,
        config: ExtractConfig,
        split: CocoSplit,
        content: CacheContent,
        detector: Detector,
        writer: CacheWriter,
        reporter: Reporter,
    ) -> None:
        self._config = config
        self._split = split
        self._content = content
        self._device = torch_device(config.device)
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

    def run(self, pending: Sequence[Part]) -> None:
        """Extract some parts.

        Args:
            pending: Which.
        """
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
            self._failure = StoppedError(
                "stopped; sealed parts are kept, the same command goes on from there"
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
        entry = self._split.images[row]
        transform = self._content.views[view].transforms[row]
        edge = transform.shortest_edge
        geometry = self._detector.input_geometry(transform.size_hw, edge)
        try:
            image = load_image(self._config.images / entry.file_name, entry.size_hw)
        except ImageError as error:
            return _Decoded(geometry, None, str(error))
        pixels = self._detector.preprocess(transform_image(image, transform), edge)
        return _Decoded(geometry, pixels, "")

    def _decode_ahead(self, ordered: list[tuple[Part, int]]) -> Iterator[_Decoded]:
        with ThreadPoolExecutor(2, "decode") as pool:
            waiting: list[Future[_Decoded]] = []
            for part, row in ordered:
                waiting.append(pool.submit(self._decode, part.view, row))
                if len(waiting) >= _PREFETCH:
                    yield waiting.pop(0).result()
            for future in waiting:
                yield future.result()

    def _item_of(self, part: Part, row: int, decoded: _Decoded) -> _Item:
        if decoded.pixel_values is None:
            if self._config.on_bad_image == "stop":
                raise ImageError(f"{decoded.problem} (--on-bad-image skip leaves such images out)")
            self._reporter.warn(f"skipped: {decoded.problem}")
            return _Item(part, row, None, decoded.problem)
        started = time.perf_counter()
        output = self._detector.forward(decoded.pixel_values[None].to(self._device))
        crops = None
        if self._content.layout.c1_roi is not None:
            truth = self._content.views[part.view].ground_truth[row]
            crops = c1_crops(output, truth, decoded.geometry, self._content.layout.c1_roi)
        kept = {m.name for m in stored_maps(self._content.spec, self._content.layout)}
        on_cpu = DetectorOutput(
            output.class_logits.cpu(),
            output.boxes_cxcywh_norm.cpu(),
            output.queries.cpu(),
            {name: values.cpu() for name, values in output.maps.items() if name in kept},
        )
        self.detector_seconds += time.perf_counter() - started
        self.num_extracted += 1
        encode = self._writer.encode
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
