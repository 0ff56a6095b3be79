"""A trlX configuration on its way into ours: what is read, what is set, what is lost. Needs no trlX."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from rlhf.errors import ConfigError

ABSENT = object()
_UNTAKEN = "no key of trlX's that is known here"
_ELSEWHERE = {
    "train.checkpoint_dir": "a run's folder is --runs-dir and --run",
    "train.logging_dir": "metrics.jsonl and TensorBoard's files are in the stage's folder",
    "train.rollout_logging_dir": "rollouts are not written down",
    "train.tracker": "metrics.jsonl and TensorBoard's files are always written",
    "train.project_name": "there is no tracker",
    "train.run_name": "give --run",
    "train.entity_name": "there is no tracker",
    "train.group_name": "there is no tracker",
    "train.tags": "there is no tracker",
    "train.save_best": "`best` is always kept",
    "train.save_optimizer": "a checkpoint always holds the optimiser's state",
    "train.resume_from_checkpoint": "a stage always goes on from its last checkpoint",
    "train.trainer_kwargs": "code",
    "train.orchestrator": "an older trlX's name for what draws the rollouts",
    "train.accelerate": "processes are given to `rlhf launch`",
    "train.accelerate_config_path": "processes are given to `rlhf launch`",
    "train.log_interval": "every iteration is logged",
    "model.model_type": "an older trlX's name for the trainer",
    "model.device": "runtime.device",
    "model.model_extra_configs": "arguments of transformers' loading",
    "tokenizer.padding_side": "padding may stand on either side",
    "tokenizer.truncation_side": "only the post's body is cut, at its end",
    "tokenizer.tokenizer_extra_configs": "arguments of transformers' loading",
}
"""Keys that need no counterpart, with what is there instead."""


@dataclass
class Translation:
    """A trlX configuration, flat, on its way into ours.

    `source` holds what has not been translated yet by dotted key; `ours` what has; `remarks` what to know about our
    keys; `lost` what has no counterpart.
    """

    source: dict[str, Any]
    processes: int = 1
    ours: dict[str, Any] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)

    def take(self, key: str, default: Any = ABSENT) -> Any:
        """The value of a trlX key, which counts as read. Raises ConfigError where it must be there and is not."""
        value = self.source.pop(key, default)
        if value is ABSENT:
            raise ConfigError(f"{key} is missing; is this a trlX configuration?")
        return value

    def number(self, key: str, default: Any = ABSENT) -> Any:
        """As `take`, for a number; YAML reads 1e-5 as a text."""
        value = self.take(key, default)
        if value is None or value is default:
            return value
        try:
            number = float(value)
            if isinstance(value, bool) or not math.isfinite(number):
                raise ValueError
        except (TypeError, ValueError):
            raise ConfigError(f"{key}={value!r} is not a number") from None
        return int(number) if number.is_integer() and abs(number) < 2**62 else number

    def count(self, key: str, default: Any = ABSENT) -> Any:
        """As `number`, for a positive whole one. Raises ConfigError for another."""
        value = self.number(key, default)
        if value is not default and not (isinstance(value, int) and value > 0):
            raise ConfigError(f"{key}={value!r} is not a positive whole number")
        return value

    def put(self, key: str, value: Any, remark: str = "") -> None:
        """Set one of our keys."""
        self.ours[key] = value
        if remark:
            self.remarks[key] = remark

    def lose(self, key: str, why: str) -> None:
        """Note a trlX key that has no counterpart, if it is there."""
        if key in self.source:
            self.lost.append(f"{key}={self.source.pop(key)!r}: {why}")

    def rest(self) -> None:
        """Note all that has not been read."""
        for key, why in _ELSEWHERE.items():
            for name in [name for name in self.source if name == key or name.startswith(f"{key}.")]:
                self.lose(name, why)
        for key in sorted(self.source):
            self.lose(key, _UNTAKEN)
