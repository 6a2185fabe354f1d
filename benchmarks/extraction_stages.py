"""Where the CPU time of an extracted image goes: each stage alone, on one thread.

Least of some rounds, in milliseconds an image: CPU time, which other work on the machine disturbs
less than the clock. Quantising and compressing are parts of encoding.

OMP_NUM_THREADS=1 python benchmarks/extraction_stages.py --weights PATH --pictures FOLDER
    --annotations FILE [--detector auto] [--images 12] [--rounds 5] [--dtype int8]
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from extraction import first_pictures

from mfdetr_cache.cache.shards import encode_chunk
from mfdetr_cache.cache.writer import CacheWriter
from mfdetr_cache.coco.annotations import load_coco_split
from mfdetr_cache.coco.labelled import label_split
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.extraction.batches import batches_of_part
from mfdetr_cache.extraction.content import plan_cache
from mfdetr_cache.extraction.options import MapOptions, ViewOptions
from mfdetr_cache.ops.devices import keep_freed_memory
from mfdetr_cache.ops.quantisation import ENCODINGS, encode_map

ResultT = TypeVar("ResultT")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--detector", default="auto")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="int8")
    options = parser.parse_args()
    keep_freed_memory()
    detector = load_detector(options.detector, options.weights)
    seconds: dict[str, list[float]] = {}

    def timed(stage: str, work: Callable[[], ResultT]) -> ResultT:
        started = time.thread_time()
        result = work()
        seconds[stage][-1] += time.thread_time() - started
        return result

    with tempfile.TemporaryDirectory() as scratch:
        split = load_coco_split(first_pictures(Path(scratch), options.images, options.annotations))
        content = plan_cache(
            label_split(split, detector.spec), detector, MapOptions(options.dtype), ViewOptions()
        )
        encoding = ENCODINGS[content.root.layout.preset]
        stages = ("decode", "preprocess", "forward", "encode", "quantise", "compress", "add, hash")
        for number in range(options.rounds + 1):
            for stage in (*stages, "seal"):
                seconds.setdefault(stage, []).append(0)
            with CacheWriter.open_or_create(Path(scratch) / f"{number}.zarr", content) as writer:
                for part in writer.pending_parts():
                    writer.begin_part(part)
                    rows = writer.rows_of_part(part)
                    files = [options.pictures / split.images[r].file_name for r in rows]
                    images = timed("decode", lambda f=files: [load_image(p) for p in f])
                    pixels = timed("preprocess", lambda i=images: list(map(detector.preprocess, i)))
                    sizes = [(p.shape[-2], p.shape[-1]) for p in pixels]
                    for batch in batches_of_part(rows, sizes, torch.device("cpu")):
                        inputs = [pixels[row - rows.start] for row in batch]
                        output = timed("forward", lambda i=inputs: detector.forward(torch.stack(i)))
                        for index, row in enumerate(batch):
                            one = output.of_image(index)
                            geometry = detector.input_geometry(split.images[row].size_hw)
                            image = timed(
                                "encode",
                                lambda r=row, g=geometry, o=one: writer.encoder.encode(r, g, o),
                            )
                            timed("add, hash", lambda r=row, i=image: writer.add(r, i))
                            for m in one.maps.values():
                                values = m[0].flatten(1).T.numpy()
                                codes, _ = timed(
                                    "quantise", lambda v=values: encode_map(v, encoding)
                                )
                                timed("compress", lambda c=codes: encode_chunk(c))
                    timed("seal", writer.seal_part)
    for stage, each in seconds.items():  # kernels are loaded in the first round
        print(f"{stage:12}{1e3 * min(each[1:]) / options.images:8.2f} ms an image")


if __name__ == "__main__":
    main()
