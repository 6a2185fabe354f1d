"""The folder of a run; it is resumed with the same settings only."""

import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torchvision

import mfdetr_cache
from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.config import completed, to_dict
from mfdetr_cache.errors import HeadError
from mfdetr_cache.files import is_taken, make_folder
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.head.folder import CONFIG_FILE, RunRecord, save_run_config
from mfdetr_cache.identity import detector_identity, differences, identity_hash
from mfdetr_cache.training.config import FREE_FIELDS, TrainConfig


def record_of_cache(
    recipe: str, train: TrainConfig, cache: FeatureCache, val_cache: str | None
) -> RunRecord:
    """The record of a run that trains from a cache."""
    identity = detector_identity(cache.spec)
    return RunRecord(
        recipe=recipe,
        train=to_dict(train),
        detector=identity,
        cache={
            "path": cache.path,
            "cache_id": cache.cache_id,
            "identity_of_detector": identity_hash(identity),
            "images": cache.identity["images"],
        },
        annotations={"id": cache.annotations.annotations_id, **cache.annotations.source},
        val_cache=val_cache,
        categories=cache.categories,
        label_categories=cache.label_categories,
        command=sys.argv,
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on, by name."""
    return {
        "mfdetr_cache": mfdetr_cache.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def prepare_folder(
    out: Path,
    head: HeadConfig,
    run: RunRecord,
    *,
    resume: bool,
    same: Sequence[str] = ("head", "train", "detector", "annotations"),
) -> None:
    """Create a run folder, or with ``resume`` check that it holds the same run.

    ``same`` are the entries of ``config.json`` that must be unchanged. HeadError if the folder is
    in use, holds no run, or a different one.
    """
    path = out / CONFIG_FILE
    if resume:
        try:
            before = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise HeadError(f"{out} holds no run to resume ({error})") from error
        now = {"head": to_dict(head), **run.to_dict()}
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
    save_run_config(out, head, run)
