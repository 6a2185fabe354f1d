"""The folder of a training run: what was asked for, with what, and what came of it."""

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision

import mfdetr_cache
from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.storage.open import Location
from mfdetr_cache.choices import Tracker
from mfdetr_cache.config import completed, to_dict
from mfdetr_cache.errors import HeadError
from mfdetr_cache.files import is_taken, make_folder
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.head.folder import CONFIG_FILE, save_run_config
from mfdetr_cache.identity import detector_identity, differences, identity_hash
from mfdetr_cache.training.config import FREE_FIELDS, TrainConfig
from mfdetr_cache.training.recipes import Recipe


@dataclass(frozen=True, slots=True)
class TrainHeadConfig:
    """What ``mfdetr train-head`` is told.

    Attributes:
        cache: Cache of the training split.
        out: Run folder.
        recipe: Head and training settings.
        val_cache: Cache of the validation split, measured at the end.
        val_every: Measure on it every so many steps too, and keep the best weights.
        batch_size: Images per step instead of the recipe's; ``auto`` keeps the recipe's and
            computes a step in as many pieces as the GPU's memory asks for.
        hold_out: Names or ids of categories whose masks are hidden from training.
        track: Where numbers go beside ``metrics.jsonl``.
        epochs: Replaces the recipe's number of steps.
        max_steps: Stop after so many steps of the recipe's schedule shortened to them.
        resume: Go on with the run in ``out``.
        device: Where to train.
    """

    cache: Location
    out: Path
    recipe: Recipe
    val_cache: Location | None = None
    val_every: int | None = None
    batch_size: int | Literal["auto"] | None = None
    hold_out: tuple[str, ...] = ()
    track: tuple[Tracker, ...] = ("tensorboard",)
    epochs: float | None = None
    max_steps: int | None = None
    resume: bool = False
    device: str = "cpu"


def run_document(
    config: TrainHeadConfig,
    train: TrainConfig,
    cache: FeatureCache,
    validation: FeatureCache | None,
) -> dict[str, Any]:
    """What a run's ``config.json`` says beside the architecture.

    Args:
        config: What the user asked for.
        train: The settled training settings.
        cache: Cache of the training split.
        validation: Cache of the validation split, if any.

    Returns:
        Plain values: settings, identities, command, versions.
    """
    return {
        "recipe": config.recipe.name,
        "train": to_dict(train),
        "detector": detector_identity(cache.spec),
        "cache": {
            "path": cache.path,
            "cache_id": cache.cache_id,
            "identity_of_detector": identity_hash(detector_identity(cache.spec)),
            "dataset": cache.identity["dataset"],
        },
        "val_cache": None if validation is None else validation.path,
        "categories": cache.categories,
        "label_categories": list(cache.label_categories),
        "command": sys.argv,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what a training's numbers depend on.

    Returns:
        Name to version.
    """
    return {
        "mfdetr_cache": mfdetr_cache.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def prepare_folder(
    out: Path,
    head: HeadConfig,
    document: dict[str, Any],
    *,
    resume: bool,
    same: Sequence[str] = ("head", "train", "detector"),
) -> None:
    """Begin a run folder, or make sure that an old one is the same run.

    Args:
        out: The folder.
        head: Architecture of the head.
        document: What else ``config.json`` says.
        resume: Whether there should be a run to go on with.
        same: What must not have changed then.

    Raises:
        HeadError: If the folder is in use, or another run would be resumed.
    """
    path = out / CONFIG_FILE
    if resume:
        try:
            before = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise HeadError(f"{out} holds no run to resume ({error})") from error
        now = {"head": to_dict(head), **document}
        kinds = {"head": HeadConfig, "train": TrainConfig}
        for name in same:
            earlier = before.get(name)
            if name in kinds and isinstance(earlier, dict):
                earlier = completed(kinds[name], earlier)
            found = differences(earlier, now[name])
            if name == "train":
                found = [d for d in found if d[0] not in FREE_FIELDS]
            if found:
                key, theirs, ours = found[0]
                raise HeadError(
                    f"cannot resume {out}: {name}.{key} was {theirs!r} and is {ours!r} now; "
                    "give the same settings, or another --out"
                )
        return
    if is_taken(out):
        raise HeadError(
            f"{out} is not empty; nothing was touched. Pass --resume to go on with that "
            "run, or another --out"
        )
    make_folder(out)
    save_run_config(out, head, document)
