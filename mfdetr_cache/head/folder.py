"""A trained head as a folder: its weights, its architecture, and the detector it belongs to."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mfdetr_cache.choices import Which
from mfdetr_cache.config import from_dict, to_dict
from mfdetr_cache.errors import HeadError
from mfdetr_cache.files import write_atomically
from mfdetr_cache.head.build import build_head
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.identity import Identity, identity_hash, spec_from_identity
from mfdetr_cache.sealed import seal, seal_of

HEAD_FILE = "head.safetensors"
BEST_HEAD_FILE = "head-best.safetensors"
CONFIG_FILE = "config.json"
# What weights say of themselves: their hash and their run.
_SEAL = "sha256 and run"
# Values of a part that an old head may be without.
_MOST_ADDED = 2**16
# Training settings that no weight depends on: a run may go on with others.
FREE_FIELDS = ("num_threads", "num_processes", "checkpoint_minutes")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """The entries of a run's ``config.json`` beside the architecture of its head.

    Attributes:
        cache: Path, id and images of the training cache; None without a cache.
        annotations: Id and source of the annotations, with a cache.
        val_cache: Path of the validation cache.
        joint: Settings of ``train-joint`` beside ``train``.
        categories: ``{"id", "name"}`` of the dataset's categories.
        label_categories: Category id of each of the detector's labels, -1 for none.
        versions: Versions of the packages that results depend on.
        run: Hash of what decides the weights; every file of weights names it too.
        before: Training settings of the steps before a failure, where some were changed then.
        initial: Hash of the weights it started from, and what these had ``learned_from``; None for
            fresh ones.
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
    run: str = ""
    before: Sequence[dict[str, Any]] = ()
    initial: dict[str, Any] | None = None

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

    @property
    def learned_from(self) -> dict[str, int]:
        """``val_split`` by the id of each cache that it, or its start, was trained on."""
        earlier = {} if self.initial is None else self.initial["learned_from"]
        return earlier if self.cache_id is None else {**earlier, self.cache_id: self.val_split}

    def to_dict(self) -> dict[str, Any]:
        """The fields as they stand in the file."""
        # A run from a cache says null where it has no validation cache; one without says neither.
        unused = {"joint"} if self.joint is None else {"cache", "annotations", "val_cache"}
        unused |= {name for name in ("before", "initial") if not getattr(self, name)}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in unused}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "RunRecord":
        """The record in a file; entries that an earlier version did not write are empty."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in document.items() if name in known})


@dataclass(frozen=True)
class HeadFolder:
    """A trained head, in evaluation mode, with its run record and folder.

    ``step`` is that of its last weights; None for the best, and for heads of earlier versions.
    """

    head: MaskHead
    run: RunRecord
    path: Path
    step: int | None = None

    @property
    def unfinished(self) -> str:
        """At which step of how many the weights are, if the training has not ended; else empty."""
        steps = self.run.train.get("steps", 0)
        if self.step is None or self.step >= steps:
            return ""
        return f"{self.path} is of step {self.step} of {steps}: its training was not ended"

    @property
    def as_initial(self) -> dict[str, Any]:
        """The entry ``initial`` of a run that starts from it."""
        return {
            "sha256": _hash_of(self.head.state_dict()),
            "learned_from": self.run.learned_from,
        }

    @property
    def detector(self) -> Identity:
        """Identity of the detector the head was trained for."""
        return self.run.detector


_FILES: dict[Which, str] = {"last": HEAD_FILE, "best": BEST_HEAD_FILE}


def save_head(
    folder: Path, weights: Mapping[str, Tensor], which: Which = "last", step: int | None = None
) -> None:
    """Write the last or best weights; OutputError if the disk is full, with the old ones kept.

    They name their own hash and, beside a ``config.json``, its run, and the step they are of.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    of_run = run_of_folder(folder)
    # Several entries would come in any order, and the same weights are to be the same bytes.
    known = (_hash_of(tensors), of_run, *([] if step is None else [str(step)]))
    about = {_SEAL: " ".join(known)}
    # Not save_file, whose files nobody else may read.
    write_atomically(folder / _FILES[which], save(tensors, metadata=about))


