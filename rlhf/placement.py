"""On which device PPO's rollouts are scored, by `ppo.reward_placement`; asked by the stage, and before anything starts.

`colocated`: by each process, beside its policy. `dedicated`: on the GPU after the policy's, of one process, as in the
original. `remote`: by a service, so that no process holds a reward model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from rlhf.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from rlhf.config import RemoteScorerConfig

Placement = Literal["colocated", "dedicated", "remote"]

DEDICATED = "ppo.reward_placement=dedicated puts the reward model on the GPU after that of one policy process"


def scorer_device(placement: Placement, policy_device: torch.device, processes: int) -> torch.device:
    """Where this process loads the reward model; processes is how many share the stage, over all nodes.

    Raises ConfigError when `dedicated` does not fit. With `remote` there is none to load, so don't ask.
    """
    import torch

    assert placement != "remote", "a service has the reward model"
    if placement == "colocated":
        return policy_device
    first, gpus = 0, 0
    if policy_device.type == "cuda":
        first = torch.cuda.current_device() if policy_device.index is None else policy_device.index
        gpus = torch.cuda.device_count() - first
    check_dedicated(gpus=gpus, processes=processes)
    return torch.device("cuda", first + 1)


def service_url(remote: RemoteScorerConfig) -> str:
    """Where the service of `remote` is. Raises ConfigError when the settings do not say."""
    if remote.url is None:
        raise ConfigError(
            "ppo.reward_placement=remote needs ppo.remote.url, the address of a service that serves this run's reward "
            "model; write it like http://rlhf-api:8000, or use ppo.reward_placement=colocated"
        )
    return remote.url


def check_dedicated(*, gpus: int, processes: int) -> None:
    """Raise ConfigError unless there is one policy process, and a GPU after its own.

    gpus counts the policy's and those after it; 0 stands for a policy on the CPU.
    """
    if processes > 1:
        raise ConfigError(
            f"{DEDICATED}, and {processes} processes would share the stage; use ppo.reward_placement=colocated, or "
            "one process on one node (--processes 1)"
        )
    if gpus < 2:
        found = f"{gpus} GPU is there" if gpus else "the policy is on the CPU"
        raise ConfigError(f"{DEDICATED}, and {found}; use 2 GPUs, or ppo.reward_placement=colocated")
