"""Plan: bytes and hours of a cache, and the number of trainings after which it pays off."""

import math
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mfdetr_cache.cache.schema import c1_channels, kept_maps
from mfdetr_cache.cache.shards import encode_chunk
from mfdetr_cache.choices import Preset
from mfdetr_cache.coco.annotations import CocoSplit, load_coco_split
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.detectors.protocol import Detector
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.errors import CacheError
from mfdetr_cache.extraction.batches import batches_of_part
from mfdetr_cache.extraction.options import MapOptions
from mfdetr_cache.extraction.stream import num_encoders
from mfdetr_cache.files import forget_cached_pages
from mfdetr_cache.head.batch import HeadBatch, MapGroup
from mfdetr_cache.head.build import build_head
from mfdetr_cache.ops.devices import keep_freed_memory, torch_device
from mfdetr_cache.ops.quantisation import ENCODINGS, Encoding, encode_map
from mfdetr_cache.reporter import Reporter
from mfdetr_cache.training.recipes import Recipe
from mfdetr_cache.types import DetectorOutput, DetectorSpec, MapSpec
from mfdetr_pipelines.config.plan import PlanConfig

_BLOCK = 64 * 2**20
# COCO has 7.3 objects an image; a training step sees about so many regions of each.
_REGIONS = 8


@dataclass(frozen=True, slots=True)
class PresetPlan:
    """Cost of one preset.

    Attributes:
        ratio: Uncompressed over stored bytes, measured.
        bytes_per_image: Stored bytes per image and view.
        encode_seconds: Mean time to quantise and compress an image on one thread.
        extract_hours: The slowest of detector, encoding threads and disk.
        cached_hours: Of one training: the slower of head and disk.
        pays_after: Number of trainings after which the cache has cost less time than live training;
            None if never.
    """

    preset: Preset
    ratio: float
    bytes_per_image: float
    total_bytes: float
    fits: bool
    encode_seconds: float
    extract_hours: float
    cached_hours: float
    pays_after: int | None


@dataclass(frozen=True, slots=True)
class Plan:
    """Measurements and the plans that follow from them.

    Attributes:
        views: Passes per image.
        detector_seconds: Mean per image, in the batches of an extraction.
        head_seconds: Mean of a training step per image.
        epochs: Length of one training.
        live_hours: Of one training with the detector in the loop.
    """

    images: int
    views: int
    sample: int
    detector_seconds: float
    head_seconds: float
    disk: str
    free_bytes: int
    write_bytes_per_second: float
    read_bytes_per_second: float
    epochs: float
    live_hours: float
    presets: tuple[PresetPlan, ...]


def run_plan(config: PlanConfig, reporter: Reporter) -> Plan:
    """Measure detector, head and disk on a sample, and extrapolate to the dataset.

    Leaves no files. Raises DatasetError, DetectorError, or CacheError if the disk cannot be
    written.
    """
    split = load_coco_split(
        config.annotations,
        config.images,
        on_bad=config.on_bad_annotation,
        needs="nothing",
    )
    split.tell_faults(reporter)
    device = torch_device(config.device)
    keep_freed_memory()  # as extraction does
    names = [category.name for category in split.categories]
    detector = load_detector(config.detector, config.weights, config.options, names).to(device)
    reporter.say(f"measuring on {config.sample} images")
    outputs, detector_seconds = _sample(config, split, detector, device, reporter)
    head_seconds = _head_seconds(config.recipe, detector.spec, outputs, device)
    wanted = (config.disk or Path.cwd()).absolute()
    folder = next(p for p in (wanted, *wanted.parents) if p.exists())
    reporter.say(f"writing to {folder} for {config.disk_seconds:g} s")
    write_speed, read_speed = disk_speed(folder, config.disk_seconds)
    free = shutil.disk_usage(folder).free
    passes = 1 + config.views.count
    count = len(split.images)
    train = config.recipe.train
    epochs = config.epochs or train.steps * train.batch_size / count
    shown = epochs * count
    live = shown * (detector_seconds + head_seconds) / 3600
    presets = []
    for preset, encoding in ENCODINGS.items():
        ratio, encode = _encoding(outputs, kept_maps(detector.spec, config.maps.c1), encoding)
        each = _mean_bytes(split, detector, encoding, config.maps) / ratio
        total = each * count * passes
        slowest = max(detector_seconds, encode / num_encoders(device), each / write_speed)
        extract = count * passes * slowest / 3600
        cached = shown * max(head_seconds, each / read_speed) / 3600
        pays = math.ceil(extract / (live - cached)) if live > cached else None
        fits = total < free
        presets.append(PresetPlan(preset, ratio, each, total, fits, encode, extract, cached, pays))
    return Plan(
        images=count,
        views=passes,
        sample=len(outputs),
        detector_seconds=detector_seconds,
        head_seconds=head_seconds,
        disk=str(folder),
        free_bytes=free,
        write_bytes_per_second=write_speed,
        read_bytes_per_second=read_speed,
        epochs=epochs,
        live_hours=live,
        presets=tuple(presets),
    )


