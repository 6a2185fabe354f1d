"""Cache bench: how fast a cache is read on this disk, against a plain read of the same bytes."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mfdetr_cache.cache.chunks import ChunkRun
from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.shards import decompress
from mfdetr_cache.errors import CacheError
from mfdetr_cache.files import forget_cached_pages
from mfdetr_cache.ops.devices import keep_freed_memory
from mfdetr_cache.reporter import Reporter
from mfdetr_pipelines.config.cache import BenchConfig


@dataclass(frozen=True, slots=True)
class Speed:
    """One way of reading, ``cold`` from the disk and not from the page cache; MB are 10^6 bytes."""

    what: str
    threads: int
    cold: bool
    images_per_second: float
    megabytes_per_second: float


@dataclass(frozen=True, slots=True)
class BenchSummary:
    """All measurements and their ratios.

    Attributes:
        ratio_decode: Warm speed of the cache over a plain read and decode, each with its best
            number of threads.
        ratio_cold: Cold speed of the cache over a cold plain read, likewise.
    """

    images: int
    bytes_per_image: float
    speeds: tuple[Speed, ...]
    ratio_decode: float
    ratio_cold: float
    num_threads: int


class _Range(NamedTuple):
    """Neighbouring chunks of a file: where they lie, and each one's start and size therein."""

    file: Path
    offset: int
    size: int
    chunks: list[tuple[int, int]]


class _Job(NamedTuple):
    view: str
    row: int
    ranges: list[_Range]


def run_bench(config: BenchConfig, reporter: Reporter, *, repeats: int = 3) -> BenchSummary:
    """Read random images in several ways, interleaved, and compare the speeds.

    The fastest of ``repeats`` counts, since other work of the machine only slows a reader down.
    CacheError if the cache is missing, unfinished or damaged.
    """
    keep_freed_memory()  # as a training does
    cache = FeatureCache.open(config.cache)
    cache.require_complete()
    folder = cache.storage.folder
    if folder is None:
        raise CacheError(f"{cache.path}: bench compares with plain reads of a local disk")
    pairs = [(v, r) for v, opened in cache.views.items() for r in opened.rows]
    random = np.random.default_rng(0)
    chosen = [pairs[int(i)] for i in random.permutation(len(pairs))[: config.images]]
    jobs = [_Job(v, r, _ranges(cache.views[v].chunk_runs(r), folder)) for v, r in chosen]
    total = sum(b.size for job in jobs for b in job.ranges)
    ways = _ways(cache)
    counts = sorted({1, 2, min(4, os.cpu_count() or 1), os.cpu_count() or 1})
    best: dict[tuple[str, int, bool], float] = {}
    reporter.start("bench", repeats * len(counts) * 2, "rounds")
    for _ in range(repeats):
        for threads in counts:
            for cold in (True, False):
                for what, way in ways.items():
                    seconds = _measure(way, jobs, threads, cold=cold)
                    key = (what, threads, cold)
                    best[key] = min(best.get(key, float("inf")), seconds)
                reporter.advance()
    reporter.finish()
    speeds = tuple(
        Speed(what, threads, cold, len(jobs) / s, total / s / 1e6)
        for (what, threads, cold), s in best.items()
    )
    fastest = {(w, c): min(best[w, t, c] for t in counts) for w in ways for c in (True, False)}
    return BenchSummary(
        images=len(jobs),
        bytes_per_image=total / max(len(jobs), 1),
        speeds=speeds,
        ratio_decode=fastest["plain read and decode", False] / fastest["cache", False],
        ratio_cold=fastest["plain read", True] / fastest["cache", True],
        num_threads=min(counts, key=lambda t: best["cache", t, False] * (1 + 0.02 * t)),
    )


def _ranges(runs: Sequence[ChunkRun], folder: Path) -> list[_Range]:
    ranges = []
    for run in runs:
        start = run.entries[0][0]
        chunks = [(offset - start, size) for offset, size in run.entries]
        ranges.append(_Range(folder / run.shard.key, start, sum(chunks[-1]), chunks))
    return ranges


def _ways(cache: FeatureCache) -> dict[str, Callable[[_Job], None]]:
    raw = cache.layout.compression == "raw"

    def through_cache(job: _Job) -> None:
        cache.read(job.row, view=job.view)

    def plain(job: _Job) -> None:
        for part in job.ranges:
            _pread(part)

    def decoded(job: _Job) -> None:
        # Written by hand and as lean as it can be: no checksum, no shape, no message. What is
        # decoded is held until the image is whole, as whoever uses it must.
        held = []
        for part in job.ranges:
            data = memoryview(_pread(part))
            for start, size in part.chunks:
                piece = data[start : start + size]
                held.append(piece if raw else decompress(piece))

    return {"cache": through_cache, "plain read and decode": decoded, "plain read": plain}


def _measure(
    way: Callable[[_Job], None], jobs: Sequence[_Job], threads: int, *, cold: bool
) -> float:
    if cold:
        for path in {part.file for job in jobs for part in job.ranges}:
            with path.open("rb") as file:
                forget_cached_pages(file)
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(way, jobs):
            pass
    return time.perf_counter() - started


def _pread(part: _Range) -> bytes:
    with part.file.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), part.size, part.offset)
