"""The rows of an ablation, what they cost, and rows made of others or of a file."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from mfdetr_cache.choices import Baseline, Policy, Tune
from mfdetr_cache.errors import ConfigError
from mfdetr_cache.evaluation.coco_metrics import CocoMetrics
from mfdetr_cache.fields import Fields
from mfdetr_cache.files import read_regular
from mfdetr_cache.training.recipes import Recipe, build_recipe, split_settings
from mfdetr_pipelines.config.typed import as_typed

if TYPE_CHECKING:
    # Torch takes seconds to import, and a mistake in a row is told without.
    from mfdetr_cache.head.cost import HeadCost

BASELINES: dict[Baseline, str] = {
    "box": "box as mask",
    "ellipse": "ellipse in the box",
    "oracle": "annotated mask in the box",
    "sam": "SAM, prompted with the boxes",
}
# What reviewers ask for: how small the head may be.
_SMALL_WIDTHS = (32, 16, 8)
_SMALL_ROI = 8
# Options of extract that a row may have.
DETECTOR_SETTINGS = ("encoder_layer", "num_queries")
EXTRACT_SETTINGS = (*DETECTOR_SETTINGS, "views", "view_policy")
# What a row of a file may say beside its name.
_DEFAULTS = {"recipe": "fast", "set": {}, "cache": "", "val_cache": "", "extract": {}}


@dataclass(frozen=True, slots=True)
class Printed:
    """What the paper prints of a row.

    Attributes:
        params_m: Parameters in millions; None if the table has no such column.
        macs_g: "FLOPs" in 10^9, which are multiply-adds.
        metrics: Mask AP in [0, 1], -1 for a part that is not; None if it has none.
        detector: The detector whose geometry the paper counted.
    """

    params_m: float | None = None
    macs_g: float | None = None
    metrics: CocoMetrics | None = None
    detector: str = "h-detr-r50"

    @property
    def AP(self) -> float | None:
        """Mask AP in [0, 1]."""
        return None if self.metrics is None else self.metrics.AP


@dataclass(frozen=True, slots=True)
class AblationRow:
    """A head and training, or a baseline, with the paper's numbers and what it costs.

    Attributes:
        paper: The paper's numbers, all None if it is none of its rows.
        note: What was changed to fit the detector; may be empty.
        baseline: Name of a baseline that needs no head; empty for a head.
        curve: Name without the label fraction, for rows that are points of a curve.
        epochs: Length of the training; None for the recipe's steps.
        own_width: Whether the hidden width is the detector's own, whatever the recipe says.
        cache: Where it learns from; empty for a ``--cache`` that was extracted as it asks.
        val_cache: Where it is measured; empty for the ``--val-cache`` that fits the other.
        extract: How its caches are extracted, where that is not as it comes, by option.
        tune: What of the detector is trained too, from its images; empty for a head on a cache.
        cost: Of its head, filled in by the plan; None if the head cannot be built.
        passes: Over the images, filled in by the plan; None without training.
        problem: Why it cannot be trained or measured; empty if it can.
    """

    name: str
    recipe: Recipe
    paper: Printed = Printed()
    note: str = ""
    baseline: Baseline | Literal[""] = ""
    curve: str = ""
    epochs: float | None = None
    own_width: bool = False
    cache: str = ""
    val_cache: str = ""
    extract: Mapping[str, int | str] = field(default_factory=dict)
    tune: Tune | Literal[""] = ""
    cost: "HeadCost | None" = None
    passes: float | None = None
    problem: str = ""

    @property
    def is_trained(self) -> bool:
        """Whether it has trained weights, which depend on the seed; known once it is planned."""
        return self.cost is not None and self.cost.parameters > 0

    def changed(
        self,
        head: Mapping[str, Any] = {},
        train: Mapping[str, Any] = {},
        **fields: Any,  # noqa: ANN401
    ) -> "AblationRow":
        """The row with other settings of head and training, and other fields."""
        recipe = replace(
            self.recipe,
            head=replace(self.recipe.head, **head),
            train=replace(self.recipe.train, **train),
        )
        return replace(self, recipe=recipe, **fields)


def with_settings(
    rows: Sequence[AblationRow], head: Mapping[str, Any], train: Mapping[str, Any]
) -> tuple[AblationRow, ...]:
    """Rows with fields of head and training replaced; ``steps`` replace a row's epochs too.

    A row for which the settings are invalid has a ``problem``.
    """
    made = []
    for row in rows:
        epochs = None if "steps" in train else row.epochs
        own_width = row.own_width and "hidden_dim" not in head
        try:
            made.append(row.changed(head, train, epochs=epochs, own_width=own_width))
        except ValueError as error:
            made.append(replace(row, problem=str(error)))
    return tuple(made)


def baseline_rows(names: Sequence[str]) -> tuple[AblationRow, ...]:
    """Rows of baselines; ConfigError if one is unknown."""
    for name in names:
        if name not in BASELINES:
            raise ConfigError(f"--baseline {name}: unknown; use {', '.join(BASELINES)}")
    return tuple(
        AblationRow(BASELINES[name], build_recipe("fast", {}), baseline=name)  # type: ignore[index, arg-type]
        for name in names
    )


def rows_of_file(path: Path) -> tuple[AblationRow, ...]:
    """Rows of a TOML file: ``[[row]]`` tables with ``name``, ``recipe``, ``set`` and caches.

    ConfigError if the file or a row cannot be used.
    """
    try:
        document = tomllib.loads(read_regular(path).decode())
    except OSError as error:
        raise ConfigError(f"ablation file {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"ablation file {path} is not TOML ({error})") from error
    if not document.get("row"):
        raise ConfigError(f"{path} has no [[row]]")
    rows = [_row(entry) for entry in Fields(document, str(path), ConfigError).each("row")]
    names = [r.name for r in rows]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ConfigError(f"{path}: two rows are called {twice[0]!r}")
    return tuple(rows)


def _row(entry: Fields) -> AblationRow:
    if unknown := sorted(set(entry.values) - set(_DEFAULTS) - {"name"}):
        known = ", ".join(("name", *_DEFAULTS))
        raise ConfigError(f"{entry.where} has the unknown key {unknown[0]!r}; use {known}")
    where = f"{entry.where} ({entry.text('name')!r})"
    entry = Fields({**_DEFAULTS, **entry.values}, where, ConfigError)
    extract = entry.fields("extract")
    for name in extract.values:
        if name not in EXTRACT_SETTINGS:
            known = ", ".join(EXTRACT_SETTINGS)
            raise ConfigError(f"{where}: extract has the unknown setting {name!r}; use {known}")
        if name == "view_policy":
            extract.text(name, get_args(Policy))
        else:
            extract.integer(name, 1)
    try:
        settings = {k: as_typed(v) for k, v in entry.fields("set").values.items()}
        recipe = build_recipe(entry.text("recipe"), settings)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    cache, val_cache = entry.text("cache"), entry.text("val_cache")
    return AblationRow(
        entry.text("name"), recipe, cache=cache, val_cache=val_cache, extract=extract.values
    )


def label_fraction_rows(
    rows: Sequence[AblationRow], fractions: Sequence[float]
) -> tuple[AblationRow, ...]:
    """Every row with the masks of only a fraction of the images, for each fraction in (0, 1].

    ConfigError if a fraction is outside its range.
    """
    made = []
    for row in rows:
        if row.baseline:
            made.append(row)
            continue
        for fraction in fractions:
            if not 0 < fraction <= 1:
                raise ConfigError(f"--label-fraction {fraction}: give a number above 0, up to 1")
            name = f"{row.name}, {100 * fraction:g} % of the masks"
            train = {"label_fraction": fraction}
            made.append(row.changed(train=train, name=name, curve=row.name))
    return tuple(made)


def varied_rows(
    rows: Sequence[AblationRow], settings: Mapping[str, str]
) -> tuple[AblationRow, ...]:
    """Every row with every combination of the values, between commas, of the settings.

    ConfigError if a setting is unknown or a value cannot be used.
    """
    for key, values in settings.items():
        made: list[AblationRow] = []
        for row in rows:
            for value in [""] if row.baseline else values.split(","):
                head, train = split_settings({key: value} if value else {}, "--vary")
                named = replace(row, name=f"{row.name}, {key}={value}" if value else row.name)
                made += with_settings([named], head, train)
        rows = made
    return tuple(rows)


def smaller_rows(rows: Sequence[AblationRow]) -> tuple[AblationRow, ...]:
    """Every row, then with widths 32, 16 and 8, and with RoIAlign 8 x 8 (beyond Tables 4 and 9)."""
    smaller = {f"d={width}": {"hidden_dim": width} for width in _SMALL_WIDTHS}
    smaller[f"RoI {_SMALL_ROI} x {_SMALL_ROI}"] = {"roi_size": _SMALL_ROI}
    made: list[AblationRow] = []
    for row in rows:
        made.append(row)
        for name, head in smaller.items() if not row.baseline else ():
            named = replace(row, name=f"{row.name}, {name}", paper=Printed())
            made += with_settings([named], head, {})
    return tuple(made)
