"""The checkpoint of a run, from which it is resumed."""

import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mfdetr_cache.errors import HeadError
from mfdetr_cache.files import disk_error, whole_file
from mfdetr_cache.ops.plain_tensors import is_plain

CHECKPOINT_FILE = "checkpoint.pt"
# The state of a run that cannot go on; the checkpoint is the one before.
FAILED_FILE = "failed.pt"
# The checkpoint from before the loss grew, as long as it has not fallen again.
BEFORE_FILE = "checkpoint-before.pt"


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
