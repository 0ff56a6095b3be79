"""The stages in their order, and what of the configuration each has fixed once it has begun."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf.checkpoint import CONFIG_FILE, StageDir
from rlhf.config import Config, changeable_keys
from rlhf.errors import ConfigError


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
    Stage("prepare", ("prepare",), reads=("fetch", "reward"), parallel=True),
    Stage("ppo", ("ppo",), reads=("sft", "reward", "prepare"), parallel=True),
    Stage("evaluate", ("evaluate",), reads=("fetch", "sft", "reward", "ppo"), parallel=True),
)
STAGE_NAMES = tuple(stage.name for stage in STAGES)


def check_settings(config: Config, run_dir: Path) -> None:
    """Refuse to go on with a run under settings other than what its stages have published was made with.

    Keys that docs/configuration.md says may change are left out; `runtime` counts for a stage that is not finished.
    Raises ConfigError naming every key that differs.
    """
    now, usual, changeable = config.model_dump(mode="json"), Config().model_dump(mode="json"), changeable_keys()
    for stage in STAGES:
        path, directory = run_dir / stage.name / CONFIG_FILE, StageDir(run_dir, stage.name)
        if not path.is_file() or not directory.steps():
            continue
        before = _read_settings(path)
        found: dict[str, tuple[Any, Any]] = {}
        for section in (*stage.fixes, *(() if directory.is_final() else ("runtime",))):
            found |= differences(before.get(section, usual[section]), now[section], section, usual[section])
        if changed := {key: values for key, values in found.items() if key not in changeable}:
            was = "; ".join(f"{key} was {old!r} and is {new!r} now" for key, (old, new) in changed.items())
            raise ConfigError(
                f"stage {stage.name} of run {run_dir.name!r} began with other settings: {was}; go back to them, use "
                f"another --run, or move {path.parent} and the stages after it aside"
            )


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} is damaged; copy {CONFIG_FILE} from the newest step-… folder beside it")
    return settings


def saved_config(run_dir: Path) -> Path | None:
    """The settings that a run's newest begun stage was given; none for a new run."""
    paths = [run_dir / name / CONFIG_FILE for name in STAGE_NAMES]
    return next((path for path in reversed(paths) if path.is_file()), None)


def differences(old: Any, new: Any, key: str, default: Any) -> dict[str, tuple[Any, Any]]:
    """Keys below `key` whose values differ, with both values.

    A key that an older release did not know had its default then; one that this release does not know is left out.
    """
    if not isinstance(new, dict):
        return {} if old == new else {key: (old, new)}
    found: dict[str, tuple[Any, Any]] = {}
    for name, value in new.items():
        usual = default.get(name) if isinstance(default, dict) else None
        before = old.get(name, usual) if isinstance(old, dict) else usual
        found |= differences(before, value, f"{key}.{name}", usual)
    return found
