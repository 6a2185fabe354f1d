"""A real Ray cluster of several nodes on this machine, and one of its nodes killed on the way."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mfdetr_pipelines.ablation.run import run_ablate
from mfdetr_pipelines.config.shared import WorkOptions
from mfdetr_pipelines.extract import run_extract
from mfdetr_pipelines.ray_engine import on_cluster

from mfdetr_cache.cache import schema
from mfdetr_cache.errors import ConfigError, ImageError
from mfdetr_cache.reporter import SilentReporter
from tests.support import scenes
from tests.support.ablations import config as ablation
from tests.support.caches import contents

# Workers are nice by 15 otherwise, and wait for whatever tests run beside them.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  as Ray reads it
ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without room for tasks and two workers of one CPU."""
    from ray.cluster_utils import Cluster

    started = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": 80 * 2**20},
    )
    started.workers = [
        started.add_node(num_cpus=1, object_store_memory=80 * 2**20) for _ in range(2)
    ]
    started.wait_for_nodes()
    yield started
    ray.shutdown()
    started.shutdown()


class KillsANode(SilentReporter):
    """Kills a node of the cluster when a third of the images are done."""

    def __init__(self, cluster: Any) -> None:
        super().__init__()
        self.cluster, self.done = cluster, 0

    def advance(self, count: int = 1, *, num_bytes: int = 0, note: str = "") -> None:
        self.done += count
        if self.done >= 3 and len(self.cluster.workers) == 2:
            self.cluster.remove_node(self.cluster.workers.pop(), allow_graceful=False)


def test_a_killed_node_leaves_a_whole_and_identical_cache(
    cluster: Any,
    tmp_path: Path,
    scenes_folder: Path,
    rtdetr_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(schema, "PART_BYTES", 1)

    def config(name: str, **changes: Any) -> Any:
        return scenes.extract_config(
            scenes_folder, str(rtdetr_folder), tmp_path / name, **{"views": 1, **changes}
        )

    whole = run_extract(config("local.zarr"), SilentReporter())
    reporter = KillsANode(cluster)
    on_ray = {"work": WorkOptions(None, "ray", cluster.address, 2)}
    summary = run_extract(config("ray.zarr", **on_ray), reporter)
    assert len(cluster.workers) == 1
    assert reporter.done == summary.num_extracted == 16
    assert summary.box == whole.box
    assert contents(tmp_path / "ray.zarr") == contents(tmp_path / "local.zarr")
    # The same command finds everything done.
    assert run_extract(config("ray.zarr", **on_ray), SilentReporter()).num_extracted == 0


def test_a_reason_from_a_worker_arrives_as_it_is(
    cluster: Any, tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    copy = tmp_path / "scenes"
    scenes.write_scenes(copy, count=2, seed=5)
    next(iter(sorted((copy / "images").iterdir()))).write_bytes(b"no image")
    config = scenes.extract_config(
        copy,
        str(rtdetr_folder),
        tmp_path / "a.zarr",
        work=WorkOptions(None, "ray", cluster.address, 1),
    )
    with pytest.raises(ImageError, match="on-bad-image skip leaves such images out"):
        run_extract(config, SilentReporter())


def test_rows_of_an_ablation_are_trained_on_the_cluster(
    cluster: Any, tmp_path: Path, drawn_cache: Path
) -> None:
    """Two rows with two seeds over two workers give what one process gives."""
    on_ray = {"work": WorkOptions(None, "ray", cluster.address, 4)}
    there = run_ablate(ablation(drawn_cache, tmp_path / "ray", **on_ray), SilentReporter())
    here = run_ablate(ablation(drawn_cache, tmp_path / "local"), SilentReporter())
    assert [r.seeds for r in there] == [r.seeds for r in here]
    assert all(r.problem == "" for r in there)


def test_a_cluster_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ConfigError, match=r"Ray is not installed; pip install 'mfdetr-cache\[ray\]"
    ):
        list(on_cluster(abs, [1], WorkOptions()))
