"""The stages in their order, and what of the configuration each has fixed once it has begun."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rlhf.checkpoint import StageDir, storage_errors, write_text_atomically
from rlhf.config import Config
from rlhf.errors import ConfigError
from rlhf.processes import is_first_process

if TYPE_CHECKING:
    from rlhf.runtime import StopSignal

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class Stage:
    """A program of the pipeline, `rlhf/stages/<name>.py`: the stages it reads, and whether many processes share it.

    fixes are the sections that it settles for the rest of the run.
    """

    name: str
    fixes: tuple[str, ...]
    reads: tuple[str, ...]
    parallel: bool = False


STAGES = (
    Stage("fetch", ("seed", "data", "synthetic", "model", "prompt"), reads=()),
    Stage("sft", ("sft",), reads=("fetch",), parallel=True),
    Stage("reward", ("reward",), reads=("fetch", "sft"), parallel=True),
    Stage("prepare", ("prepare",), reads=("fetch", "reward")),
    Stage("ppo", ("ppo",), reads=("sft", "reward", "prepare"), parallel=True),
    Stage("evaluate", ("evaluate",), reads=("fetch", "sft", "reward", "ppo")),
)
STAGE_NAMES = tuple(stage.name for stage in STAGES)


def run_stage(stage: Stage, config: Config, run_dir: Path, stop: StopSignal) -> bool:
    """Run one stage to its end; False when it had finished before.

    Raises ConfigError when the run began with other settings than these.
    """
    check_settings(config, run_dir)
    directory = StageDir(run_dir, stage.name)
    if directory.is_final():
        logger.info("stage=%s is already done path=%s", stage.name, directory.path / "final")
        return False
    with storage_errors(directory.path):
        if is_first_process():
            directory.remove_unfinished()
            write_text_atomically(directory.path / CONFIG_FILE, config.to_yaml())
        program = importlib.import_module(f"rlhf.stages.{stage.name}")
        program.run(config, run_dir, stop)
    return True


def check_settings(config: Config, run_dir: Path) -> None:
    """Refuse to go on with a run under settings other than what its stages have published was made with."""
    now = config.model_dump(mode="json")
    for stage in STAGES:
        path = run_dir / stage.name / CONFIG_FILE
        if not path.is_file() or not StageDir(run_dir, stage.name).steps():
            continue
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        for section in stage.fixes:
            for key, (old, new) in differences(before.get(section), now[section], section).items():
                raise ConfigError(
                    f"{key} was {old!r} for {stage.name} of run {run_dir.name!r} and is {new!r} now; "
                    f"use another --run, or move {path.parent} and the stages after it aside"
                )


def saved_config(run_dir: Path) -> Path | None:
    """The settings that a run's newest begun stage was given; none for a new run."""
    paths = [run_dir / name / CONFIG_FILE for name in STAGE_NAMES]
    return next((path for path in reversed(paths) if path.is_file()), None)


def differences(old: Any, new: Any, key: str) -> dict[str, tuple[Any, Any]]:
    """Keys below `key` whose values differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for name in old | new:
            found |= differences(old.get(name), new.get(name), f"{key}.{name}")
        return found
    return {} if old == new else {key: (old, new)}
