from pathlib import Path

import numpy as np
import pytest
from mfdetr_pipelines.cache.bench import run_bench
from mfdetr_pipelines.config.cache import BenchConfig

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.shards import decode_chunk
from mfdetr_cache.errors import CacheError
from mfdetr_cache.reporter import SilentReporter


def test_every_way_and_thread_count_is_measured(drawn_cache: Path) -> None:
    found = run_bench(BenchConfig(drawn_cache, 5), SilentReporter(), repeats=1)
    assert found.images == 5
    assert {s.what for s in found.speeds} == {"cache", "plain read and decode", "plain read"}
    assert {s.cold for s in found.speeds} == {True, False}
    assert all(s.images_per_second > 0 for s in found.speeds)
    assert found.num_threads in {s.threads for s in found.speeds}
    assert found.ratio_decode > 0


def test_the_floor_reads_the_bytes_the_reader_reads(drawn_cache: Path) -> None:
    """The ranges of an image decode to what the cache gives: the comparison is fair."""
    cache = FeatureCache.open(drawn_cache)
    image = cache.read(3)
    runs = cache.base.chunk_runs(3)
    assert len(runs) == 3 + len(cache.spec.maps)
    values = []
    for run in runs:
        data = run.shard.storage.read(run.shard.key)
        parts = [
            decode_chunk(data[start : start + size], run.dtype, run.length, "test")
            for start, size in run.entries
        ]
        values.append(np.concatenate(parts))
    assert (values[0] == image.class_logits.ravel()).all()
    last = image.maps[cache.spec.maps[-1].name]
    assert (values[-1] == last.values.ravel()).all()


def test_an_unfinished_cache_is_not_measured(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="does not exist"):
        run_bench(BenchConfig(tmp_path / "absent.zarr"), SilentReporter())
