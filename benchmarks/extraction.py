"""Extraction against the detector's bare forward: what reading, encoding and writing add.

A detector, with untrained weights unless some are given, on made-up pictures of COCO sizes, which
are noise, or on the first ones of a dataset; in batches as extract makes them, and one image after
the other. Rounds take turns. By the clock and, of a shared machine, in CPU seconds. Creating the
cache, a second whatever its size, is no part of it.

python benchmarks/extraction.py [--images 6] [--rounds 3] [--detector h-detr-r50] [--weights PATH]
    [--dtype int8] [--device cpu] [--amp off] [--pictures FOLDER --annotations FILE]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from geometry import COCO_SIZES
from PIL import Image
from torch import Tensor

from mfdetr_cache.cache.writer import CacheWriter
from mfdetr_cache.coco.annotations import load_coco_split
from mfdetr_cache.coco.labelled import label_split
from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.detectors.protocol import Detector
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.extraction import batches
from mfdetr_cache.extraction.content import plan_cache
from mfdetr_cache.extraction.options import MapOptions, ViewOptions
from mfdetr_cache.extraction.stream import Extraction
from mfdetr_cache.ops.devices import keep_freed_memory, to_device
from mfdetr_cache.reporter import SilentReporter


def now() -> tuple[float, float]:
    """Seconds of the clock, and of all threads' CPU."""
    return time.perf_counter(), time.process_time()


def since(started: tuple[float, float]) -> tuple[float, float]:
    """The same from then to now."""
    clock, cpu = now()
    return clock - started[0], cpu - started[1]


def write_pictures(folder: Path, count: int, names: Sequence[str]) -> Path:
    """Noise of COCO sizes as JPEGs, an object in each; the annotation file."""
    (folder / "images").mkdir()
    images, annotations = [], []
    for number in range(count):
        height, width = COCO_SIZES[number % len(COCO_SIZES)]
        name = f"{number}.jpg"
        Image.effect_noise((width, height), 60).convert("RGB").save(folder / "images" / name)
        images.append({"id": number + 1, "file_name": name, "height": height, "width": width})
        annotations.append(
            {
                "id": number + 1,
                "image_id": number + 1,
                "category_id": 1,
                "bbox": [10, 10, 100, 100],
                "area": 10_000,
                "iscrowd": 0,
                "segmentation": [[10, 10, 110, 10, 110, 110, 10, 110]],
            }
        )
    path = folder / "instances.json"
    categories = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(document))
    return path


def first_pictures(folder: Path, count: int, annotations: Path) -> Path:
    """An annotation file of the first images of another."""
    document = json.loads(annotations.read_text())
    document["images"] = document["images"][:count]
    kept = {entry["id"] for entry in document["images"]}
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] in kept]
    path = folder / "instances.json"
    path.write_text(json.dumps(document))
    return path


def preprocessed(detector: Detector, picture: Path, device: torch.device) -> Tensor:
    """A detector's input as extraction's threads make it: ready to be copied."""
    pixels = detector.preprocess(Image.open(picture).convert("RGB"))
    return pixels.pin_memory() if device.type == "cuda" else pixels


def tell(images: int, seconds: dict[str, list[float]], cpu: dict[str, list[float]]) -> None:
    """Print rates and their ratios."""
    for name, each in seconds.items():
        of_cpu = 1e3 * statistics.median(cpu[name]) / images
        rate = images / statistics.median(each)
        print(f"{name}: {rate:.2f} images/s, {of_cpu:.1f} ms of CPU an image")
    for what, first, second in (
        ("extraction to bare forward, one by one", "bare forward, one by one", None),
        ("extraction to bare forward, in batches", "bare forward, in batches", None),
        ("in batches to one by one", "extraction, one by one", "extraction, in batches"),
    ):
        other = second or first.replace("bare forward", "extraction")
        for unit, kept in (("by the clock", seconds), ("in CPU seconds", cpu)):
            ratios = [a / b for a, b in zip(kept[first], kept[other], strict=True)]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            print(f"{what}, {unit}: {statistics.median(ratios):.2f} ({spread})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--detector", default="h-detr-r50")
    parser.add_argument("--weights")
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", default="off", choices=["off", "bf16"])
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--annotations", type=Path)
    options = parser.parse_args()
    keep_freed_memory()  # as extract does, so that the bare forward has it too
    device = torch.device(options.device)
    frozen = DetectorOptions(amp=options.amp)
    detector = load_detector(options.detector, options.weights, frozen).to(device)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pictures = options.pictures or folder / "images"
        if options.pictures:
            annotations = first_pictures(folder, options.images, options.annotations)
        else:
            annotations = write_pictures(folder, options.images, detector.spec.label_names)
        split = load_coco_split(annotations)
        content = plan_cache(
            label_split(split, detector.spec), detector, MapOptions(options.dtype), ViewOptions()
        )
        pixels = [preprocessed(detector, pictures / e.file_name, device) for e in split.images]
        sizes = [(p.shape[-2], p.shape[-1]) for p in pixels]

        def bare() -> tuple[float, float]:
            started = now()
            for part in content.root.layout.parts:
                rows = content.root.layout.rows_of_part(part.number)
                for batch in batches.batches_of_part(rows, [sizes[r] for r in rows], device):
                    inputs = [to_device(pixels[r], device) for r in batch]
                    detector.forward(torch.stack(inputs))
            if device.type == "cuda":
                torch.cuda.synchronize()
            return since(started)

        def whole(name: str) -> tuple[float, float]:
            with CacheWriter.open_or_create(folder / name, content) as writer:
                started = now()
                worker = Extraction(pictures, detector, device, writer, SilentReporter())
                worker.run(writer.pending_parts())
                return since(started)

        seconds: dict[str, list[float]] = {}
        cpu: dict[str, list[float]] = {}
        together = dict(batches._MOST)
        bare()
        whole("warm.zarr")  # kernels are loaded
        for number in range(options.rounds):
            for way in ("one by one", "in batches"):
                batches._MOST = together if way == "in batches" else dict.fromkeys(together, 1)
                # The machine may change its speed meanwhile: the forward is timed on both sides.
                before, took, after = bare(), whole(f"{number}-{way}.zarr"), bare()
                for kept, i in ((seconds, 0), (cpu, 1)):
                    around = (before[i] + after[i]) / 2
                    kept.setdefault(f"bare forward, {way}", []).append(around)
                    kept.setdefault(f"extraction, {way}", []).append(took[i])
    title = f"{options.detector}, {options.images} images, {options.dtype}, amp {options.amp}"
    print(f"{title}, {device}, {torch.get_num_threads()} threads")
    tell(options.images, seconds, cpu)


if __name__ == "__main__":
    main()
