"""A detector's classes as one: any object, for masks of classes that it has no name for."""

from dataclasses import replace

import torch
from torch import Tensor

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


def any_class(class_logits: Tensor, spec: DetectorSpec) -> Tensor:
    """The logits of one label for all classes.

    Args:
        class_logits: Before the score function, shape (..., K).
        spec: The detector, its classes apart.

    Returns:
        Shape (..., 1): the largest, whose probability is that of the best class. Under softmax
        shape (..., 2): the log of the classes' sum, whose probability is all that is not "no
        object", and "no object".
    """
    if spec.score_function == "softmax":
        objects, nothing = class_logits[..., :-1], class_logits[..., -1]
        return torch.stack((objects.logsumexp(-1), nothing), dim=-1)
    return class_logits.amax(-1, keepdim=True)
