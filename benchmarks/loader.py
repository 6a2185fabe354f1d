"""The training loader alone against reading and decoding the same chunks by hand.

python benchmarks/loader.py [--cache DIR] [--images 64] [--threads 2]

Without --cache, a made-up one in the geometry of H-DETR R50.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from geometry import made_cache

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.shards import decompress
from mfdetr_cache.ops.devices import keep_freed_memory
from mfdetr_cache.training.batch import TrainSample
from mfdetr_cache.training.input.readers import read_in_threads
from mfdetr_cache.training.recipes import build_recipe
from mfdetr_cache.training.regions import RegionSettings, build_regions
from mfdetr_cache.types import CachedImage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    keep_freed_memory()  # as a training does
    recipe = build_recipe("paper", {})
    with tempfile.TemporaryDirectory() as scratch:
        path = options.cache or made_cache(Path(scratch) / "a.zarr", "int8", images=12)
        cache = FeatureCache.open(path)
        regions = RegionSettings.of(recipe.train, recipe.head)
        order = np.random.default_rng(0).permutation(options.images) % len(cache)
        rows = [cache.rows[int(i)] for i in order]
        runs = {r: [(c.shard, c.entries) for c in cache.base.chunk_runs(r)] for r in set(rows)}

        def load(row: int, step: int) -> TrainSample:
            image = cache.read(row)
            random = np.random.default_rng((step, row))
            return TrainSample(image, {regions: build_regions(image, regions, random)})

        def read(row: int, _step: int) -> CachedImage:
            return cache.read(row)

        def floor(row: int, _step: int) -> list[bytes]:
            held = []
            for shard, entries in runs[row]:
                first, end = entries[0][0], sum(entries[-1])
                data = memoryview(shard.storage.read_ranges(shard.key, [(first, end - first)])[0])
                held += [decompress(data[at - first :][:size]) for at, size in entries]
            return held

        ways = {"floor": floor, "read": read, "load": load}
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(8):  # a quarter of a second each; most are disturbed on a shared machine
            for name, way in ways.items():
                started = time.perf_counter()
                steps = range(len(rows))
                batches = read_in_threads(way, lambda s: [rows[s]], steps, options.threads)
                assert sum(1 for _ in batches) == len(rows)
                best[name] = min(best[name], time.perf_counter() - started)
    speed = {name: len(rows) / seconds for name, seconds in best.items()}
    print(
        f"{len(rows)} images, {options.threads} thread(s), images/s: pread and zstd by hand "
        f"{speed['floor']:.1f}, reader {speed['read']:.1f} ({speed['read'] / speed['floor']:.2f}), "
        f"with matching and targets {speed['load']:.1f} ({speed['load'] / speed['floor']:.2f})"
    )


if __name__ == "__main__":
    main()
