"""A trained head as a folder: its weights, its architecture, and the detector it belongs to."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mfdetr_cache.choices import Which
from mfdetr_cache.config import from_dict, to_dict
from mfdetr_cache.errors import HeadError
from mfdetr_cache.files import write_atomically
from mfdetr_cache.head.build import build_head
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.identity import Identity, spec_from_identity

HEAD_FILE = "head.safetensors"
BEST_HEAD_FILE = "head-best.safetensors"
CONFIG_FILE = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """The entries of a run's ``config.json`` beside the architecture of its head.

    Attributes:
        recipe: Name of the recipe.
        train: Training settings, as plain values.
        detector: Identity of the detector.
        cache: Path, id and images of the training cache; None without a cache.
        annotations: Id and source of the annotations, with a cache.
        val_cache: Path of the validation cache.
        joint: Settings of ``train-joint`` beside these.
        categories: ``{"id", "name"}`` of the dataset's categories.
        label_categories: Category id of each of the detector's labels, -1 for none.
        command: The command line.
        versions: Versions of the packages that results depend on.
    """

    recipe: str | None = None
    train: dict[str, Any] = field(default_factory=dict)
    detector: Identity
    cache: dict[str, Any] | None = None
    annotations: dict[str, Any] | None = None
    val_cache: str | None = None
    joint: dict[str, Any] | None = None
    categories: Sequence[dict[str, Any]] = ()
    label_categories: Sequence[int] = ()
    command: Sequence[str] = ()
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def held_out(self) -> tuple[int, ...]:
        """Ids of the categories whose masks were hidden from training."""
        return tuple(self.train.get("held_out", ()))

    @property
    def val_split(self) -> int:
        """Every so-many-th image of the cache was left out of training; 0 for none."""
        return int(self.train.get("val_split", 0))

    @property
    def cache_id(self) -> str | None:
        """Of the cache it was trained from."""
        return None if self.cache is None else self.cache["cache_id"]

    def to_dict(self) -> dict[str, Any]:
        """The fields as they stand in the file."""
        # A run from a cache says null where it has no validation cache; one without says neither.
        unused = {"joint"} if self.joint is None else {"cache", "annotations", "val_cache"}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in unused}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "RunRecord":
        """The record in a file; entries that an earlier version did not write are empty."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in document.items() if name in known})


@dataclass(frozen=True)
class HeadFolder:
    """A trained head, in evaluation mode, with its run record and folder."""

    head: MaskHead
    run: RunRecord
    path: Path

    @property
    def detector(self) -> Identity:
        """Identity of the detector the head was trained for."""
        return self.run.detector


_FILES: dict[Which, str] = {"last": HEAD_FILE, "best": BEST_HEAD_FILE}


def save_head(folder: Path, weights: Mapping[str, Tensor], which: Which = "last") -> None:
    """Write the last or best weights; OutputError if the disk is full, with the old ones kept."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    # Not save_file, whose files nobody else may read.
    write_atomically(folder / _FILES[which], save(tensors, metadata={"format": "pt"}))


def save_run_config(folder: Path, config: HeadConfig, run: RunRecord) -> None:
    """Write a run's ``config.json``; OutputError if the disk is full."""
    full = {"head": to_dict(config), **run.to_dict()}
    write_atomically(folder / CONFIG_FILE, json.dumps(full, indent=2).encode())


def load_head(folder: Path, which: Which = "last") -> HeadFolder:
    """The last or best weights of a run folder, as a head on the CPU with its run record.

    HeadError if a file is missing, damaged or does not fit the others.
    """
    weights_file = folder / _FILES[which]
    for file in (folder / CONFIG_FILE, weights_file):
        if not file.is_file():
            if which == "best" and (folder / HEAD_FILE).is_file():
                raise HeadError(
                    f"{folder} has no {BEST_HEAD_FILE}: it was trained without --val-cache; use "
                    "--which last"
                )
            raise HeadError(
                f"{folder} is no trained head: it has no {file.name}; pass a train-head --out"
            )
    try:
        document = json.loads((folder / CONFIG_FILE).read_bytes())
        config = from_dict(HeadConfig, document["head"], f"{folder / CONFIG_FILE}: head")
        run = RunRecord.from_dict(document)
        head = build_head(config, spec_from_identity(run.detector))
    except (ValueError, KeyError, TypeError) as error:
        raise HeadError(f"{folder / CONFIG_FILE} is damaged ({error!r})") from error
    try:
        weights = load_file(weights_file)
    except (SafetensorError, OSError) as error:
        raise HeadError(f"{weights_file} is damaged ({error})") from error
    try:
        head.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise HeadError(f"{weights_file} does not fit its config.json: {reason}") from error
    return HeadFolder(head.eval(), run, folder)
