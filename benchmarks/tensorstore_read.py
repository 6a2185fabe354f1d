"""Rows of a cache by our shard reader and by tensorstore's zarr3 driver: speed, memory, damage.

Both read every array of a row as it is stored, whole chunks, from warm files; the arrays are
compared before anything is timed. Rounds take turns, so that a busy machine slows both; CPU time is
that of all threads. tensorstore comes with `pip install -e .[bench]`.

python benchmarks/tensorstore_read.py [--cache DIR] [--images 12] [--rounds 9] [--threads 1 2]
python benchmarks/tensorstore_read.py --damage

Without --cache, made-up ones in the geometry of H-DETR R50, one for each preset.
"""

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from crc32c import crc32c
from geometry import made_cache
from numpy.typing import NDArray
from read_speed import spread

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.view import CacheView
from mfdetr_cache.errors import CacheError
from mfdetr_cache.ops.devices import keep_freed_memory

PRESETS = (("int8", "zstd"), ("int8", "raw"), ("fp16", "zstd"), ("fp16", "raw"))
# Enough for the indexes of the shards, too little for chunks: every row is decoded anew.
INDEX_BYTES = 2**20


class TensorstoreReader:
    """The sharded arrays of a view.

    Args:
        cache: The cache, for the layout alone.
        view: The view.
        threads: Threads that decode, and threads that read files.
    """

    def __init__(self, cache: FeatureCache, view: CacheView, threads: int) -> None:
        folder = cache.storage.folder
        assert folder is not None
        self._context = tensorstore.Context(
            {
                "cache_pool": {"total_bytes_limit": INDEX_BYTES},
                "data_copy_concurrency": {"limit": threads},
                "file_io_concurrency": {"limit": threads},
            }
        )
        self._arrays = {n: self._opened(folder / s.path) for n, s in view.arrays.items() if s.shard}
        self._chunks = {n: s.chunk[0] for n, s in view.arrays.items() if s.shard}
        self._tables: dict[str, NDArray[Any]] = {
            name: self._opened(folder / spec.path).read().result()
            for name, spec in view.arrays.items()
            if name.endswith(("/hw", "/offset"))
        }

    def _opened(self, path: Path) -> Any:  # noqa: ANN401
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(path)},
            "fill_missing_data_reads": False,
            "recheck_cached_data": "open",
            "recheck_cached_metadata": "open",
        }
        return tensorstore.open(spec, context=self._context, read=True).result()

    def read(self, row: int) -> dict[str, NDArray[Any]]:
        """Everything of a row, all arrays under way at once."""
        reads = {n: array[slice(*self._range(n, row))].read() for n, array in self._arrays.items()}
        return {name: future.result() for name, future in reads.items()}

    def _range(self, name: str, row: int) -> tuple[int, int]:
        """First and last entry along the first axis, whole chunks."""
        chunk = self._chunks[name]
        if not name.startswith("maps/") or chunk == 1:
            return row, row + 1
        base = name.rpartition("/")[0]
        tokens = self._chunks[f"{base}/values"]
        first = int(self._tables[f"{base}/offset"][row]) // tokens
        count = -(-math.prod(self._tables[f"{base}/hw"][row].tolist()) // tokens)
        return first * chunk, (first + count) * chunk


def same_values(view: CacheView, reader: TensorstoreReader, row: int) -> None:
    """Stop unless both give the same arrays."""
    ours, theirs = view.read(row), reader.read(row)
    for name in ("class_logits", "boxes_cxcywh_norm", "queries"):
        assert np.array_equal(getattr(ours, name), theirs[name][0]), name
    for name, stored in ours.maps.items():
        assert np.array_equal(stored.values, theirs[f"maps/{name}/values"]), name
        if stored.affine is not None:
            affine = theirs[f"maps/{name}/affine"][: len(stored.affine)]
            assert np.array_equal(stored.affine, affine), name


def measured(path: Path, threads: int, rounds: int, images: int) -> str:
    """A line of the table."""
    cache = FeatureCache.open(path)
    view = cache.base
    reader = TensorstoreReader(cache, view, threads)
    same_values(view, reader, view.rows[-1])
    ways: dict[str, Callable[[int], Any]] = {"ours": view.read, "tensorstore": reader.read}
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    random = np.random.default_rng(0)
    for turn in range(rounds + 1):
        rows = [view.rows[int(i)] for i in random.permutation(images) % len(view.rows)]
        for name in list(ways)[:: 1 if turn % 2 else -1]:
            started, busy = time.perf_counter(), time.process_time()
            with ThreadPoolExecutor(threads) as pool:
                for _ in pool.map(ways[name], rows):
                    pass
            if turn:  # the first one warms up
                wall[name].append((time.perf_counter() - started) / images)
                cpu[name].append((time.process_time() - busy) / images)
    faster = sorted(t / o for o, t in zip(wall["ours"], wall["tensorstore"], strict=True))
    less = sorted(t / o for o, t in zip(cpu["ours"], cpu["tensorstore"], strict=True))
    ours, theirs = (1 / float(np.median(wall[name])) for name in ways)
    return (
        f"{threads} | {ours:.1f} | {theirs:.1f} | {spread(faster)} | "
        f"{1e3 * np.median(cpu['ours']):.1f} | {1e3 * np.median(cpu['tensorstore']):.1f} | "
        f"{spread(less)}"
    )


def peak_mb(path: Path, who: str, images: int) -> float:
    """Peak memory over what is held after a first row, in a process of its own."""
    command = [sys.executable, __file__, "--peak", who, "--cache", str(path)]
    done = subprocess.run(
        [*command, "--images", str(images)], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def print_peak(path: Path, who: str, images: int) -> None:
    keep_freed_memory()
    cache = FeatureCache.open(path)
    read = cache.base.read if who == "ours" else TensorstoreReader(cache, cache.base, 1).read
    read(cache.rows[0])  # what is opened once, and compiled functions
    # Not ru_maxrss, which begins with that of the process it was started from.
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_mb("VmRSS")
    for number in range(images):
        held = read(cache.rows[number % len(cache)])
        assert held
        del held
    print(memory_mb("VmHWM") - before)


def memory_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def print_damage(folder: Path) -> None:
    """What each says to damaged files, to a fork, and to a storage it does not know."""
    for compression in ("zstd", "raw"):
        path = made_cache(folder / f"{compression}.zarr", "int8", compression, 2)
        shard = next((path / "views/base/maps/encoder16/values/c").rglob("0"))
        while shard.is_dir():
            shard = next(shard.iterdir())
        whole = shard.read_bytes()
        flipped = bytearray(whole)
        flipped[1000] ^= 1
        index = bytearray(whole)
        chunks = FeatureCache.open(path).base.arrays["maps/encoder16/values"].chunks_per_part
        start = len(whole) - 16 * chunks - 4
        index[start : start + 16] = b"\xff" * 16  # as a chunk that was never written
        index[-4:] = crc32c(bytes(index[start:-4])).to_bytes(4, "little")
        for what, content in (
            ("a flipped byte", bytes(flipped)),
            ("a missing chunk", bytes(index)),
            ("a file cut off", whole[: len(whole) // 2]),
            ("a missing file", None),
        ):
            shard.unlink()
            if content is not None:
                shard.write_bytes(content)
            for who in ("ours", "tensorstore"):
                print(f"{compression}, {what}, {who}: {answer_of(path, who)}", flush=True)
        shard.write_bytes(whole)
        for who in ("ours", "tensorstore"):
            print(f"{compression}, in a forked process, {who}: {answer_of(path, who, fork=True)}")
        shutil.rmtree(path)
    for url in ("s3://bucket/a.zarr/", "gs://bucket/a.zarr/", "az://bucket/a.zarr/"):
        try:
            tensorstore.KvStore.Spec(url)
            print(f"{url}, tensorstore: known")
        except ValueError as error:
            print(f"{url}, tensorstore: {str(error)[:120]}")


def answer_of(path: Path, who: str, *, fork: bool = False) -> str:
    """What reading row 0 ends in, in a process of its own."""
    command = [sys.executable, __file__, "--answer", who, "--cache", str(path)]
    try:
        done = subprocess.run(
            command + ["--fork"] * fork, capture_output=True, text=True, timeout=60, check=False
        )
    except subprocess.TimeoutExpired:
        return "hangs"
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
    return f"{lines[-1].replace(str(path), 'CACHE')} (exit code {done.returncode})"


def print_answer(path: Path, who: str, *, fork: bool) -> None:
    def read() -> None:
        try:
            cache = FeatureCache.open(path)
            reader = cache.base if who == "ours" else TensorstoreReader(cache, cache.base, 1)
            reader.read(0)
            print("reads on", flush=True)
        except (CacheError, ValueError) as error:
            print(f"{type(error).__name__}: {error}", flush=True)

    if not fork:
        return read()
    # As a DataLoader does by default: the process that forks has read before.
    cache = FeatureCache.open(path)
    reader = cache.base if who == "ours" else TensorstoreReader(cache, cache.base, 1)
    reader.read(0)
    child = os.fork()
    if not child:
        reader.read(0)
        print("reads on", flush=True)
        os._exit(0)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def print_speeds(options: argparse.Namespace, scratch: Path) -> None:
    keep_freed_memory()
    print(
        "| cache | threads | ours, images/s | tensorstore | ours over tensorstore, wall "
        "| ours, CPU ms an image | tensorstore | ours over tensorstore, CPU | peak MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    paths = [options.cache]
    if options.cache is None:
        folder = options.folder or scratch
        paths = [
            made_cache(folder / f"{preset}-{compression}.zarr", preset, compression, options.images)  # type: ignore[arg-type]
            for preset, compression in PRESETS
        ]
    for path in paths:
        peaks = ", ".join(
            f"{peak_mb(path, w, options.images):.0f}" for w in ("ours", "tensorstore")
        )
        for threads in options.threads:
            line = measured(path, threads, options.rounds, options.images)
            print(f"| {path.stem} | {line} | {peaks} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, help="where made-up caches are kept")
    parser.add_argument("--damage", action="store_true")
    parser.add_argument("--peak", choices=["ours", "tensorstore"], help=argparse.SUPPRESS)
    parser.add_argument("--answer", choices=["ours", "tensorstore"], help=argparse.SUPPRESS)
    parser.add_argument("--fork", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print_peak(options.cache, options.peak, options.images)
    elif options.answer:
        print_answer(options.cache, options.answer, fork=options.fork)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            if options.damage:
                print_damage(Path(scratch))
            else:
                print_speeds(options, Path(scratch))


if __name__ == "__main__":
    main()
