"""How the learning rate rises and falls: one curve for SFT, the reward model and PPO."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from rlhf.config import OptimizerConfig


def learning_rate_factor(step: int, *, total: int, config: OptimizerConfig) -> float:
    """What the peak learning rate is multiplied by in a step, counted from 0, of `total`.

    It rises linearly for `warmup_steps` steps, from 1 / (warmup_steps + 1), then falls along half a cosine or
    a line to `final_learning_rate`, where it stays; `constant` does not fall.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    progress = min((step - config.warmup_steps) / max(total - config.warmup_steps, 1), 1.0)
    remaining = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    floor = config.final_learning_rate / config.learning_rate
    return floor + (1 - floor) * remaining


def learning_rate_scheduler(optimizer: Optimizer, *, total: int, config: OptimizerConfig) -> LambdaLR:
    """The same as a torch scheduler, to be stepped once an optimiser step."""
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, total=total, config=config))
