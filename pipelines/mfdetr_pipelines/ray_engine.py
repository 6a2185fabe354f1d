"""Ray as the engine: parts of a cache and groups of heads as tasks on a cluster.

Tasks and not actors: a task whose node dies is run again wherever there is room, while an actor
waits for a node like its own. What is slow to begin is kept by the worker process: Ray uses a
process again for the next task, which then finds the detector loaded.
"""

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from mfdetr_cache.cache.creation import CacheContent
from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.schema import Part
from mfdetr_cache.cache.storage.open import open_storage
from mfdetr_cache.cache.writer import CacheWriter, require_same_content
from mfdetr_cache.coco.annotations import CocoSplit, load_coco_split
from mfdetr_cache.detectors.protocol import Detector
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.errors import ConfigError, MfdetrError, StoppedError
from mfdetr_cache.extraction.cluster import Cluster
from mfdetr_cache.extraction.config import ExtractConfig
from mfdetr_cache.extraction.content import plan_cache
from mfdetr_cache.extraction.stream import Extraction
from mfdetr_cache.reporter import SilentReporter

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class PartResult:
    """What a task did.

    Attributes:
        images: Images extracted.
        num_bytes: Bytes written.
        detector_seconds: Time in the detector.
    """

    images: int
    num_bytes: int
    detector_seconds: float


def fill_parts(
    config: ExtractConfig, parts: Sequence[Part], cluster: Cluster
) -> Iterator[tuple[Part, PartResult]]:
    """Fill parts of a cache that has been created, each as a task.

    Args:
        config: The extraction; its paths mean the same on every node.
        parts: Which parts.
        cluster: Where.

    Yields:
        A part that is whole now, and what it took.

    Raises:
        ConfigError: If Ray is not installed or the cluster cannot be reached.
        StoppedError: If somebody pressed Ctrl-C.
    """
    yield from on_cluster(functools.partial(_fill_part, config), parts, cluster)


def on_cluster(
    function: Callable[[ItemT], ResultT], items: Sequence[ItemT], cluster: Cluster
) -> Iterator[tuple[ItemT, ResultT]]:
    """Call a function for every item as a task; tasks whose node dies run again elsewhere.

    Args:
        function: What to do; may be called twice for an item, so that doing it again must be
            harmless.
        items: For what.
        cluster: Where.

    Yields:
        An item and its result, in the order they are done.

    Raises:
        ConfigError: If Ray is not installed or the cluster cannot be reached.
        StoppedError: If somebody pressed Ctrl-C.
    """
    with _connected(cluster) as ray:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        cpus = int(ray.cluster_resources().get("CPU", 1))
        # As many as were asked for; else twice as many as run, so that no worker waits for work.
        most = cluster.workers or 2 * (gpus or max(1, cpus // 2))
        needs = {"num_gpus": 1 if gpus else 0, "num_cpus": 1}

        def call(item: ItemT) -> ResultT:
            return function(item)

        task = ray.remote(call).options(max_retries=-1, retry_exceptions=False, **needs)
        waiting = list(reversed(items))
        running: dict[Any, ItemT] = {}
        try:
            while waiting or running:
                while waiting and len(running) < most:
                    item = waiting.pop()
                    running[task.remote(item)] = item
                done, _ = ray.wait(list(running), num_returns=1)
                yield running.pop(done[0]), _result(ray, done[0])
        except KeyboardInterrupt:
            for reference in running:
                ray.cancel(reference)
            raise StoppedError(
                "stopped; what is done is kept, the same command goes on from there"
            ) from None


def _result(ray: Any, reference: Any) -> Any:  # noqa: ANN401  Ray ships no types for these
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        # The reason itself, if it is one a person can act on; else the traceback of the worker.
        if isinstance(error.cause, MfdetrError):
            raise error.cause from None
        raise


@contextmanager
def _connected(cluster: Cluster) -> Iterator[Any]:
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise ConfigError(
            "--engine ray: Ray is not installed; pip install 'mfdetr-cache[ray]'"
        ) from None
    before = ray.is_initialized()
    if not before:
        try:
            ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            where = f"--address {cluster.address}"
            raise ConfigError(f"{where}: no Ray cluster there ({reason})") from error
    try:
        yield ray
    finally:
        if not before:
            ray.shutdown()


@functools.lru_cache(maxsize=1)
def _prepared(config: ExtractConfig) -> tuple[CocoSplit, Detector, CacheContent]:
    """What all parts of an extraction need, kept by the worker process."""
    split = load_coco_split(config.annotations).first(config.limit)
    detector = load_detector(config.detector, config.weights, config.options)
    content = plan_cache(split, detector, config)
    # The cache keeps the parts it was created with, whatever this version would choose.
    storage = open_storage(config.cache)
    require_same_content(storage, content)
    return split, detector, replace(content, layout=FeatureCache.open(storage).layout)


def _fill_part(config: ExtractConfig, part: Part) -> PartResult:
    """Fill one part; runs on a worker."""
    split, detector, content = _prepared(config)
    writer = CacheWriter(open_storage(config.cache), content)
    worker = Extraction(config, split, content, detector, writer, SilentReporter())
    worker.run([part])
    return PartResult(worker.num_extracted, worker.num_bytes, worker.detector_seconds)
