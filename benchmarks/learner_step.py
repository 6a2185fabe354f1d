"""A step of a training from a cache, and what the optimiser and OpenMP's idle threads cost in it.

Our Muon against torch's on the same gradients; and the command's setting of OpenMP's idle threads
against OpenMP's own, in turns, in processes of their own, because it is read when torch loads.

python benchmarks/learner_step.py --cache train2017.zarr [--recipe fast] [--steps 40] [--turns 3]
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.head.build import build_head
from mfdetr_cache.ops.devices import keep_freed_memory
from mfdetr_cache.training.batch import collate
from mfdetr_cache.training.learner import build_learner
from mfdetr_cache.training.optimisers import build_optimisers
from mfdetr_cache.training.recipes import build_recipe
from mfdetr_cache.training.regions import RegionTargets, build_regions
from mfdetr_cache.types import CachedImage

# Steps that are not counted: kernels are compiled and memory is taken in them.
_FIRST = 5


def measure(path: Path, recipe_name: str, steps: int) -> dict[str, float]:
    """Medians in seconds, on batches that were read beforehand."""
    keep_freed_memory()
    device = torch.device("cpu")
    recipe = build_recipe(recipe_name, {})
    cache = FeatureCache.open(path)
    learner = build_learner(recipe.train, lambda: build_head(recipe.head, cache.spec), device)
    learner.head.train()
    names = learner.head.map_names
    random = np.random.default_rng(0)

    def sample() -> tuple[CachedImage, RegionTargets]:
        row = int(random.choice(cache.rows))
        image = cache.read(row, names, str(random.choice(cache.layout.views)))
        return image, build_regions(image, learner.regions, random)

    read = [[sample() for _ in range(recipe.train.batch_size)] for _ in range(steps + _FIRST)]
    other = copy.deepcopy(learner.head)
    ours = build_optimisers(other, recipe.train)[-1]
    shared = {id(p): n for n, p in other.named_parameters()}
    chosen = [shared[id(p)] for g in ours.param_groups for p in g["params"]]
    weights = dict(other.named_parameters())
    plain = torch.optim.Muon([weights[n] for n in chosen], adjust_lr_fn="match_rms_adamw")
    gradients = dict(learner.head.named_parameters())
    times: dict[str, list[float]] = {"step": [], "ours": [], "torch": []}

    def timed(name: str, start: float) -> None:
        times[name].append(time.perf_counter() - start)

    for samples in read:
        start = time.perf_counter()
        images, regions = zip(*samples, strict=True)
        batch = collate(images, regions, names, device)
        learner.learn([batch], 0, len(batch.labels))
        timed("step", start)
        for name in chosen:
            weights[name].grad = gradients[name].grad
        for name, optimiser in (("ours", ours), ("torch", plain)):
            start = time.perf_counter()
            optimiser.step()
            timed(name, start)
    return {name: statistics.median(found[_FIRST:]) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.cache, options.recipe, options.steps)))
        return
    if build_recipe(options.recipe, {}).train.optimiser != "muon":
        parser.error(f"recipe {options.recipe} does not use Muon")
    plain = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    settings = {
        "as mfdetr sets it": {**plain, "GOMP_SPINCOUNT": "10000"},
        "OpenMP's own": plain,
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in settings}
    for _ in range(options.turns):
        for name, environment in settings.items():
            command = [sys.executable, __file__, "--child", *sys.argv[1:]]
            output = subprocess.run(
                command, env=environment, check=True, capture_output=True, text=True
            ).stdout
            found[name].append(json.loads(output.splitlines()[-1]))
    for name, turns in found.items():
        step, ours, theirs = (
            statistics.median(t[k] for t in turns) for k in ("step", "ours", "torch")
        )
        print(
            f"{name:18}: step {step * 1e3:.0f} ms, Muon {ours * 1e3:.0f} ms of it; "
            f"torch's Muon {theirs * 1e3:.0f} ms ({theirs / ours:.1f} times)"
        )
    ratios = [
        b["step"] / a["step"]
        for a, b in zip(found["as mfdetr sets it"], found["OpenMP's own"], strict=True)
    ]
    print(f"OpenMP's own setting takes {statistics.median(ratios):.2f} times as long a step")


if __name__ == "__main__":
    main()
