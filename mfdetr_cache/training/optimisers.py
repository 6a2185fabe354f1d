"""Who changes the weights: AdamW alone, as in the paper, or Muon for the matrices beside it."""

from typing import Any

import torch
from torch import Tensor, nn

from mfdetr_cache.training.config import TrainConfig


def build_optimisers(head: nn.Module, config: TrainConfig) -> tuple[torch.optim.Optimizer, ...]:
    """The optimisers of a head; together they have each of its parameters once.

    Muon (Jordan et al., 2024) steps along the nearest orthogonal matrix to its momentum, so every
    direction of a matrix moves equally far. Its steps are scaled to AdamW's usual size (Liu et al.,
    2025), which lets both share one learning rate. Vectors, tables and kernels of convolutions,
    which are no matrices, stay with AdamW.

    Args:
        head: The mask network.
        config: Which optimiser, learning rate, betas, weight decay.

    Returns:
        AdamW, and Muon behind it where it is asked for.
    """
    decayed, plain = _split(head)
    muon: list[Tensor] = []
    if config.optimiser == "muon":
        muon = [p for p in decayed if p.ndim == 2]
        decayed = [p for p in decayed if p.ndim != 2]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2))
    if not muon:
        return (adamw,)
    return adamw, _Muon(
        muon,
        lr=config.lr,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )


class _Muon(torch.optim.Muon):
    """Muon whose small products do not wait for a second thread.

    A step multiplies some hundred small matrices. On a CPU whose other cores decode the next batch,
    every one of them would wait until the scheduler gives a thread its turn.
    """

    def step(self, closure: Any = None) -> Any:  # noqa: ANN401
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return super().step(closure)  # type: ignore[no-untyped-call]
        finally:
            torch.set_num_threads(threads)


def _split(head: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters with weight decay, and vectors and tables, which have none."""
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in head.named_parameters():
        table = name.endswith(("position", "level_embed", "position_bias"))
        (plain if parameter.ndim < 2 or table else decayed).append(parameter)
    return decayed, plain
