"""DeepSpeed's part in SFT and the reward model's training: optimiser states shared among processes (ZeRO).

Its checkpoint is its own: `global_step…/` beside the model, written by all processes, the one thing in a run
that is pickled. Who resumes reads it from a directory that the manifest has confirmed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.integrations import HfDeepSpeedConfig

from rlhf.config import OptimizerConfig
from rlhf.errors import ConfigError

OURS = ("optimizer", "scheduler")
"""Sections that the run's own configuration stands for."""


def deepspeed_file(name: str | None, *, key: str) -> str | None:
    """The path of a DeepSpeed configuration, given as one that we ship (`zero2`) or as a path; None for none.

    Raises ConfigError for one that is not there.
    """
    if name is None:
        return None
    shipped = {path.stem: path for path in (Path(__file__).parent / "configs" / "deepspeed").glob("*.json")}
    path = shipped.get(name, Path(name))
    if not path.is_file():
        raise ConfigError(
            f"{key}={name}: there is no such file; give the path of a DeepSpeed configuration, one of "
            f"{', '.join(sorted(shipped))}, or leave it empty"
        )
    return str(path)


def deepspeed_settings(
    path: str, *, micro_batch_size: int, accumulation: int, processes: int, optimizer: OptimizerConfig, precision: str
) -> HfDeepSpeedConfig:
    """A DeepSpeed file with its `auto` values filled in; ZeRO-3 shards models that are loaded while this object lives.

    What depends on the model's width stays `auto`, for accelerate to fill. Raises ConfigError for a file that is
    no JSON object, or whose values differ from the run's configuration.
    """
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); correct it") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} holds no JSON object; correct it")
    for section in OURS:
        if section in settings:
            raise ConfigError(f"{path}: remove {section!r}; the run's own optimizer settings say what it would")
    wanted = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch_size * accumulation * processes,
        "gradient_clipping": optimizer.max_grad_norm,
    }
    for key, value in wanted.items():
        settings[key] = _filled(settings.get(key, "auto"), value, path=path, key=key)
    for section, name in (("bf16", "bfloat16"), ("fp16", "float16")):
        part: Any = settings.setdefault(section, {})
        if not isinstance(part, dict):
            raise ConfigError(f"{path}: {section} holds {part!r}, not keys; correct it")
        enabled = part.get("enabled", precision == name)
        part["enabled"] = _filled(enabled, precision == name, path=path, key=f"{section}.enabled")
    settings["zero_allow_untested_optimizer"] = True
    try:
        return HfDeepSpeedConfig(settings)
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no DeepSpeed configuration: {error}; correct it") from error


def _filled(value: Any, ours: Any, *, path: str, key: str) -> Any:
    if value in ("auto", ours):
        return ours
    raise ConfigError(f'{path}: {key} is {value!r}, but the run\'s configuration makes it {ours!r}; write "auto"')
