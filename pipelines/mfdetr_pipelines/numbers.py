"""Numbers as tables and pages show them."""

from collections.abc import Mapping


def percent(value: float | None, digits: int = 1) -> str:
    """A metric in [0, 1] in percent; a dash for None or -1, where there was nothing to measure.

    >>> percent(0.4567), percent(-1.0)
    ('45.7', '-')
    """
    return "-" if value is None or value < 0 else f"{100 * value:.{digits}f}"


def number(value: float | None, digits: int = 2) -> str:
    """A number with so many decimals; a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def metric_table(
    named: Mapping[str, Mapping[str, float] | None],
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of metrics in [0, 1], in percent; those that are None are left out."""
    kept = {name: metrics for name, metrics in named.items() if metrics is not None}
    rows = [[name, *map(percent, metrics.values())] for name, metrics in kept.items()]
    return ["", *next(iter(kept.values()))], rows
