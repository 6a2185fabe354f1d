"""The learning rate over training."""

import math

from mfdetr_cache.training.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of one step.

    Args:
        config: Peak rate and schedule.
        step: Step, counted from 0.

    Returns:
        The rate.

    Examples:
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
