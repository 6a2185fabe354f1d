"""The folder of a run with its checkpoint; it is resumed with the same settings only."""

import contextlib
import platform
import shutil
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision

import mfdetr_cache
from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.config import completed, to_dict
from mfdetr_cache.errors import HeadError
from mfdetr_cache.files import disk_error, is_taken, locked_file, make_folder, whole_file, writing
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.head.folder import (
    CONFIG_FILE,
    FREE_FIELDS,
    HeadFolder,
    RunRecord,
    read_run_config,
    save_run_config,
)
from mfdetr_cache.identity import detector_identity, differences, identity_hash
from mfdetr_cache.ops.plain_tensors import is_plain
from mfdetr_cache.training.config import RESCUE_FIELDS, TrainConfig
from mfdetr_cache.training.distributed import Processes
from mfdetr_cache.types import DetectorSpec

_LOCK_FILE = "writer.lock"
CHECKPOINT_FILE = "checkpoint.pt"
# The state of a run that cannot go on; the checkpoint is the one before.
FAILED_FILE = "failed.pt"
# The checkpoint from before the loss grew, as long as it has not fallen again.
BEFORE_FILE = "checkpoint-before.pt"
# Entries of config.json that decide the weights of a run from a cache.
SAME_FIELDS = ("head", "train", "detector", "annotations", "initial")


def record_of_cache(
    recipe: str,
    train: TrainConfig,
    cache: FeatureCache,
    val_cache: FeatureCache | None = None,
    initial: HeadFolder | None = None,
) -> RunRecord:
    """The record of a run that trains from a cache."""
    return record_of(
        recipe,
        train,
        cache.spec,
        initial,
        cache={
            "path": cache.path,
            "cache_id": cache.cache_id,
            "identity_of_detector": identity_hash(detector_identity(cache.spec)),
            "images": cache.identity["images"],
        },
        annotations={"id": cache.annotations.annotations_id, **cache.annotations.source},
        val_cache=None if val_cache is None else val_cache.path,
        categories=cache.categories,
        label_categories=cache.label_categories,
    )


