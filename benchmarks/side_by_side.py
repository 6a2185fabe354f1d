"""Eight heads over one read against eight runs of one head.

python benchmarks/side_by_side.py [--cache DIR] [--heads 8] [--steps 4] [--recipe fast]

Without --cache, a made-up one in the geometry of H-DETR R50.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from geometry import made_cache

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.head.build import build_head
from mfdetr_cache.ops.devices import keep_freed_memory
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training.input.loader import CacheSource
from mfdetr_cache.training.learner import build_learner
from mfdetr_cache.training.loop import TrainingLoop
from mfdetr_cache.training.recipes import Recipe, build_recipe
from mfdetr_cache.training.run import Run


def seconds(cache: FeatureCache, recipes: list[Recipe], device: torch.device) -> float:
    runs = [
        Run(build_learner(r.train, lambda r=r: build_head(r.head, cache.spec), device))  # type: ignore[misc]
        for r in recipes
    ]
    source = CacheSource(cache, [run.learner for run in runs])
    loop = TrainingLoop(source, runs, SilentReporter())
    loop.run(until=1)
    started = time.perf_counter()
    loop.run()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    keep_freed_memory()
    device = torch.device(options.device)
    # Threads are there at once, processes take some seconds to start.
    settings = {"num_processes": "0", **dict(item.split("=", 1) for item in options.set)}
    settings |= {"steps": str(options.steps + 1), "batch_size": str(options.batch)}
    # Widths differ, so that these are eight heads and not one.
    recipes = [
        build_recipe(options.recipe, {**settings, "hidden_dim": str(16 + 8 * i)})
        for i in range(options.heads)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        path = options.cache or made_cache(Path(scratch) / "a.zarr", "int8", images=8)
        cache = FeatureCache.open(path)
        together = seconds(cache, recipes, device)
        alone = [seconds(cache, [r], device) for r in recipes]
    print(
        f"{options.heads} heads, {options.steps} steps of {options.batch}: over one read "
        f"{together:.1f} s, one after the other {sum(alone):.1f} s, ratio "
        f"{sum(alone) / together:.2f}"
    )


if __name__ == "__main__":
    main()
