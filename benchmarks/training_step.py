"""A training step from the cache against the same head with the detector in the loop.

A detector with untrained weights at COCO sizes (800 x 1066 and the like), maps made up for the
cache. The live step runs the detector and trains on its features; both train the same head.

python benchmarks/training_step.py [--batch 2] [--steps 2] [--device cpu] [--detector h-detr-r50]
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from geometry import COCO_SIZES, made_cache
from mfdetr_pipelines.recipes import build_recipe
from PIL import Image

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.detectors.live import live_image
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.memory import keep_freed_memory
from mfdetr_cache.training.batches import TrainSample, collate
from mfdetr_cache.training.learner import Learner
from mfdetr_cache.training.regions import build_regions
from mfdetr_cache.types import CachedImage


def seconds_per_step(action: Callable[[], None], steps: int, device: torch.device) -> float:
    action()
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--detector", default="h-detr-r50")
    parser.add_argument("--recipe", default="paper")
    options = parser.parse_args()
    device = torch.device(options.device)
    keep_freed_memory()
    recipe = build_recipe(options.recipe, {})
    detector = load_detector(options.detector).to(device)
    pictures = [
        Image.effect_noise((w, h), 60).convert("RGB") for h, w in COCO_SIZES[: options.batch]
    ]
    with tempfile.TemporaryDirectory() as scratch:
        path = made_cache(
            Path(scratch) / "a.zarr", "int8", images=options.batch, spec=detector.spec
        )
        cache = FeatureCache.open(path)
        head = MaskHead(recipe.head, cache.spec).to(device).train()
        learner = Learner(head, recipe.train)
        parts = {"read": 0.0, "detector": 0.0}

        def learn(images: list[CachedImage]) -> None:
            samples = []
            for image in images:
                random = np.random.default_rng(0)
                regions = build_regions(image, recipe.train, recipe.head.roi_size, random)
                samples.append(TrainSample(image, regions))
            batch = collate(samples, head.map_names, device)
            learner.learn([batch], 0, len(batch.labels))

        truths = [cache.ground_truth(row) for row in cache.rows]

        def cached() -> None:
            started = time.perf_counter()
            images = [cache.read(row, head.map_names) for row in cache.rows]
            parts["read"] = time.perf_counter() - started
            learn(images)

        def live() -> None:
            started = time.perf_counter()
            images = []
            for picture, truth, row in zip(pictures, truths, cache.rows, strict=True):
                image = live_image(detector, picture, "", device)
                kept = cache.read(row, ())
                # The boxes of untrained weights match nothing: both steps train on the same ones.
                images.append(
                    CachedImage(
                        **{
                            **{f: getattr(kept, f) for f in kept.__slots__},
                            "maps": image.maps,
                            "queries": image.queries[: len(kept.queries)],
                            "ground_truth": truth,
                        }
                    )
                )
            parts["detector"] = time.perf_counter() - started
            learn(images)

        from_cache = seconds_per_step(cached, options.steps, device)
        with_detector = seconds_per_step(live, options.steps, device)
    print(
        f"{options.detector}, recipe {options.recipe}, batch {options.batch}, {device}: from the "
        f"cache {from_cache:.2f} s a step ({parts['read']:.2f} s reading), with the detector "
        f"{with_detector:.2f} s ({parts['detector']:.2f} s in it), ratio "
        f"{with_detector / from_cache:.1f}"
    )
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
