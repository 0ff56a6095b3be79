"""Where the reward model that scores PPO's rollouts is put."""

from __future__ import annotations

import pytest
import torch

from rlhf.errors import ConfigError
from rlhf.placement import scorer_device

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says on a machine with three GPUs, of which the second is the current one."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.mark.parametrize("device", [CPU, torch.device("cuda"), torch.device("cuda", 2)])
@pytest.mark.parametrize("processes", [1, 4])
def test_colocated_is_beside_the_policy(device: torch.device, processes: int) -> None:
    assert scorer_device("colocated", device, processes) == device


@pytest.mark.parametrize(("policy", "scorer"), [("cuda:0", "cuda:1"), ("cuda:1", "cuda:2"), ("cuda", "cuda:2")])
def test_dedicated_is_the_gpu_after_the_policys(policy: str, scorer: str) -> None:
    assert scorer_device("dedicated", torch.device(policy), 1) == torch.device(scorer)


@pytest.mark.parametrize(
    ("policy", "processes", "message"),
    [
        ("cuda:2", 1, "1 GPU is there; use 2 GPUs"),
        ("cpu", 1, "the policy is on the CPU; use 2 GPUs"),
        ("cuda:0", 2, "2 processes would share the stage; use ppo.reward_placement=colocated"),
        ("cpu", 2, "2 processes would share the stage"),
    ],
)
def test_dedicated_that_does_not_fit_is_refused(policy: str, processes: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scorer_device("dedicated", torch.device(policy), processes)
