"""The checkpoints of SFT and of the reward model's training: a model directory, and beside the model its training.

Weights, moments and random states are copied to host memory while training stands still, and written behind its
back. DeepSpeed's shards are written by all processes at once, so there training waits.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.errors import ConfigError, PrerequisiteError
from rlhf.health import check_finite
from rlhf.processes import is_first_process, process_count
from rlhf.runtime import from_first, wait_for_all
from rlhf.training_setup import Learner, Session
from rlhf.training_state import (
    OPTIMIZER_FILE,
    RANDOM_FILE,
    STATE_FILE,
    load_optimizer_tensors,
    load_random_states,
    load_schedule,
    random_states,
)


def save_training(session: Session) -> None:
    """Publish the current step, to go on from; all processes have to call this.

    Raises DivergedError when a weight is not finite, StorageError and LeaseLost for the save before.
    """
    learner, saver = session.learner, session.saver
    check_finite({name: weight for name, weight in learner.network.named_parameters() if weight.requires_grad})
    random = random_states()
    if learner.engine is not None:
        publish_sharded(session, random)
    elif is_first_process():
        saver.wait()  # before the copy, which goes where the one before it was
        numbers, weights = numbers_of(learner), learner.host.weights()
        moments = learner.host.moments(learner.optimizer)

        def write(directory: Path) -> None:
            write_model(session, weights, directory)
            save_file(moments, directory / OPTIMIZER_FILE)
            save_file(random, directory / RANDOM_FILE)
            write_numbers(numbers, directory / STATE_FILE)

        saver.save(learner.position.step, write)
    learner.saved_step = learner.position.step


def publish_sharded(session: Session, random: dict[str, Tensor]) -> None:
    """DeepSpeed's shards from all processes, and what the first writes beside them, become one step."""
    learner, step = session.learner, session.learner.position.step
    weights = learner.accelerator.get_state_dict(learner.model)
    session.metrics.sync()
    with contextlib.ExitStack() as opened:
        work = from_first(lambda: opened.enter_context(session.stage.publish(step)))
        learner.engine.save_checkpoint(str(work), tag=f"global_step{step}")
        if is_first_process():
            write_model(session, weights, work)
            save_file(random, work / RANDOM_FILE)
            write_numbers(numbers_of(learner), work / STATE_FILE)
        wait_for_all()
    if is_first_process():
        session.stage.prune(session.runtime.keep_checkpoints)
    wait_for_all()


def publish_final(session: Session, metrics: dict[str, Any]) -> None:
    """Publish the model alone, with `metrics.json`, as the stage's final directory; all processes have to call this.

    The numbers of the training's state lie with it: who is killed before the directory is named `final` goes on from
    it with the evaluation.
    """
    learner, saver, weights = session.learner, session.saver, {}
    saver.wait()
    if learner.engine is not None:
        weights = learner.accelerator.get_state_dict(learner.model)
    elif is_first_process():
        weights = learner.host.weights()
    numbers = numbers_of(learner)

    def write(directory: Path) -> None:
        write_model(session, weights, directory)
        write_numbers(numbers, directory / STATE_FILE)
        write_numbers(metrics, directory / "metrics.json")

    saver.save(learner.position.step, write, final=True)
    saver.wait()
    wait_for_all()


def load_training(learner: Learner, directory: Path) -> None:
    """Put a learner, whose network came from `directory`, where that checkpoint left off.

    Raises PrerequisiteError for a directory that holds no training, and ConfigError for another number of processes
    than DeepSpeed's shards are for.
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
    if numbers["scaler"] and learner.accelerator.scaler is not None:
        learner.accelerator.scaler.load_state_dict(numbers["scaler"])
    if learner.position.step == learner.plan.total_steps:
        return  # no optimiser goes on from here, and a final directory has none
    if learner.engine is not None:
        if numbers["processes"] != process_count():
            raise ConfigError(
                f"{directory} is DeepSpeed's for {numbers['processes']} processes, not for {process_count()}; "
                "go on with as many"
            )
        learner.engine.load_checkpoint(str(directory))
    else:
        load_optimizer_tensors(learner.optimizer, load_file(directory / OPTIMIZER_FILE))
    load_random_states(load_file(directory / RANDOM_FILE))


def numbers_of(learner: Learner) -> dict[str, Any]:
    """What a training is besides tensors."""
    scaler = learner.accelerator.scaler
    return {
        "position": learner.position.state_dict(),
        "schedule_steps": learner.schedule.last_epoch,
        "scaler": None if scaler is None else scaler.state_dict(),
        "health": learner.health.state_dict(),
        "processes": process_count(),
    }


def write_model(session: Session, weights: dict[str, Tensor], directory: Path) -> None:
    """A directory that transformers loads."""
    session.learner.network.save_pretrained(directory, state_dict=weights)
    session.tokenizer.save_pretrained(directory)


def write_numbers(numbers: dict[str, Any], path: Path) -> None:
    """As JSON."""
    path.write_text(json.dumps(numbers, indent=1), encoding="utf-8")
