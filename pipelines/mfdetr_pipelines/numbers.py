"""Numbers as tables and pages show them."""


def percent(value: float | None, digits: int = 1) -> str:
    """A metric in [0, 1] in percent; a dash for None or -1, where there was nothing to measure.

    >>> percent(0.4567), percent(-1.0)
    ('45.7', '-')
    """
    return "-" if value is None or value < 0 else f"{100 * value:.{digits}f}"
