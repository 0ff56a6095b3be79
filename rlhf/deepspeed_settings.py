"""The settings of DeepSpeed's engine: files that we ship or a user's own, filled in from the run's configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
) -> dict[str, Any]:
    """A DeepSpeed file with its `auto` values filled in; what depends on the model's width stays, for accelerate.

    Trained weights are float32 and `precision` is autocast's, as without DeepSpeed; only a file that enables bf16
    itself, and float16, which needs a loss scale, make DeepSpeed keep weights in 16 bits beside float32 masters.
    Raises ConfigError for a file that is no JSON object, or whose values differ from the run's configuration.
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
        enabled = part.get("enabled", "auto")
        if enabled == "auto":
            enabled = precision == name == "float16"
        part["enabled"] = _filled(enabled, precision == name and enabled, path=path, key=f"{section}.enabled")
    if precision == "bfloat16" and not settings["bf16"]["enabled"]:
        # No modules whose gradients may travel in 16 bits.
        autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        settings.setdefault("torch_autocast", autocast)
    settings["zero_allow_untested_optimizer"] = True
    settings["zero_force_ds_cpu_optimizer"] = False  # torch's own moves offloaded shards, without a compiler
    return settings


def _filled(value: Any, ours: Any, *, path: str, key: str) -> Any:
    if value in ("auto", ours):
        return ours
    raise ConfigError(f'{path}: {key} is {value!r}, but the run\'s configuration makes it {ours!r}; write "auto"')
