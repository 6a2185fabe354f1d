"""What a user may choose about categories and labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from mfdetr_cache.config import to_dict
from mfdetr_cache.errors import ConfigError
from mfdetr_cache.files import read_regular
from mfdetr_cache.options import Option

# A field below, in what a version of annotations is made from, and in a detector's settings.
CLASS_AGNOSTIC = "class_agnostic"
# Beside it in these: what has other ids in a cache than in the annotation file.
RENUMBERED = "renumbered"
# The label and the category of all.
OBJECT = "object"


def parse_map(texts: Sequence[str]) -> dict[str, str]:
    """``category=label`` texts, or files of such lines, as a dictionary."""
    lines: list[str] = []
    for text in texts:
        is_file = "=" not in text and "\0" not in text and Path(text).is_file()
        lines += read_regular(Path(text)).decode().splitlines() if is_file else [text]
    wanted = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    pairs = [line.partition("=") for line in wanted]
    if not all(key.strip() and value.strip() for key, _, value in pairs):
        raise ValueError("write category=label, such as pedestrian=person, or a file of such lines")
    return {key.strip(): value.strip() for key, _, value in pairs}


def parse_names(text: str) -> tuple[str, ...]:
    """Names between commas."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise ValueError("give names, such as person,car")
    return names


@dataclass(frozen=True, slots=True)
class LabelOptions:
    """Categories and labels.

    Attributes:
        map: Take a category for a label of another name, such as pedestrian=person, or a file of
            such lines. Categories that share a label become one.
        only: Keep these categories alone, such as person,car; the images stay.
        class_agnostic: One label for any object: masks also for categories that the detector has no
            label for. The detector's classes no longer count.
    """

    map: Annotated[Mapping[str, str], Option(parse=parse_map)] = field(default_factory=dict)
    only: Annotated[tuple[str, ...], Option(metavar="NAMES", parse=parse_names)] = ()
    class_agnostic: bool = False

    def __post_init__(self) -> None:
        if self.class_agnostic and self.map:
            raise ConfigError("--class-agnostic has one label for all: leave --map out")

    def identity(self) -> dict[str, Any]:
        """What of it is chosen, as plain values."""
        return {name: value for name, value in to_dict(self).items() if value}

    @classmethod
    def of(cls, identity: Mapping[str, Any]) -> "LabelOptions":
        """The options that gave an identity, among other values that stand beside theirs."""
        return cls(
            dict(identity.get("map", {})),
            tuple(identity.get("only", ())),
            bool(identity.get(CLASS_AGNOSTIC, False)),
        )
