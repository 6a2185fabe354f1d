"""A detector's classes as one: any object, for masks of classes that it has no name for."""

from dataclasses import replace

from mfdetr_cache.coco.options import CLASS_AGNOSTIC, OBJECT
from mfdetr_cache.types import DetectorSpec


def class_agnostic_spec(spec: DetectorSpec) -> DetectorSpec:
    """What a detector is when its classes are one.

    Args:
        spec: The detector.

    Returns:
        The same with one label, before "no object" where it has that; its settings keep the names
        of the classes.
    """
    nothing = spec.label_names[-1:] if spec.score_function == "softmax" else ()
    return replace(
        spec,
        num_labels=1 + len(nothing),
        label_names=(OBJECT, *nothing),
        settings={**spec.settings, CLASS_AGNOSTIC: list(spec.label_names)},
    )
