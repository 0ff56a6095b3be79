"""PPO's checkpoints: everything that an iteration leaves behind or has in hand, saved and put back exactly.

The policy lies there as transformers saves it, the value function, the optimiser's moments, the random generators
and rollouts in hand in safetensors, the numbers in JSON. Nothing in it is pickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from rlhf.environment import EnvironmentRow
from rlhf.experience import in_hand_state, load_in_hand
from rlhf.health import check_finite
from rlhf.lora import write_model
from rlhf.models import load_policy
from rlhf.ppo_setup import VALUE_FILE, Learner
from rlhf.training_state import (
    OPTIMIZER_FILE,
    RANDOM_FILE,
    STATE_FILE,
    load_random_states,
    load_schedule,
    random_states,
)

ROLLOUTS_FILE = "rollouts.safetensors"


def snapshot(learner: Learner) -> Callable[[Path], None]:
    """Copy what training goes on changing to host memory; gives what writes it, with the rest, into a directory.

    Every process has to call it, once what was written before it is there (`Saver.wait`).
    """
    random, strategy = random_states(), learner.strategy
    weights, value = strategy.weights(learner.actor.policy), strategy.weights(learner.actor.value_head)
    moments = strategy.moments()
    if not learner.accelerator.is_main_process:
        return lambda directory: None
    numbers, rollouts = in_hand_state(learner.in_hand) if learner.in_hand else (None, {})
    state = json.dumps(_numbers(learner) | {"in_hand": numbers}, indent=1)

    def write(directory: Path) -> None:
        check_finite(weights | value)
        write_model(directory, learner.actor.policy, weights, source=partial(load_policy, learner.source))
        learner.tokenizer.save_pretrained(directory)
        save_file(value, directory / VALUE_FILE)
        save_file(moments, directory / OPTIMIZER_FILE)
        save_file(random, directory / RANDOM_FILE)
        if rollouts:
            save_file(rollouts, directory / ROLLOUTS_FILE)
        (directory / STATE_FILE).write_text(state, encoding="utf-8")

    return write


def load_learner(learner: Learner, directory: Path, rows: Sequence[EnvironmentRow]) -> None:
    """Put a learner, which has this checkpoint's weights, where it left off; rows are the training environment.

    It may have been written under another strategy and by another number of processes.
    """
    state = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
    learner.strategy.load_moments(load_file(directory / OPTIMIZER_FILE))
    load_schedule(learner.schedule, state["schedule_steps"])
    load_random_states(load_file(directory / RANDOM_FILE))
    learner.kl.load_state_dict(state["kl"])
    learner.moments.load_state_dict(state["moments"])
    learner.health.load_state_dict(state["health"])
    if state["scaler"]:
        learner.strategy.load_scale_state(state["scaler"])
    learner.iteration, learner.unlogged = state["iteration"], state["unlogged"]
    learner.best_reward = -math.inf if state["best_reward"] is None else state["best_reward"]
    if state["in_hand"]:
        learner.in_hand = load_in_hand(state["in_hand"], load_file(directory / ROLLOUTS_FILE), rows, learner.device)
    learner.saved_at = learner.place


def _numbers(learner: Learner) -> dict[str, Any]:
    return {
        "iteration": learner.iteration,
        "unlogged": learner.unlogged,
        "best_reward": learner.best_reward if math.isfinite(learner.best_reward) else None,
        "kl": learner.kl.state_dict(),
        "moments": learner.moments.state_dict(),
        "health": learner.health.state_dict(),
        "schedule_steps": learner.schedule.last_epoch,
        "scaler": learner.strategy.scale_state(),
    }
