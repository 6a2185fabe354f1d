"""Optimisers and learning rate: AdamW as in the paper, or Muon for the matrices beside it."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from mfdetr_cache.training.config import TrainConfig


def build_optimisers(head: nn.Module, config: TrainConfig) -> tuple[torch.optim.Optimizer, ...]:
    """AdamW, followed by Muon if chosen; together they have each parameter of a head once.

    Muon (Jordan et al., 2024) steps along the nearest orthogonal matrix to its momentum, so every
    direction of a matrix moves equally far. Its steps are scaled to AdamW's usual size (Liu et al.,
    2025), so that both share one learning rate. Vectors, tables and convolution kernels stay with
    AdamW.
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
    betas = (config.beta1, config.beta2)
    # One operation for all weights on a GPU; a CPU is no faster by it, and rounds differently.
    fused = all(p.device.type == "cuda" for p in head.parameters()) or None
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=fused)
    if not muon:
        return (adamw,)
    return adamw, _Muon(
        muon, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )


class _Muon(torch.optim.Muon):
    """Muon in float32, on stacks of matrices of equal shape.

    Settings and state are those of torch.optim.Muon, whose step goes matrix by matrix through
    bfloat16. Many CPUs emulate that: it took up to half of a training step.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ANN401
        assert closure is None, "the gradients are there already"
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
            shrink = 1 - group["lr"] * group["weight_decay"]
            for shape, matrices in by_shape.items():
                momenta = torch.stack([self._momentum(p, group) for p in matrices])
                directions = orthogonal(
                    momenta, group["ns_coefficients"], group["ns_steps"], group["eps"]
                )
                # Liu et al., Eq. 4: as large as AdamW's steps usually are.
                size = group["lr"] * 0.2 * math.sqrt(max(shape))
                for parameter, direction in zip(matrices, directions, strict=True):
                    parameter.mul_(shrink).add_(direction, alpha=-size)

    def _momentum(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Nesterov momentum: the gradient averaged once more with its running mean."""
        assert parameter.grad is not None
        state, share = self.state[parameter], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        mean = state["momentum_buffer"].lerp_(parameter.grad, 1 - share)
        ahead: Tensor = parameter.grad.lerp(mean, share)
        return ahead


def orthogonal(
    matrices: Tensor, coefficients: tuple[float, float, float], rounds: int, least_norm: float
) -> Tensor:
    """Nearly orthogonal matrices with the same singular vectors, by Newton-Schulz iteration.

    Of float32 matrices (B, m, n). ``coefficients`` are those of the odd quintic polynomial applied
    to singular values (Jordan et al., 2024); the usual ones bring them into 0.7 to 1.2 rather than
    to 1. Matrices of a norm below ``least_norm`` are not scaled up to 1.
    """
    linear, cubic, quintic = coefficients
    # The product with the transpose is smaller from the shorter side.
    upright = matrices.shape[1] > matrices.shape[2]
    iterate = matrices.mT if upright else matrices
    iterate = iterate / iterate.norm(dim=(1, 2), keepdim=True).clamp(min=least_norm)
    for _ in range(rounds):
        gram = iterate @ iterate.mT
        change = torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic)
        iterate = torch.baddbmm(iterate, change, iterate, beta=linear)
    return iterate.mT if upright else iterate


def _split(head: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters with weight decay, and those without: vectors and tables."""
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in head.named_parameters():
        table = name.endswith(("position", "level_embed", "position_bias"))
        (plain if parameter.ndim < 2 or table else decayed).append(parameter)
    return decayed, plain


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step, counted from 0.

    >>> config = TrainConfig(steps=100, lr=1.0)
    >>> [round(learning_rate(config, s), 3) for s in (0, 89, 90, 95)]
    [1.0, 1.0, 0.1, 0.01]
    """
    rate = config.lr
    if step < config.warmup_steps:
        rate *= (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        done = max(0, step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        return rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    for drop in config.drops:
        if step >= drop * config.steps:
            rate *= 0.1
    return rate