def record_of(
    recipe: str,
    train: TrainConfig,
    spec: DetectorSpec,
    initial: HeadFolder | None,
    **images: Any,  # noqa: ANN401  the fields that tell what it learns from
) -> RunRecord:
    """The record of a run of this process."""
    return RunRecord(
        recipe=recipe,
        train=to_dict(train),
        detector=detector_identity(spec),
        command=sys.argv,
        versions={
            "mfdetr_cache": mfdetr_cache.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        initial=None if initial is None else initial.as_initial,
        **images,
    )


@contextlib.contextmanager
def owned_folder(out: Path) -> Iterator[None]:
    """Own a run folder, or a folder of runs; HeadError if another process is writing it."""
    busy = HeadError(f"{out} is being written by another process; wait for it, or another --out")
    make_folder(out)
    with contextlib.ExitStack() as held:
        with writing(out):
            held.enter_context(locked_file(out / _LOCK_FILE, busy))
        yield


@contextlib.contextmanager
def owned_run(out: Path, processes: Processes) -> Iterator[None]:
    """Own a run folder in the first process; nothing is put into one that holds something else."""
    if not processes.is_first:
        yield
        return
    if is_taken(out) and not (out / CONFIG_FILE).is_file():
        raise _not_empty(out)
    with owned_folder(out):
        try:
            yield
        finally:
            # Settings that were refused leave no folder behind.
            if not is_taken(out):
                with contextlib.suppress(OSError):
                    (out / _LOCK_FILE).unlink()
                    out.rmdir()


def _not_empty(out: Path) -> HeadError:
    return HeadError(
        f"{out} is not empty; nothing was touched. Pass --resume to go on with that run, or "
        "another --out"
    )


def prepare_folder(
    out: Path,
    head: HeadConfig,
    run: RunRecord,
    *,
    resume: bool | Literal["longer"],
    same: Sequence[str] = SAME_FIELDS,
) -> None:
    """Create a run folder, or with ``resume`` check that it holds the same run.

    ``same`` are the entries of ``config.json`` that must be unchanged; a run that failed may go on
    with another learning rate, and with ``longer`` one with more steps. HeadError if the folder is
    in use, holds no run, or a different one.
    """
    if resume:
        before = _run_to_resume(out, run)
        now = {"head": to_dict(head), **run.to_dict()}
        kinds = {"head": HeadConfig, "train": TrainConfig}
        earlier_train = before["train"]
        is_longer = resume == "longer" and run.train["steps"] > earlier_train["steps"]
        free = (*FREE_FIELDS, *(("steps",) if is_longer else ()))
        if any((out / name).is_file() for name in (FAILED_FILE, BEFORE_FILE)):
            free += RESCUE_FIELDS
        for name in same:
            earlier = before.get(name)
            if name in kinds and isinstance(earlier, dict):
                earlier = completed(kinds[name], earlier)
            found = differences(earlier, now.get(name))
            if name == "train":
                found = [d for d in found if d[0] not in free]
            if found:
                key, theirs, ours = found[0]
                where = f"{name}.{key}" if key else name
                raise HeadError(
                    f"cannot resume {out}: {where} was {theirs!r} and is {ours!r} now; "
                    f"give the same settings (--config {out / CONFIG_FILE} has them), or another "
                    "--out"
                )
        noted = (*RESCUE_FIELDS, "steps")
        if {k: earlier_train.get(k) for k in noted} != {k: run.train[k] for k in noted}:
            changed = replace(
                run, run=before.get("run", ""), before=[*before.get("before", ()), earlier_train]
            )
            save_run_config(out, head, changed)
        return
    if is_taken(out):
        raise _not_empty(out)
    make_folder(out)
    save_run_config(out, head, run)


def _run_to_resume(out: Path, run: RunRecord) -> dict[str, Any]:
    """A run folder's ``config.json``; HeadError if there is none, or it is of another cache."""
    if not (out / CONFIG_FILE).is_file():
        raise HeadError(f"{out} holds no run to resume; leave --resume out to begin one")
    before = read_run_config(out)
    earlier = before.get("cache")
    known = earlier.get("cache_id") if isinstance(earlier, dict) else None
    if run.cache is not None and known != run.cache_id:
        raise HeadError(
            f"cannot resume {out}: it learned from another cache than {run.cache['path']}; give "
            "that one, or another --out"
        )
    return before


def save_checkpoint(folder: Path, state: dict[str, Any], name: str = CHECKPOINT_FILE) -> None:
    """Replace the checkpoint by tensors and plain values; a full disk keeps the old one."""
    # Through a file of Python's: torch's own does not say why a write failed.
    with whole_file(folder / name) as partial, partial.open("wb") as file:
        torch.save(state, file)


def keep_checkpoint(folder: Path) -> None:
    """Copy the checkpoint, which is going to be replaced, to ``BEFORE_FILE``; OutputError."""
    with whole_file(folder / BEFORE_FILE) as partial:
        shutil.copyfile(folder / CHECKPOINT_FILE, partial)


def load_checkpoint(folder: Path, name: str = CHECKPOINT_FILE) -> dict[str, Any]:
    """The state that :func:`save_checkpoint` wrote; HeadError if it is missing or damaged."""
    path = folder / name
    if not path.is_file():
        raise HeadError(f"{folder} has no {name}: nothing to resume; leave --resume out")
    try:
        # torch writes checksums and does not look at them.
        with zipfile.ZipFile(path) as packed:
            # Nor does it compress: what unpacks to more than the file may be without end.
            unpacked = sum(entry.file_size for entry in packed.infolist())
            if unpacked > path.stat().st_size or packed.testzip() is not None:
                raise ValueError("a wrong checksum")
        state: object = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(map(is_plain, _tensors(state))):
            raise TypeError("no dictionary of plain tensors")
    except Exception as error:  # torch raises whatever its unpickler meets in damaged bytes
        if isinstance(error, MemoryError) or disk_error(error):  # it may be whole all the same
            raise HeadError(f"{path} cannot be read: {error}") from error
        raise HeadError(
            f"{path} is damaged; remove it to begin this run again with --resume"
        ) from error
    return state


def _tensors(state: object) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, (dict, list)):
        for inner in state.values() if isinstance(state, dict) else state:
            yield from _tensors(inner)
