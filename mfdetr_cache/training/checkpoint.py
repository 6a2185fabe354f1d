"""What a training needs to go on after it was stopped."""

from pathlib import Path
from typing import Any

import torch

from mfdetr_cache.errors import HeadError
from mfdetr_cache.files import whole_file

CHECKPOINT_FILE = "checkpoint.pt"


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write what a training needs to go on.

    Args:
        folder: The run folder.
        state: Tensors and plain values only.

    Raises:
        OutputError: If the disk is full; the checkpoint before is kept.
    """
    # Through a file of Python's: torch's own does not say why a write failed.
    with whole_file(folder / CHECKPOINT_FILE) as partial, partial.open("wb") as file:
        torch.save(state, file)


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """What :func:`save_checkpoint` wrote.

    Args:
        folder: The run folder.

    Returns:
        The state.

    Raises:
        HeadError: If there is none or it is damaged.
    """
    path = folder / CHECKPOINT_FILE
    if not path.is_file():
        raise HeadError(f"{folder} has no {CHECKPOINT_FILE}: nothing to resume; leave --resume out")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler meets in damaged bytes
        raise HeadError(f"{path} is damaged; leave --resume out to begin again") from error
    return state
