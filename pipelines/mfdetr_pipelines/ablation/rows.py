"""The rows of an ablation: from a table of the paper, recipes or a file."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mfdetr_cache.choices import Baseline
from mfdetr_cache.errors import ConfigError
from mfdetr_cache.training.recipes import Recipe, build_recipe
from mfdetr_pipelines.ablation.paper_tables import PaperRow, PaperTable

BASELINES: dict[Baseline, str] = {
    "box": "box as mask",
    "ellipse": "ellipse in the box",
    "oracle": "annotated mask in the box",
    "sam": "SAM, prompted with the boxes",
}
# What reviewers ask for: how small the head may be.
_SMALL_WIDTHS = (32, 16, 8)
_SMALL_ROI = 8


@dataclass(frozen=True, slots=True)
class AblationRow:
    """One row: what is trained, and what the paper says about it.

    Attributes:
        name: What distinguishes it.
        recipe: Head and training.
        paper: The paper's row, where it is one.
        note: What had to be changed to fit the detector; empty if nothing.
        baseline: Masks that need no head of ours, in place of a training; empty for a head.
        curve: The row without its label fraction, where it is a point of a curve over them.
        epochs: How long it trains; None for the recipe's steps.
        own_width: Whether its hidden width is the detector's own, whatever the recipe says.
        problem: Why its settings cannot be; empty if they can.
    """

    name: str
    recipe: Recipe
    paper: PaperRow | None = None
    note: str = ""
    baseline: Baseline | Literal[""] = ""
    curve: str = ""
    epochs: float | None = None
    own_width: bool = False
    problem: str = ""


def rows_of_table(table: PaperTable) -> tuple[AblationRow, ...]:
    """The rows of a table of the paper.

    Args:
        table: The table.

    Returns:
        Its rows in order.
    """
    return tuple(
        AblationRow(r.name, r.recipe, r, epochs=r.epochs, own_width=r.own_width) for r in table.rows
    )


def with_settings(
    rows: Sequence[AblationRow], head: Mapping[str, Any], train: Mapping[str, Any]
) -> tuple[AblationRow, ...]:
    """Rows with the same settings replaced in all of them.

    Args:
        rows: Rows.
        head: Fields of the architecture.
        train: Fields of the training; ``steps`` replace a row's epochs too.

    Returns:
        New rows; one that cannot have these settings says why.
    """
    made = []
    for row in rows:
        try:
            recipe = replace(
                row.recipe,
                head=replace(row.recipe.head, **head),
                train=replace(row.recipe.train, **train),
            )
        except ValueError as error:
            made.append(replace(row, problem=str(error)))
            continue
        epochs = None if "steps" in train else row.epochs
        own_width = row.own_width and "hidden_dim" not in head
        made.append(replace(row, recipe=recipe, epochs=epochs, own_width=own_width))
    return tuple(made)


def baseline_rows(names: Sequence[str]) -> tuple[AblationRow, ...]:
    """Rows of masks that need no head.

    Args:
        names: Which.

    Returns:
        One row each.

    Raises:
        ConfigError: If one is unknown.
    """
    for name in names:
        if name not in BASELINES:
            raise ConfigError(f"--baseline {name}: unknown; use {', '.join(BASELINES)}")
    return tuple(
        AblationRow(BASELINES[name], build_recipe("fast", {}), baseline=name)  # type: ignore[index, arg-type]
        for name in names
    )


def rows_of_file(path: Path) -> tuple[AblationRow, ...]:
    """Rows written down in TOML: ``[[row]]`` tables with ``name``, ``recipe`` and ``set``.

    Args:
        path: The file.

    Returns:
        Its rows in order.

    Raises:
        ConfigError: If the file or a row cannot be used.
    """
    try:
        document = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"ablation file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"ablation file {path} is not TOML ({error})") from error
    entries = document.get("row")
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path} has no [[row]]")
    rows = []
    for number, entry in enumerate(entries, 1):
        unknown = sorted(set(entry) - {"name", "recipe", "set"})
        if unknown or not isinstance(entry.get("name"), str):
            what = f"has the unknown key {unknown[0]!r}" if unknown else "has no name"
            raise ConfigError(f"{path}: row {number} {what}; use name, recipe and set")
        settings = {k: _as_typed(v) for k, v in entry.get("set", {}).items()}
        try:
            recipe = build_recipe(str(entry.get("recipe", "fast")), settings)
        except ConfigError as error:
            raise ConfigError(f"{path}: row {entry['name']!r}: {error}") from error
        rows.append(AblationRow(entry["name"], recipe))
    names = [r.name for r in rows]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ConfigError(f"{path}: two rows are called {twice[0]!r}")
    return tuple(rows)


def label_fraction_rows(
    rows: Sequence[AblationRow], fractions: Sequence[float]
) -> tuple[AblationRow, ...]:
    """Every row with the masks of only a part of the images.

    Args:
        rows: Rows.
        fractions: Parts in (0, 1].

    Returns:
        New rows, row by row.

    Raises:
        ConfigError: If a fraction is outside its range.
    """
    made = []
    for row in rows:
        if row.baseline:
            made.append(row)
            continue
        for fraction in fractions:
            if not 0 < fraction <= 1:
                raise ConfigError(f"--label-fraction {fraction}: give a number above 0, up to 1")
            train = replace(row.recipe.train, label_fraction=fraction)
            name = f"{row.name}, {100 * fraction:g} % of the masks"
            recipe = replace(row.recipe, train=train)
            made.append(replace(row, name=name, recipe=recipe, curve=row.name))
    return tuple(made)


def smaller_rows(rows: Sequence[AblationRow]) -> tuple[AblationRow, ...]:
    """Every row, followed by smaller heads than the paper's tables hold (beyond Tables 4 and 9).

    Args:
        rows: Rows.

    Returns:
        Each row, the same with hidden widths of 32, 16 and 8, and with RoIAlign of 8 x 8.
    """
    made: list[AblationRow] = []
    for row in rows:
        made.append(row)
        if row.baseline:
            continue
        head = row.recipe.head
        smaller = {f"d={width}": replace(head, hidden_dim=width) for width in _SMALL_WIDTHS}
        smaller[f"RoI {_SMALL_ROI} x {_SMALL_ROI}"] = replace(head, roi_size=_SMALL_ROI)
        for name, head in smaller.items():
            changed = replace(
                row, name=f"{row.name}, {name}", recipe=replace(row.recipe, head=head), paper=None
            )
            made.append(replace(changed, own_width=row.own_width and not name.startswith("d=")))
    return tuple(made)


def _as_typed(value: Any) -> str:  # noqa: ANN401  whatever TOML holds
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(_as_typed(v) for v in value)
    return str(value)
