"""A job of an ablation: one row with one seed, in its own folder."""

import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mfdetr_cache.coco.json_file import read_json
from mfdetr_cache.config import completed, to_dict
from mfdetr_cache.errors import ConfigError, DatasetError, HeadError
from mfdetr_cache.evaluation.coco_metrics import CocoMetrics, Result
from mfdetr_cache.evaluation.results import json_results
from mfdetr_cache.files import read_regular, write_atomically
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.head.folder import FREE_FIELDS
from mfdetr_cache.identity import differences
from mfdetr_cache.sealed import seal, seal_of
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.input.loader import stream_key
from mfdetr_pipelines.ablation.caches import Caches
from mfdetr_pipelines.ablation.rows import AblationRow

_RESULT_FILE = "result.json"
_MASKS_FILE = "masks.json.gz"


@dataclass(frozen=True, slots=True)
class Job:
    """One row with one seed.

    Attributes:
        row: The row, whose recipe has the seed.
        identity: Everything its result depends on; a stored result must have the same.
    """

    row: AblationRow
    folder: Path
    identity: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of its row."""
        return self.row.name

    def read_result(self) -> dict[str, Any] | None:
        """The stored result, if any; HeadError if it is damaged or of another ablation."""
        path = self.folder / _RESULT_FILE
        try:
            data = read_regular(path)
            done: dict[str, Any] = json.loads(data)
            # Results of earlier versions carry no hash.
            if "sha256" in done and not seal_of(data):
                raise ValueError("its bytes are not those that were written")
            before = done["identity"]
            for name, kind in (("head", HeadConfig), ("train", TrainConfig)):
                before[name] = completed(kind, before[name])
            CocoMetrics(**done["mask"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise HeadError(f"{path} is damaged; remove it to train this row again") from error
        # As they come back from JSON, where a tuple is a list.
        now = json.loads(json.dumps(self.identity))
        for key, theirs, ours in differences(before, now):
            if key.removeprefix("train.") not in FREE_FIELDS:
                raise HeadError(
                    f"{path} is of another ablation: {key} was {theirs!r} and is {ours!r} now; "
                    "give another --out"
                )
        return done

    def write_result(
        self,
        metrics: Mapping[str, dict[str, float] | None],
        masks: Sequence[Result],
        seconds: float = 0.0,
        speed: float = 0.0,
        head_ms: float = 0.0,
    ) -> None:
        """Store what was measured, which marks the job as done.

        ``metrics`` are by kind (mask, boundary, box); ``seconds`` and ``speed`` in images per
        second of the training, ``head_ms`` of the head for an image.
        """
        packed = gzip.compress(json_results(masks), 1, mtime=0)
        write_atomically(self.folder / _MASKS_FILE, packed)
        document = {
            "train_seconds": seconds,
            "images_per_second": speed,
            "head_ms": head_ms,
            **metrics,
            "masks_sha256": hashlib.sha256(packed).hexdigest(),
            "identity": self.identity,
        }
        write_atomically(self.folder / _RESULT_FILE, seal(document))

    def read_masks(self) -> list[Result]:
        """The stored COCO mask results; HeadError if they are not those of its result."""
        path = self.folder / _MASKS_FILE
        # Results of earlier versions carry no hash of them.
        wanted = (self.read_result() or {}).get("masks_sha256")
        try:
            if wanted and hashlib.sha256(read_regular(path)).hexdigest() != wanted:
                raise ValueError("its bytes are not those that were written")
            masks: list[Result] = read_json(path, "results file", "").document
        except (OSError, ValueError, DatasetError) as error:
            raise HeadError(
                f"{path} is damaged; remove it and {_RESULT_FILE} to measure this row again"
            ) from error
        return masks


def plan_jobs(
    rows: Sequence[AblationRow], num_seeds: int, out: Path, caches: Mapping[str, Caches]
) -> list[Job]:
    """One job per planned row that can be trained and seed in 0 to N - 1, seed by seed.

    A row without trained weights has one job: its result depends on no seed.
    """
    return [
        _job(row, seed, out, caches[row.name])
        for seed in range(num_seeds)
        for row in rows
        if not row.problem and (row.is_trained or seed == 0)
    ]


def _job(row: AblationRow, seed: int, out: Path, caches: Caches) -> Job:
    row = row.changed(train={"seed": seed})
    identity = {
        "head": to_dict(row.recipe.head),
        "train": to_dict(row.recipe.train),
        "cache": caches.training.cache_id,
        "val_cache": caches.validation_id,
        "baseline": row.baseline,
    }
    opened = {"cache": caches.training, "val_cache": caches.validation}
    # The ids of caches do not tell versions of the annotations apart.
    later = {k: c.annotations.annotations_id for k, c in opened.items() if c.annotations.number}
    if later:
        identity["annotations"] = later
    if row.tune:
        identity["tune"] = row.tune
    return Job(row, row_folder(out, row) / f"seed-{seed}", identity)


def row_folder(out: Path, row: AblationRow) -> Path:
    """The folder below ``--out`` with a row's seeds."""
    return out / "rows" / re.sub(r"[^a-z0-9]+", "-", row.name.lower()).strip("-")


def require_own_folders(rows: Sequence[AblationRow], out: Path) -> None:
    """Refuse rows with the same folder below ``out``; the ConfigError names two of them."""
    taken: dict[Path, str] = {}
    for row in rows:
        folder = row_folder(out, row)
        if folder in taken:
            raise ConfigError(
                f"rows {taken[folder]!r} and {row.name!r} would share {folder}; give each "
                "once, under a name of its own"
            )
        taken[folder] = row.name


def by_stream(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Groups of jobs that can train on the same batches of the same cache."""
    groups: dict[tuple[object, ...], list[Job]] = {}
    for job in jobs:
        caches = (job.identity["cache"], job.identity["val_cache"], job.row.tune)
        groups.setdefault((*caches, *stream_key(job.row.recipe.train)), []).append(job)
    yield from groups.values()
