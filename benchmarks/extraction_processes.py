"""Images per second of extract by its number of processes, while all of them are at work.

The command as it is on the images of a dataset in several views. What starts is not counted: the
time runs from the moment when a fifth of the images is done. An official detector has untrained
weights unless some are given.

python benchmarks/extraction_processes.py --pictures FOLDER --annotations FILE [--detector auto]
    [--weights PATH] [--views 7] [--workers 1 4] [--amp off] [--device cuda] [--out FOLDER]
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from mfdetr_pipelines.config.extract import ExtractConfig
from mfdetr_pipelines.config.shared import WorkOptions
from mfdetr_pipelines.extract import run_extract

from mfdetr_cache.detectors.official.architecture import ARCHITECTURES
from mfdetr_cache.detectors.official.detr import OfficialDetr
from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.extraction.options import ViewOptions
from mfdetr_cache.reporter import SilentReporter


class Watch(SilentReporter):
    """When how many images were done, and the bytes written until then."""

    def __init__(self) -> None:
        super().__init__()
        self.done, self.num_bytes = 0, 0
        self.seen: list[tuple[float, int, int]] = []

    def advance(self, count: int = 1, *, num_bytes: int = 0, note: str = "") -> None:  # noqa: ARG002
        """Note the time."""
        self.done += count
        self.num_bytes += num_bytes
        self.seen.append((time.perf_counter(), self.done, self.num_bytes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--detector", default="auto")
    parser.add_argument("--weights")
    parser.add_argument("--views", type=int, default=7)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--amp", default="off", choices=["off", "bf16"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="where caches are made: a disk to be measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.out) as scratch:
        weights = options.weights
        if weights is None:
            weights = f"{scratch}/untrained.pth"
            model = OfficialDetr(ARCHITECTURES[options.detector])
            torch.save({"model": model.state_dict()}, weights)
        for number in options.workers:
            watch = Watch()
            config = ExtractConfig(
                weights,
                Path(scratch) / f"{number}.zarr",
                options.pictures,
                options.annotations,
                detector=options.detector,
                device=options.device,
                options=DetectorOptions(amp=options.amp),
                views=ViewOptions(options.views),
                work=WorkOptions(workers=number),
            )
            started = time.perf_counter()
            run_extract(config, watch)
            began, first, written = next(s for s in watch.seen if 5 * s[1] >= watch.done)
            ended, last, size = watch.seen[-1]
            print(
                f"{options.detector}, amp {options.amp}, {options.device}, {number} processes: "
                f"{(last - first) / (ended - began):.1f} images/s, "
                f"{(size - written) / (ended - began) / 1e9:.2f} GB/s written, first fifth of "
                f"{watch.done} after {began - started:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
