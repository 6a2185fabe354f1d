"""A whole training from a cache: images/s, the share of time waiting for data, hours for COCO.

Readers, copies and decoding on the device as in ``mfdetr train-head``, from a made-up cache
with image sizes as mixed as COCO's. It fits the machine's memory, so that no disk is timed: what is
read each second is printed instead, for comparison with yours.

python benchmarks/training_throughput.py [--detector h-detr-r50] [--device cuda] [--amp bf16]
"""

import argparse
import tempfile
from pathlib import Path

import torch
from geometry import made_cache, mixed_sizes

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.head.build import build_head
from mfdetr_cache.ops.devices import keep_freed_memory
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training.input.loader import CacheSource
from mfdetr_cache.training.learner import build_learner
from mfdetr_cache.training.loop import TrainingLoop
from mfdetr_cache.training.recipes import build_recipe
from mfdetr_cache.training.run import Run

# Images of COCO train2017 with an object to learn from, times the epochs of the paper.
COCO_IMAGES = 6 * 117_266


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--detector", default="h-detr-r50")
    parser.add_argument("--cache", type=Path, help="where to make the cache; kept if given")
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--recipe", default="paper")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--first", type=int, default=150, help="steps that are not counted")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--amp", default="bf16")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    keep_freed_memory()
    device = torch.device(options.device)
    changes = dict(item.split("=", 1) for item in options.set)
    settings = {"amp": options.amp, "steps": str(options.first + options.steps), **changes}
    recipe = build_recipe(options.recipe, settings)
    with tempfile.TemporaryDirectory() as scratch:
        path = options.cache or Path(scratch) / "a.zarr"
        spec = load_detector(options.detector).spec
        sizes = mixed_sizes(options.images)
        made_cache(path, options.dtype, images=options.images, spec=spec, sizes=sizes)
        cache = FeatureCache.open(path)
        size = cache.stored_bytes / len(cache)
        learner = build_learner(recipe.train, lambda: build_head(recipe.head, cache.spec), device)

        def on_step(done: int) -> None:
            if done == options.first:
                # Kernels are built by now, and whatever reads has started.
                learner.images, learner.seconds, learner.waiting_seconds = 0, 0.0, 0.0
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()

        source = CacheSource(cache, [learner])
        TrainingLoop(source, [Run(learner)], SilentReporter(), on_step=on_step).run()
    speed = learner.images / learner.seconds
    print(
        f"{options.detector}, {options.dtype}, recipe {options.recipe} {' '.join(options.set)}, "
        f"amp {options.amp}, {device}: {speed:.1f} images/s in batches of "
        f"{recipe.train.batch_size}, {learner.waiting_seconds / learner.seconds:.1%} of the time "
        f"waiting for data, {size / 1e6:.1f} MB an image, {speed * size / 1e9:.2f} GB/s; six "
        f"epochs of COCO {COCO_IMAGES / speed / 3600:.2f} h"
    )
    if device.type == "cuda":
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
