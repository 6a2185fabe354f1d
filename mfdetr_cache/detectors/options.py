"""What a user may choose about a detector."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from mfdetr_cache.coco.options import CLASS_AGNOSTIC
from mfdetr_cache.files import read_regular
from mfdetr_cache.options import Option

# The last output of a softmax.
NO_OBJECT = "no object"


def names_in_file(text: str) -> tuple[str, ...]:
    """One name a line, as ``--labels`` takes them."""
    try:
        lines = read_regular(Path(text)).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read as a list of names ({error})") from error
    names = tuple(name for line in lines if (name := line.strip()))
    if not names:
        raise ValueError("holds no names; write one a line")
    return names


def phrases_of(text: str) -> tuple[str, ...]:
    """The classes in ``elephant. tiger.``, as ``--prompt`` takes them; ValueError for none."""
    phrases = tuple(phrase for part in re.split("[.?]", text) if (phrase := part.strip()))
    if not phrases:
        raise ValueError("names no class; write them as in 'elephant. tiger.'")
    return phrases


def sides_of(text: str) -> tuple[int, ...]:
    """One or two sides in pixels, as ``--input-size`` takes them; ValueError for others."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) >= 32 for side in sides):
        raise ValueError("is no input size; write 640, or 480x640, of 32 pixels and more")
    return tuple(map(int, sides))


@dataclass(frozen=True, slots=True)
class DetectorOptions:
    """What the detector gives.

    All of it changes what is computed and ends up in a cache's identity.

    Attributes:
        num_queries: Queries per image, the detector's own number by default. Official detectors
            then run that many, as their own code does; of a transformers detector those of highest
            class score are kept.
        encoder_layer: Encoder layer that supplies the encoder maps, from 1 (default 4 as in the
            paper, or the last); for encoders that are a stack of layers and no feature pyramid.
        backbone_stride8: Also keep the backbone's stride-8 map where the encoder has no such level.
        input_size: Size of the input where the training had another than the weights tell: the side
            of a square or HEIGHTxWIDTH; of detectors that keep the shape of an image its shorter
            side, or SHORTERxLONGER.
        score_threshold: Lowest score of a detection, of torchvision's detectors.
        labels: Names of the detector's classes, one a line in the order of its outputs, where its
            weights have none or wrong ones.
        prompt: What an open-vocabulary detector looks for, as in "elephant. tiger."; by default the
            names of the dataset's categories.
        amp: Compute the detector in bfloat16 where that is safe: faster on a GPU, and less exact.
    """

    num_queries: int | None = None
    encoder_layer: int | None = None
    backbone_stride8: Annotated[
        bool,
        Option(
            help="Leave out the backbone's stride-8 map, which is kept where the encoder has no "
            "such level."
        ),
    ] = True
    input_size: Annotated[tuple[int, ...], Option(metavar="SIZE", parse=sides_of)] = ()
    score_threshold: float | None = None
    labels: Annotated[tuple[str, ...], Option(metavar="FILE", parse=names_in_file)] = ()
    prompt: Annotated[tuple[str, ...], Option(metavar="TEXT", parse=phrases_of)] = ()
    amp: Literal["off", "bf16"] = "off"


def options_of(identity: Mapping[str, Any]) -> DetectorOptions:
    """The options that a cache or a head was made with, by the detector identity kept with it."""
    settings, resize = identity["settings"], identity["preprocessing"]
    sides = [resize.get(k) for k in ("height", "width", "shortest_edge", "longest_edge")]
    classes = settings.get(CLASS_AGNOSTIC) or identity["label_names"]
    names = tuple(n for n in classes if n != NO_OBJECT)
    return DetectorOptions(
        num_queries=identity["num_queries"],
        encoder_layer=settings.get("encoder_layer"),
        backbone_stride8=any(m["name"] == "backbone8" for m in identity["maps"]),
        input_size=tuple(int(side) for side in sides if side),
        score_threshold=settings.get("score_thresh"),
        labels=names if settings.get("labels") == "given" else (),
        prompt=tuple(settings.get("prompt", ())),
        amp=settings.get("amp", "off"),
    )
