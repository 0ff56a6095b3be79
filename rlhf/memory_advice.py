"""What to change where a stage does not fit: the mildest changes after which it does, found by planning again.

The order is that of the harm to the run: first what changes nothing but its speed, last what changes what is learnt,
and then more GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from rlhf.config import Config, PpoConfig
from rlhf.errors import ConfigError
from rlhf.memory_plan import SPREAD, Machine, StagePlan, plan_stage, section_of
from rlhf.model_shape import ModelShape
from rlhf.shares import check_shares

GPUS = "--gpus"
"""Stands among the keys for GPUs of a node."""
LORA_RANK = 16
MOST_GPUS = 8
DEEPSPEED = ("zero2", "zero3", "zero2-offload", "zero3-offload")

Changes = dict[str, Any]
"""New values by `key.path`."""


@dataclass(frozen=True)
class Advice:
    """Changes for one stage, and its plan with them; where that does not fit either, nothing known here helps."""

    changes: Changes
    after: StagePlan


def advise(stage: str, config: Config, shape: ModelShape, machine: Machine) -> Advice:
    """The mildest known changes after which a stage fits; those that bring it nearest where none suffice."""
    first = plan_stage(stage, config, shape, machine)
    changes: Changes = {}
    best = first
    rungs = ladder(stage, config, machine)
    for _ in range(3):  # what did not help at first may, once something else is out of the way
        before = best.lacking
        for key, values in rungs.items():
            for value in values:
                tried = _planned(stage, config, shape, machine, changes | {key: value})
                if tried is not None and tried.lacking < best.lacking:
                    changes, best = changes | {key: value}, tried
                if best.fits:
                    return _mildest(stage, config, shape, machine, changes, rungs)
        if best.lacking == before:
            break
    return Advice(changes, best)


def advise_run(config: Config, shape: ModelShape, machine: Machine, plans: list[StagePlan]) -> list[Advice]:
    """Advice for each stage that does not fit."""
    return [advise(plan.stage, config, shape, machine) for plan in plans if not plan.fits]


def changed(config: Config, machine: Machine, changes: Mapping[str, Any]) -> tuple[Config, Machine]:
    """A configuration and a machine with changes. Raises ConfigError where they contradict one another."""
    tree = config.model_dump()
    for key, value in changes.items():
        if key == GPUS:
            machine = replace(machine, gpus=value)
            continue
        *path, name = key.split(".")
        section = tree
        for part in path:
            section = section[part]
        section[name] = value
    try:
        return Config.model_validate(tree), machine
    except ValidationError as error:
        raise ConfigError(str(error)) from error


def ladder(stage: str, config: Config, machine: Machine) -> dict[str, list[Any]]:
    """The values to try for each key, from the mildest on; keys in the order of the harm they do."""
    rungs: dict[str, list[Any]] = {}
    section = section_of(stage, config) if stage in SPREAD else None
    if section is not None:
        rungs[f"{stage}.micro_batch_size"] = _halves(section.micro_batch_size)
        if not isinstance(section, PpoConfig) and not section.gradient_checkpointing:
            rungs[f"{stage}.gradient_checkpointing"] = [True]
        start = DEEPSPEED.index(section.deepspeed) + 1 if section.deepspeed in DEEPSPEED else 0
        rungs[f"{stage}.deepspeed"] = list(DEEPSPEED[start:])
    if stage == "ppo":
        rungs["ppo.rollout_chunk"] = _halves(config.ppo.rollout_chunk)
    if stage in ("sft", "evaluate"):
        rungs["evaluate.batch_size"] = _halves(config.evaluate.batch_size)
    least = config.prompt.max_sequence_tokens
    if stage in ("reward", "prepare", "ppo"):
        rungs["prepare.batch_tokens"] = _halves(config.prepare.batch_tokens, least=least)
    if stage == "evaluate":
        rungs["evaluate.batch_tokens"] = _halves(config.evaluate.batch_tokens, least=least)
    if stage == "ppo" and config.ppo.reward_placement == "colocated":
        rungs["ppo.reward_placement"] = ["remote"]
    if section is not None and section.lora.rank is None:
        rungs[f"{stage}.lora.rank"] = [LORA_RANK]
    if section is not None:
        rungs[GPUS] = [count for count in (2, 4, MOST_GPUS) if count > machine.gpus]
    return rungs


def _halves(value: int, *, least: int = 1) -> list[int]:
    found = []
    while value // 2 >= least:
        value //= 2
        found.append(value)
    return found


def _planned(
    stage: str, config: Config, shape: ModelShape, machine: Machine, changes: Mapping[str, Any]
) -> StagePlan | None:
    """The stage with changes; None where they are no configuration that the stage would take."""
    try:
        new_config, new_machine = changed(config, machine, changes)
        _check_shares(stage, config, machine, new_config, new_machine)
        return plan_stage(stage, new_config, shape, new_machine)
    except ConfigError:
        return None


def _check_shares(stage: str, config: Config, machine: Machine, new_config: Config, new_machine: Machine) -> None:
    """Raise ConfigError where the changes make batches indivisible that were not so before."""
    try:
        check_shares(config, stage, machine.nodes * machine.gpus)
    except ConfigError:
        return  # the batches have to change anyway, and the stage says how
    check_shares(new_config, stage, new_machine.nodes * new_machine.gpus)


def _mildest(
    stage: str, config: Config, shape: ModelShape, machine: Machine, changes: Changes, rungs: dict[str, list[Any]]
) -> Advice:
    """Take back, the most harmful first, what is not needed, or take a milder value."""
    for key in [key for key in reversed(rungs) if key in changes]:
        without = {name: value for name, value in changes.items() if name != key}
        milder = [without, *(without | {key: value} for value in rungs[key])]
        for tried in milder:
            found = _planned(stage, config, shape, machine, tried)
            if found is not None and found.fits:
                changes = tried
                break
    after = _planned(stage, config, shape, machine, changes)
    assert after is not None, "what fitted before fits still"
    return Advice({key: changes[key] for key in rungs if key in changes}, after)
