"""Whether a stage's batches divide among its processes; asked by the stages, and before anything starts."""

from __future__ import annotations

import math

from rlhf.config import Config, PpoConfig, RewardConfig, SftConfig
from rlhf.errors import ConfigError


def check_shares(config: Config, stage: str, processes: int) -> None:
    """Raise ConfigError when a stage cannot share its batches evenly among so many processes."""
    if stage == "sft":
        check_training_shares(config.sft, name=stage, processes=processes)
    elif stage == "reward":
        check_training_shares(config.reward, name=stage, processes=processes)
    elif stage == "ppo":
        check_ppo_shares(config.ppo, processes)


def check_training_shares(section: SftConfig | RewardConfig, *, name: str, processes: int) -> None:
    """Micro-batches on all processes have to make up whole batches; ConfigError says what would."""
    at_once = section.micro_batch_size * processes
    if section.batch_size % at_once == 0:
        return
    share, rest = divmod(section.batch_size, processes)
    # Smaller micro-batches train alike; another batch size does not.
    remedy = f"batch_size={max(section.batch_size // at_once, 1) * at_once}"
    if not rest:
        remedy = f"micro_batch_size={math.gcd(share, section.micro_batch_size)}"
    raise ConfigError(
        f"{name}.batch_size={section.batch_size} is not a multiple of {name}.micro_batch_size="
        f"{section.micro_batch_size} times {processes} process(es); try {name}.{remedy}"
    )


def check_ppo_shares(ppo: PpoConfig, processes: int) -> None:
    """Every process gets as many rollouts, and as many of each minibatch; ConfigError says what would divide."""
    for key in ("rollouts_per_iteration", "minibatch_size"):
        whole = getattr(ppo, key)
        if whole % processes:
            remedy = -(-whole // processes) * processes
            raise ConfigError(f"ppo.{key}={whole} does not divide among {processes} processes; try {remedy}")
