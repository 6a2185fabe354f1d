"""Half precision, where it is asked for."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(
    amp: Literal["off", "bf16", "fp16"], device: torch.device
) -> AbstractContextManager[object]:
    """The context a network runs in.

    Args:
        amp: Precision asked for.
        device: Where it runs.

    Returns:
        torch's autocast, or nothing.
    """
    if amp == "off":
        return nullcontext()
    return torch.autocast(device.type, _TYPES[amp])
