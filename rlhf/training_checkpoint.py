"""The checkpoints of SFT and of the reward model's training: a model directory, and beside the model its training.

Weights, moments and random states are copied to the first process's memory while training stands still, gathered
from all where they are sharded, and written behind its back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.errors import PrerequisiteError
from rlhf.health import check_finite
from rlhf.lora import write_model
from rlhf.processes import is_first_process
from rlhf.runtime import wait_for_all
from rlhf.training_setup import Learner, Session
from rlhf.training_state import (
    OPTIMIZER_FILE,
    RANDOM_FILE,
    STATE_FILE,
    load_random_states,
    load_schedule,
    random_states,
)


def save_training(session: Session) -> None:
    """Publish the current step, to go on from; all processes have to call this.

    Raises DivergedError when a weight is not finite, and what went wrong with the save before.
    """
    learner, saver = session.learner, session.saver
    check_finite({name: weight for name, weight in learner.network.named_parameters() if weight.requires_grad})
    saver.wait()  # before the copy, which goes where the one before it was
    random, numbers = random_states(), numbers_of(learner)
    weights, moments = learner.strategy.weights(learner.network), learner.strategy.moments()

    def write(directory: Path) -> None:
        check_finite(weights)  # at ZeRO stage 3 they were in shards before
        write_network(session, weights, directory)
        save_file(moments, directory / OPTIMIZER_FILE)
        save_file(random, directory / RANDOM_FILE)
        write_numbers(numbers, directory / STATE_FILE)

    if is_first_process():
        saver.save(learner.position.step, write)
    learner.saved_step = learner.position.step


def publish_final(session: Session, metrics: dict[str, Any]) -> None:
    """Publish the model alone, with `metrics.json`, as the stage's final directory; all processes have to call this.

    The numbers of the training's state lie with it: who is killed before the directory is named `final` goes on from
    it with the evaluation.
    """
    learner, saver = session.learner, session.saver
    saver.wait()
    numbers, weights = numbers_of(learner), learner.strategy.weights(learner.network)

    def write(directory: Path) -> None:
        write_network(session, weights, directory)
        write_numbers(numbers, directory / STATE_FILE)
        write_numbers(metrics, directory / "metrics.json")

    saver.save(learner.position.step, write, final=True)
    saver.wait()
    wait_for_all()


def load_training(learner: Learner, directory: Path) -> None:
    """Put a learner, whose network came from `directory`, where that checkpoint left off.

    It may have been written under another strategy and by another number of processes: what does not carry over then
    is the random state of processes that were not there, which training does not use.
    Raises PrerequisiteError for a directory that holds no training.
    """
    try:
        numbers = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PrerequisiteError(
            f"{directory} holds no {STATE_FILE}, so an older version wrote it; move {directory.parent} aside "
            "and run the stage from its beginning"
        ) from error
    learner.position.load_state_dict(numbers["position"])
    learner.health.load_state_dict(numbers["health"])
    learner.saved_step = learner.position.step
    load_schedule(learner.schedule, numbers["schedule_steps"])
    if numbers["scaler"]:
        learner.strategy.load_scale_state(numbers["scaler"])
    if learner.position.step == learner.plan.total_steps:
        return  # no optimiser goes on from here, and a final directory has none
    moments = directory / OPTIMIZER_FILE
    if not moments.is_file():
        raise PrerequisiteError(
            f"{directory} holds no {OPTIMIZER_FILE}, so an older version wrote it under DeepSpeed; go on with that "
            f"version, or move {directory.parent} aside and run the stage from its beginning"
        )
    learner.strategy.load_moments(load_file(moments))
    load_random_states(load_file(directory / RANDOM_FILE))


def numbers_of(learner: Learner) -> dict[str, Any]:
    """What a training is besides tensors."""
    return {
        "position": learner.position.state_dict(),
        "schedule_steps": learner.schedule.last_epoch,
        "scaler": learner.strategy.scale_state(),
        "health": learner.health.state_dict(),
    }


def write_network(session: Session, weights: dict[str, Tensor], directory: Path) -> None:
    """A directory that transformers loads."""
    write_model(directory, session.learner.network, weights, source=session.task.source)
    session.tokenizer.save_pretrained(directory)


def write_numbers(numbers: dict[str, Any], path: Path) -> None:
    """As JSON."""
    path.write_text(json.dumps(numbers, indent=1), encoding="utf-8")
