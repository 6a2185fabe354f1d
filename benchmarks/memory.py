"""Peak memory of writing and of reading a cache, for caches of growing size.

Each in a process of its own, H-DETR R50 at COCO sizes, int8; what Python and torch take before is
subtracted. python benchmarks/memory.py [--images 12 48 96]
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from geometry import made_cache

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.training.input.readers import READ_AHEAD, read_in_threads


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write(path: Path, images: int) -> None:
    made_cache(path, "int8", images=images)


def read(path: Path, images: int) -> None:
    """As a training reads: two threads, batches of two, whole images in random order."""
    cache = FeatureCache.open(path)
    order = np.random.default_rng(0).permutation(images).tolist()
    pairs = [order[i : i + 2] for i in range(0, images, 2)]
    steps = range(len(pairs))
    for batch in read_in_threads(lambda row, _: cache.read(row), lambda s: pairs[s], steps, 2):
        assert batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[12, 48, 96])
    parser.add_argument("--do", choices=["write", "read"])
    parser.add_argument("--path", type=Path)
    options = parser.parse_args()
    if options.do:
        before = peak_mb()
        {"write": write, "read": read}[options.do](options.path, options.images[0])
        print(f"{peak_mb() - before:.0f}")
        return
    print(f"| images | cache, GB | writing, MB | reading {READ_AHEAD + 1} batches of two, MB |")
    print("|---|---|---|---|")
    for images in options.images:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "a.zarr"
            found = []
            for what in ("write", "read"):
                command = [sys.executable, __file__, "--do", what, "--path", str(path)]
                command += ["--images", str(images)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found.append(done.stdout.strip().splitlines()[-1])
            size = FeatureCache.open(path).stored_bytes / 1e9
            print(f"| {images} | {size:.2f} | {found[0]} | {found[1]} |", flush=True)


if __name__ == "__main__":
    main()
