"""Random whole-image reads in the geometry of H-DETR R50, against the floor and zarr-python.

python benchmarks/read_speed.py [--images 12] [--repeats 5] [--rounds 8] [--folder DIR]
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from geometry import made_cache
from mfdetr_pipelines.cache.bench import run_bench
from mfdetr_pipelines.config.cache import BenchConfig

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.reporter import SilentReporter


def zarr_seconds(path: Path) -> float:
    """The same images through zarr-python's own reader, one after the other, warm."""
    cache = FeatureCache.open(path)
    group: Any = zarr.open_group(str(path), mode="r")["views/base"]
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        for row in np.random.default_rng(0).permutation(cache.rows):
            group["class_logits"][row], group["boxes_cxcywh_norm"][row], group["queries"][row]
            for m in cache.spec.maps:
                place = group[f"maps/{m.name}"]
                height, width = (int(v) for v in place["hw"][row])
                first = int(place["offset"][row])
                place["values"][first : first + height * width]
                if "affine" in place:
                    place["affine"][first // 64 : -(-(first + height * width) // 64)]
        best = min(best, time.perf_counter() - started)
    return best / len(cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    # A round lasts a tenth of a second; on a shared machine three of them are often all disturbed.
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        print("| preset | MB/image | images/s | of read + decode, warm | of pread, cold | zarr |")
        print("|---|---|---|---|---|---|")
        for preset, compression in (("int8", "zstd"), ("int8", "raw"), ("fp16", "zstd")):
            path = folder / f"{preset}-{compression}.zarr"
            made_cache(path, preset, compression, options.images)  # type: ignore[arg-type]
            runs = [
                run_bench(
                    BenchConfig(path, options.images), SilentReporter(), repeats=options.rounds
                )
                for _ in range(options.repeats)
            ]
            fastest = max(s.images_per_second for r in runs for s in r.speeds if s.what == "cache")
            decode = sorted(r.ratio_decode for r in runs)
            cold = sorted(r.ratio_cold for r in runs)
            print(
                f"| {preset} {compression} | {runs[0].bytes_per_image / 1e6:.1f} | {fastest:.1f} | "
                f"{spread(decode)} | {spread(cold)} | {1 / zarr_seconds(path):.1f} images/s |",
                flush=True,
            )


def spread(ratios: list[float]) -> str:
    """Median, least and largest of sorted ratios: one run on a shared machine says little."""
    return f"{ratios[len(ratios) // 2]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


if __name__ == "__main__":
    main()
