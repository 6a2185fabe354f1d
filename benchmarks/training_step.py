"""A training step from the cache against the same head with the detector in the loop.

A detector with untrained weights at COCO sizes (800 x 1066 and the like), maps made up for the
cache, which threads read ahead as they do in a training. The live step runs the detector, on
pictures of one size together as an extraction does, and trains on its features; both train the same
head.

python benchmarks/training_step.py [--batch 2] [--steps 2] [--device cpu] [--amp off]
    [--detector h-detr-r50]
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from geometry import COCO_SIZES, made_cache
from PIL import Image

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.extraction.batches import batches_of_part
from mfdetr_cache.head.batch import MapGroup, live_groups
from mfdetr_cache.head.build import build_head
from mfdetr_cache.ops.devices import keep_freed_memory
from mfdetr_cache.training.batch import TrainSample, collate
from mfdetr_cache.training.input.readers import read_in_threads
from mfdetr_cache.training.learner import Learner, autocast
from mfdetr_cache.training.recipes import build_recipe
from mfdetr_cache.training.regions import build_regions
from mfdetr_cache.types import CachedImage


def fastest(action: Callable[[], float], steps: int, device: torch.device) -> tuple[float, float]:
    """Seconds of the fastest step, and of the part of it that the action tells."""
    action()
    found = []
    for _ in range(steps):
        started = time.perf_counter()
        part = action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append((time.perf_counter() - started, part))
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--detector", default="h-detr-r50")
    parser.add_argument("--recipe", default="paper")
    parser.add_argument("--amp", default="off")
    options = parser.parse_args()
    device = torch.device(options.device)
    keep_freed_memory()
    on_gpu = device.type == "cuda"
    recipe = build_recipe(options.recipe, {"amp": options.amp})
    detector = load_detector(options.detector).to(device)
    sizes = [COCO_SIZES[i % len(COCO_SIZES)] for i in range(options.batch)]
    pictures = [Image.effect_noise((w, h), 60).convert("RGB") for h, w in sizes]
    with tempfile.TemporaryDirectory() as scratch:
        path = made_cache(
            Path(scratch) / "a.zarr", "int8", images=options.batch, spec=detector.spec
        )
        cache = FeatureCache.open(path)
        head = build_head(recipe.head, cache.spec).to(device).train()
        learner = Learner(head, recipe.train)

        def sample(image: CachedImage) -> TrainSample:
            random = np.random.default_rng(0)
            return TrainSample(
                image, {learner.regions: build_regions(image, learner.regions, random)}
            )

        def learn(samples: list[TrainSample], groups: tuple[MapGroup, ...] | None = None) -> None:
            images = [s.image for s in samples]
            regions = [s.regions[learner.regions] for s in samples]
            batch = collate(images, regions, head.map_names, device, groups)
            learner.learn([batch], 0, len(batch.labels))

        stream = read_in_threads(
            lambda row, _step: sample(cache.read(row, head.map_names, pinned=on_gpu)),
            lambda _step: list(cache.rows),
            range(options.steps + 1),
            recipe.train.reader_threads(on_gpu=on_gpu),
        )

        def cached() -> float:
            started = time.perf_counter()
            samples = next(stream)
            reading = time.perf_counter() - started
            learn(samples)
            return reading

        # The boxes of untrained weights match nothing: both steps train on the same ones.
        kept = [cache.read(row, ()) for row in cache.rows]

        def live() -> float:
            started = time.perf_counter()
            pixels = [detector.preprocess(picture) for picture in pictures]
            inputs_hw = [(p.shape[1], p.shape[2]) for p in pixels]
            found = {}
            with torch.inference_mode(), autocast(options.amp, device):
                for rows in batches_of_part(range(len(pixels)), inputs_hw, device):
                    output = detector.forward(torch.stack([pixels[r] for r in rows]).to(device))
                    found |= {row: output.of_image(i) for i, row in enumerate(rows)}
            # Tensors of inference mode cannot be learned from.
            outputs = [
                replace(o, maps={name: m.float().clone() for name, m in o.maps.items()})
                for _, o in sorted(found.items())
            ]
            geometries = [image.geometry for image in kept]
            groups = live_groups(outputs, geometries, head.map_names)
            if on_gpu:
                torch.cuda.synchronize()
            detecting = time.perf_counter() - started
            learn([sample(image) for image in kept], groups)
            return detecting

        from_cache, reading = fastest(cached, options.steps, device)
        with_detector, detecting = fastest(live, options.steps, device)
    print(
        f"{options.detector}, recipe {options.recipe}, batch {options.batch}, amp {options.amp}, "
        f"{device}: from the cache {from_cache:.3f} s a step ({reading:.3f} s waiting for "
        f"data), with the detector {with_detector:.3f} s ({detecting:.3f} s in it), ratio "
        f"{with_detector / from_cache:.1f}"
    )
    if on_gpu:
        print(f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