def save_run_config(folder: Path, config: HeadConfig, run: RunRecord) -> None:
    """Write a run's ``config.json``, sealed; OutputError if the disk is full."""
    full = {"head": to_dict(config), **run.to_dict()}
    write_atomically(folder / CONFIG_FILE, seal({**full, "run": run.run or _run_of(full)}))


def run_of_folder(folder: Path) -> str:
    """The hash of the run in a folder; empty where there is none, or none that has one."""
    is_run = (folder / CONFIG_FILE).is_file()
    return str(read_run_config(folder).get("run", "")) if is_run else ""


def read_run_config(folder: Path) -> dict[str, Any]:
    """A run's ``config.json``; HeadError if it cannot be read or was changed.

    One that an earlier version wrote has no hash and is taken as it is.
    """
    path = folder / CONFIG_FILE
    try:
        data = path.read_bytes()
        document = json.loads(data)
        if not isinstance(document, dict):
            raise ValueError("no JSON object")
    except OSError as error:
        raise HeadError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise HeadError(f"{path} is damaged ({error})") from error
    if ("sha256" in document or "run" in document) and not seal_of(data):
        raise HeadError(
            f"{path} was changed: it is not what was written; restore it, or train the head again"
        )
    return document


def load_head(folder: Path, which: Which = "last") -> HeadFolder:
    """The last or best weights of a run folder, as a head on the CPU with its run record.

    HeadError if a file is missing, damaged, changed or does not fit the others.
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
    document = read_run_config(folder)
    try:
        config = from_dict(HeadConfig, document["head"], f"{folder / CONFIG_FILE}: head")
        run = RunRecord.from_dict(document)
        spec = spec_from_identity(run.detector)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise HeadError(f"{folder / CONFIG_FILE} is damaged ({error!r})") from error
    weights, step = _read_weights(weights_file, document)
    # Sizes that a config.json claims must not take memory that the weights do not have.
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in build_head(config, spec).state_dict().items()}
    wrong = [k for k, shape in shapes.items() if k in weights and weights[k].shape != shape]
    wrong += [k for k, shape in shapes.items() if k not in weights and shape.numel() > _MOST_ADDED]
    if wrong:
        raise HeadError(f"{weights_file} does not fit its config.json: {wrong[0]} has another size")
    head = build_head(config, spec)
    try:
        head.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:300]
        raise HeadError(f"{weights_file} does not fit its config.json: {reason}") from error
    return HeadFolder(head.eval(), run, folder, step)


def _read_weights(path: Path, document: Mapping[str, Any]) -> tuple[dict[str, Tensor], int | None]:
    """The tensors of a file and their step, checked against hash and the run they must be of."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise HeadError(f"{path} is damaged ({error})") from error
    content, of_run, step = (*about.get(_SEAL, "").split(" "), "", "", "")[:3]
    # A config.json from before there were hashes may have weights without.
    if (content or "sha256" in document) and content != _hash_of(weights):
        raise HeadError(
            f"{path} was changed: it is not what was written; restore it, or train the head again"
        )
    if of_run != document.get("run", ""):
        raise HeadError(f"{path} is of another run than its config.json; restore one of them")
    return weights, int(step) if step.isdigit() else None


def _hash_of(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _run_of(document: Mapping[str, Any]) -> str:
    """Hash of what decides the weights; a tuned detector is another one at the end."""
    cache = document.get("cache") or {}
    train = {k: v for k, v in document["train"].items() if k not in FREE_FIELDS}
    initial = document.get("initial")
    return identity_hash(
        {
            **{k: document.get(k) for k in ("head", "annotations", "joint")},
            **({} if initial is None else {"initial": initial}),
            "train": train,
            "cache_id": cache.get("cache_id"),
        }
    )