def _sample(
    config: PlanConfig,
    split: CocoSplit,
    detector: Detector,
    device: torch.device,
    reporter: Reporter,
) -> tuple[list[DetectorOutput], float]:
    """Detector outputs for images spread over the dataset, and the mean time per image.

    Those of one input size go through the detector together, as extraction does it.
    """
    positions = np.linspace(
        0, len(split.images) - 1, min(config.sample, len(split.images)), dtype=int
    )
    entries = [split.images[position] for position in positions]
    sizes = [detector.input_geometry(entry.size_hw).input_hw for entry in entries]
    batches = batches_of_part(range(len(entries)), sizes, device)
    outputs: list[DetectorOutput] = []
    seconds = 0.0
    reporter.start("detector", len(entries), "images")
    for batch in batches:
        if config.images is not None:
            folder = config.images
            images = [load_image(folder / entries[i].file_name, entries[i].size_hw) for i in batch]
            pixels = torch.stack([detector.preprocess(image) for image in images])
        else:
            generator = torch.Generator().manual_seed(0)
            pixels = torch.randn(len(batch), 3, *sizes[batch[0]], generator=generator)
        pixels = pixels.to(device)
        if not outputs:  # the first call warms up
            detector.forward(pixels).cpu()
        started = time.perf_counter()
        output = detector.forward(pixels).cpu()
        seconds += time.perf_counter() - started
        outputs += [output.of_image(i) for i in range(len(batch))]
        reporter.advance(len(batch))
    reporter.finish()
    return outputs, seconds / len(outputs)


def _head_seconds(
    recipe: Recipe, spec: DetectorSpec, outputs: Sequence[DetectorOutput], device: torch.device
) -> float:
    """Time of forward and backward of the head for one image, the fastest of three."""
    head = build_head(recipe.head, spec).to(device).train()
    output = outputs[-1]
    maps = {name: values.to(device) for name, values in output.maps.items()}
    finest = min(spec.maps, key=lambda m: m.stride)
    height, width = (int(s) * finest.stride for s in maps[finest.name].shape[-2:])
    boxes = torch.rand(_REGIONS, 2, generator=torch.Generator().manual_seed(0)) * 0.5
    corners = torch.cat((boxes, boxes + 0.3), dim=1) * torch.tensor([width, height, width, height])
    batch = HeadBatch(
        (MapGroup(maps, (height, width), (0,)),),
        output.queries[0, :_REGIONS].to(device),
        corners.to(device),
        torch.zeros(_REGIONS, dtype=torch.long, device=device),
    )
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        result = head(batch)
        loss = result.mask_logits.square().mean()
        if result.mask_iou is not None:
            loss = loss + result.mask_iou.square().mean()
        loss.backward()
        float(loss.detach())  # waits for the device
        best = min(best, time.perf_counter() - started)
    return best


def _mean_bytes(
    split: CocoSplit, detector: Detector, encoding: Encoding, maps: MapOptions
) -> float:
    """Mean uncompressed bytes of an image over the image sizes of the dataset."""
    spec = detector.spec
    row_bytes = spec.num_queries * (2 * spec.query_dim + 4 * (spec.num_labels + 4))
    total = 0.0
    sizes = Counter(detector.input_geometry(entry.size_hw).input_hw for entry in split.images)
    for (height, width), count in sizes.items():
        each = float(row_bytes)
        for m in kept_maps(spec, maps.c1):
            tokens = -(-height // m.stride) * -(-width // m.stride)
            each += _map_bytes(tokens, m.channels, encoding)
        total += count * each
    mean = total / len(split.images)
    if maps.c1 == "roi":
        # One crop for every object that Hungarian matching gives a query, and the moments.
        channels = c1_channels(spec)
        objects = sum(
            not a.is_crowd for annotations in split.annotations.values() for a in annotations
        )
        crops = min(objects / len(split.images), spec.num_queries)
        mean += crops * _map_bytes(maps.roi_size**2, channels, encoding)
        mean += 4 * (channels + 1) * channels
    return mean


def _map_bytes(tokens: int, channels: int, encoding: Encoding) -> float:
    """Uncompressed bytes of a map with its quantisation scales."""
    values = tokens * encoding.columns(channels) * (1 if encoding.is_affine else 2)
    return values + (encoding.blocks(tokens) * channels * 4 if encoding.is_affine else 0)


def _encoding(
    outputs: Sequence[DetectorOutput], maps: Sequence[MapSpec], encoding: Encoding
) -> tuple[float, float]:
    """Uncompressed over stored bytes on the sample, and encoding seconds per image and thread."""
    plain = stored = 0
    seconds = []
    for output in outputs:
        started = time.perf_counter()
        decoded = (output.queries.half(), output.class_logits, output.boxes_cxcywh_norm)
        arrays = [values.numpy() for values in decoded]
        for m in maps:
            tokens = output.maps[m.name][0].flatten(1).T.numpy()
            arrays += [part for part in encode_map(tokens, encoding) if part is not None]
        plain += sum(array.nbytes for array in arrays)
        stored += sum(len(encode_chunk(array)) for array in arrays)
        seconds.append(time.perf_counter() - started)
    # The first call warms up.
    return plain / stored, float(np.mean(seconds[1:] or seconds))


def disk_speed(folder: Path, seconds: float) -> tuple[float, float]:
    """Sustained write and read speed of a disk in bytes per second, with incompressible data.

    Writes a temporary file for ``seconds``, at most a tenth of the free space. CacheError if the
    folder cannot be written to.
    """
    block = np.random.default_rng(0).integers(0, 256, _BLOCK, dtype=np.uint8).tobytes()
    most = max(1, shutil.disk_usage(folder).free // 10 // _BLOCK)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            started = time.perf_counter()
            written = 0
            while written < most and time.perf_counter() - started < seconds:
                file.write(block)
                file.flush()
                os.fsync(file.fileno())
                written += 1
            write_seconds = time.perf_counter() - started
            forget_cached_pages(file)
            file.seek(0)
            started = time.perf_counter()
            read = 0
            while time.perf_counter() - started < seconds / 2 and file.read(_BLOCK):
                read += 1
            read_seconds = time.perf_counter() - started
    except OSError as error:
        raise CacheError(f"--disk {folder} cannot be written to: {error.strerror}") from error
    return written * _BLOCK / write_seconds, read * _BLOCK / max(read_seconds, 1e-9)
