"""The logits of all classes as those of one: any object."""

from typing import Literal

import torch
from torch import Tensor

ScoreFunction = Literal["sigmoid", "softmax"]


def any_class(class_logits: Tensor, score_function: ScoreFunction) -> Tensor:
    """The logits of one label for all classes.

    Args:
        class_logits: Before the score function, shape (..., K).
        score_function: Of the detector.

    Returns:
        Shape (..., 1): the largest, whose probability is that of the best class. Under softmax
        shape (..., 2): the log of the classes' sum, whose probability is all that is not "no
        object", and "no object".
    """
    if score_function == "softmax":
        objects, nothing = class_logits[..., :-1], class_logits[..., -1]
        return torch.stack((objects.logsumexp(-1), nothing), dim=-1)
    return class_logits.amax(-1, keepdim=True)
