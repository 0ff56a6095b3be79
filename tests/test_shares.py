"""Batches and the processes that share them."""

from __future__ import annotations

import re

import pytest

from rlhf.config import Config
from rlhf.errors import ConfigError
from rlhf.shares import check_shares


def config() -> Config:
    training = {"batch_size": 32, "micro_batch_size": 8}
    return Config.model_validate({"sft": training, "reward": training})


@pytest.mark.parametrize(
    ("stage", "processes", "remedy"),
    [
        ("sft", 4, None),
        ("sft", 8, "try sft.micro_batch_size=4"),  # 32 = 8 times 4
        ("reward", 3, "try reward.batch_size=24"),  # 8 times 3; 32 does not divide by 3
        ("reward", 64, "try reward.batch_size=512"),
        ("ppo", 4, None),  # 128 rollouts, 4 in a minibatch
        ("ppo", 3, "ppo.rollouts_per_iteration=128 does not divide among 3 processes; try 129"),
        ("ppo", 8, "ppo.minibatch_size=4 does not divide among 8 processes; try 8"),
        ("evaluate", 3, None),
    ],
)
def test_what_does_not_divide_is_refused_with_a_remedy(stage: str, processes: int, remedy: str | None) -> None:
    if remedy is None:
        check_shares(config(), stage, processes)
        return
    with pytest.raises(ConfigError, match=re.escape(remedy)):
        check_shares(config(), stage, processes)
