"""Quantising and compressing an image of H-DETR R50, beside compressing the same bytes alone.

python benchmarks/encoding.py [--images 4] [--rounds 5] [--threads 1 2]
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from geometry import COCO_SIZES, input_size, made_content, made_output
from numcodecs.zstd import Zstd

from mfdetr_cache.cache.encoder import EncodedImage
from mfdetr_cache.cache.shards import ZSTD_LEVEL, decompress
from mfdetr_cache.cache.storage.local import LocalStorage
from mfdetr_cache.cache.writer import CacheWriter
from mfdetr_cache.choices import Preset
from mfdetr_cache.ops.devices import keep_freed_memory
from mfdetr_cache.types import ImageGeometry


def images_per_second(work: Callable[[int], object], images: int, threads: int) -> float:
    """Of several threads, with as many images for each."""
    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        list(pool.map(work, range(images * threads)))
        return images * threads / (time.perf_counter() - started)


def ways(folder: Path, preset: Preset) -> tuple[Callable[[int], object], Callable[[int], object]]:
    """What encodes an image, and what compresses the bytes of one that was encoded."""
    sizes = [input_size(s) for s in COCO_SIZES[:4]]
    content = made_content(preset, images=4)
    outputs = [made_output(content.root.spec, size, i) for i, size in enumerate(sizes)]
    writer, zstd = CacheWriter(LocalStorage(folder), content), Zstd(level=ZSTD_LEVEL)

    def whole(i: int) -> EncodedImage:
        geometry = ImageGeometry(COCO_SIZES[i % 4], sizes[i % 4], sizes[i % 4])
        return writer.encoder.encode(0, geometry, outputs[i % 4])

    plain = [
        [decompress(memoryview(chunk)) for chunks in whole(i).chunks.values() for chunk in chunks]
        for i in range(4)
    ]

    def compressed(i: int) -> list[bytes]:
        return [zstd.encode(p) for p in plain[i % 4]]

    return whole, compressed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    keep_freed_memory()
    print("| preset | threads | images/s | zstd alone, images/s | of it |")
    print("|---|---|---|---|---|")
    presets: tuple[Preset, ...] = ("int8", "int8-small", "int4", "fp16")
    for preset in presets:
        with tempfile.TemporaryDirectory() as folder:
            both = ways(Path(folder), preset)
            for threads in options.threads:
                ours, theirs = (
                    max(
                        images_per_second(way, options.images, threads)
                        for _ in range(options.rounds)
                    )
                    for way in both
                )
                print(f"| {preset} | {threads} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} |")


if __name__ == "__main__":
    main()
