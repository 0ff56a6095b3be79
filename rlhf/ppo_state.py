"""PPO's checkpoints: everything that an iteration leaves behind or has in hand, saved and put back exactly.

The policy lies there as transformers saves it, the value function, the optimiser's moments, the random generators
and rollouts in hand in safetensors, the numbers in JSON. Nothing in it is pickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from rlhf.environment import EnvironmentRow
from rlhf.errors import ConfigError
from rlhf.experience import in_hand_state, load_in_hand
from rlhf.health import check_finite
from rlhf.models import load_policy
from rlhf.ppo_setup import Learner
from rlhf.runtime import from_all
from rlhf.training_state import (
    OPTIMIZER_FILE,
    RANDOM_FILE,
    STATE_FILE,
    load_optimizer_tensors,
    load_random_states,
    load_schedule,
    random_states,
)

VALUE_FILE = "value.safetensors"


def snapshot(learner: Learner) -> Callable[[Path], None]:
    """Copy what training goes on changing to host memory; gives what writes it, with the rest, into a directory.

    Every process has to call it, once what was written before it is there (`Saver.wait`).
    """
    random = random_states()
    in_hand = from_all(in_hand_state(learner.in_hand)) if learner.in_hand else []
    if not learner.accelerator.is_main_process:
        return lambda directory: None
    weights, moments = learner.host.weights(), learner.host.moments(learner.optimizer)
    value = {name: tensor.to("cpu", copy=True) for name, tensor in learner.actor.value_head.state_dict().items()}
    state = json.dumps(_numbers(learner) | {"in_hand": [numbers for numbers, _ in in_hand]}, indent=1)

    def write(directory: Path) -> None:
        check_finite(weights | value)
        learner.actor.policy.save_pretrained(directory, state_dict=weights)
        learner.tokenizer.save_pretrained(directory)
        save_file(value, directory / VALUE_FILE)
        save_file(moments, directory / OPTIMIZER_FILE)
        save_file(random, directory / RANDOM_FILE)
        for rank, (_, tensors) in enumerate(in_hand):
            save_file(tensors, directory / _rollouts_file(rank))
        (directory / STATE_FILE).write_text(state, encoding="utf-8")

    return write


def load_learner(learner: Learner, directory: Path, rows: Sequence[EnvironmentRow]) -> None:
    """Put a learner where a checkpoint left off; rows are the training environment.

    Raises ConfigError when rollouts in hand belong to another number of processes.
    """
    state = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
    learner.actor.policy.load_state_dict(load_policy(directory).state_dict())
    learner.actor.value_head.load_state_dict(load_file(directory / VALUE_FILE))
    load_optimizer_tensors(learner.optimizer, load_file(directory / OPTIMIZER_FILE))
    load_schedule(learner.schedule, state["schedule_steps"])
    load_random_states(load_file(directory / RANDOM_FILE))
    learner.kl.load_state_dict(state["kl"])
    learner.moments.load_state_dict(state["moments"])
    learner.health.load_state_dict(state["health"])
    if learner.accelerator.scaler is not None and state["scaler"]:
        learner.accelerator.scaler.load_state_dict(state["scaler"])
    learner.iteration, learner.unlogged = state["iteration"], state["unlogged"]
    learner.best_reward = -math.inf if state["best_reward"] is None else state["best_reward"]
    if state["in_hand"]:
        _load_in_hand(learner, directory, state["in_hand"], rows)
    learner.saved_at = learner.place


def _numbers(learner: Learner) -> dict[str, Any]:
    scaler = learner.accelerator.scaler
    return {
        "iteration": learner.iteration,
        "unlogged": learner.unlogged,
        "best_reward": learner.best_reward if math.isfinite(learner.best_reward) else None,
        "kl": learner.kl.state_dict(),
        "moments": learner.moments.state_dict(),
        "health": learner.health.state_dict(),
        "schedule_steps": learner.schedule.last_epoch,
        "scaler": scaler.state_dict() if scaler is not None else None,
    }


def _load_in_hand(
    learner: Learner, directory: Path, saved: list[dict[str, Any]], rows: Sequence[EnvironmentRow]
) -> None:
    rank, processes = learner.accelerator.process_index, learner.accelerator.num_processes
    if len(saved) != processes:
        raise ConfigError(
            f"{directory} was saved in the middle of an iteration by {len(saved)} process(es), and there are "
            f"{processes} now; go on with {len(saved)} until the iteration is saved"
        )
    learner.in_hand = load_in_hand(saved[rank], load_file(directory / _rollouts_file(rank)), rows, learner.device)


def _rollouts_file(rank: int) -> str:
    return f"rollouts-{rank:05d}.safetensors"
