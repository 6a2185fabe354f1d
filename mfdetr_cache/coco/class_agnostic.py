"""A detector's classes as one: any object, for masks of classes that it has no name for."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mfdetr_cache.coco.options import CLASS_AGNOSTIC, OBJECT
from mfdetr_cache.identity import detector_identity
from mfdetr_cache.types import DetectorSpec

# Settings that hold the words of an open-vocabulary detector.
_WORDS = (CLASS_AGNOSTIC, "prompt", "token_ids")


def class_agnostic_spec(spec: DetectorSpec) -> DetectorSpec:
    """What a detector is when its classes are one label, before "no object" where it has that.

    Its settings keep the names of the classes.
    """
    nothing = spec.label_names[-1:] if spec.score_function == "softmax" else ()
    return replace(
        spec,
        num_labels=1 + len(nothing),
        label_names=(OBJECT, *nothing),
        settings={**spec.settings, CLASS_AGNOSTIC: list(spec.label_names)},
    )


def as_prompted(spec: DetectorSpec, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of a detector if its classes were one and its prompt that of another identity.

    The words of a prompt are all that two detectors may differ in for a head without classes.
    """
    agnostic = class_agnostic_spec(spec)
    words = {k: v for k, v in asked["settings"].items() if k in _WORDS}
    return detector_identity(replace(agnostic, settings={**agnostic.settings, **words}))
