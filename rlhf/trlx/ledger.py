"""The book of a run by trlX: its numbers under our names, its checkpoints in our form, its stops.

trlX tells its numbers to trackers; a Ledger is one. An iteration begins with trlX's rollouts and ends when its
optimiser steps are done.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.checkpoint import StageDir
from rlhf.config import Config
from rlhf.oversight import Oversight
from rlhf.ppo_evaluation import is_best, sample_line
from rlhf.telemetry import Metrics, Progress
from rlhf.trlx.export import read_numbers, read_trainer, write_trainer
from rlhf.trlx.reward import RewardFunction, Scored

logger = logging.getLogger(__name__)

ROLLOUTS = "rollout_scores/mean"
STEP = "losses/total_loss"
STEP_KEYS = {
    "ppo/policy_loss": "losses/policy_loss",
    "ppo/value_loss": "losses/value_loss",
    "ppo/ratio": "ratio",
    "ppo/clip_fraction": "policy/clipfrac",
    "ppo/approx_kl": "policy/approx_kl",
    "ppo/value_clip_fraction": "values/clipfrac",
    "ppo/learning_rate": "learning_rate_group_0",
}
"""Ours, averaged over an iteration's optimiser steps, and what trlX calls them."""


@dataclass
class Ledger:
    """What is known of the run; `iteration` counts those that are done.

    saved is the checkpoint that the run goes on from.
    """

    config: Config
    stage: StageDir
    reward_function: RewardFunction
    tokenizer: PreTrainedTokenizerBase
    metrics: Metrics
    progress: Progress
    oversight: Oversight
    saved: Path | None = None
    iteration: int = 0
    best_reward: float = -math.inf
    trainer: Any = None
    name: str = "rlhf"  # by which accelerate tells trackers apart
    _begun: dict[str, float] = field(default_factory=dict)
    _steps: list[dict[str, float]] = field(default_factory=list)
    _held_out: dict[str, float] = field(default_factory=dict)
    _training_since: float = 0.0
    _train_seconds: float = 0.0
    _saved_at: int = 0

    def begin(self, trainer: Any) -> None:
        """Take note of the trainer, and put it where the last checkpoint left off."""
        self.trainer = trainer
        if self.saved is not None:
            numbers = read_numbers(self.saved)
            self.iteration = self._saved_at = numbers["iteration"]
            best = numbers["best_reward"]
            self.best_reward = -math.inf if best is None else best
            steps = self.iteration * self.config.ppo.optimizer_steps_per_iteration
            read_trainer(self.saved, trainer, steps=steps)

    def heed(self) -> None:
        """Between two pieces of work. Raises Interrupted after a signal."""
        self.oversight.heed()

    def log(self, values: Mapping[str, Any], step: int | None = None, **unused: Any) -> None:
        """What accelerate calls with trlX's numbers. Raises Interrupted after a signal, between two optimiser steps."""
        if ROLLOUTS in values:
            self._begun = self._rollout_values(values)
            self._training_since = time.monotonic()
            return
        if STEP in values:
            self._steps.append({ours: number(values[theirs]) for ours, theirs in STEP_KEYS.items()})
            self._train_seconds = time.monotonic() - self._training_since
            self.heed()
            return
        if self.iteration == 0:
            self._log_line(self._held_out)
        self._held_out = {}  # trlX's look at the policy before it trains, also after a stop

    def not_training(self, seconds: float) -> None:
        """Take an evaluation's time out of the training's."""
        self._training_since += seconds

    def held_out(self, scored: Sequence[Scored], kl: float) -> dict[str, float]:
        """Our numbers of an evaluation's summaries, and a table of some of them."""
        eos, delta = self.tokenizer.eos_token_id, self.config.ppo.reward == "delta"
        self._held_out = {
            "ppo/eval_reward": mean(one.score - one.row.reference_score * delta for one in scored),
            "ppo/eval_score": mean(one.score for one in scored),
            "ppo/eval_kl": kl,
            "ppo/eval_response_tokens": mean(len(one.response_ids) for one in scored),
            "ppo/eval_ended": mean(one.ended(eos) for one in scored),
        }
        self._write_samples(scored[: self.config.ppo.sample_table_posts])
        return self._held_out

    def end_iteration(self, *, final: bool = False) -> None:
        """Log the iteration, and save where that is due."""
        ppo = self.config.ppo
        best = bool(self._held_out) and is_best(self, self._held_out)
        values = self._begun | _averages(self._steps) | {"time/train_seconds": self._train_seconds} | self._held_out
        self.iteration += 1
        self._log_line(values)
        self._begun, self._steps, self._held_out = {}, [], {}
        if final or best or self.iteration % ppo.save_every_iterations == 0:
            self._save(final=final, best=best)

    def close(self) -> None:
        """After trlX's last step: the last iteration ends, and the policy is published as `final`."""
        if self._steps:
            self.end_iteration(final=True)
        else:  # stopped in the last iteration, which was ended then
            self._save(final=True)

    def leave(self) -> None:
        """After Interrupted: what the iteration in hand has learned is kept, its other minibatches are given up."""
        if self._steps:
            self.end_iteration()
        if self.iteration > self._saved_at:
            self._save()

    def _rollout_values(self, values: Mapping[str, Any]) -> dict[str, float]:
        scored, ppo = self.reward_function.take(), self.config.ppo
        chunks = ppo.rollouts_per_iteration // ppo.rollout_chunk
        generate, score = values["time/rollout_generate"] * chunks, values["time/rollout_score"] * chunks
        return {
            "ppo/reward": float(values[ROLLOUTS]),
            "ppo/score": mean(one.score for one in scored),
            "ppo/kl": float(values["policy/sqrt_kl"]) ** 2,
            "ppo/kl_coef": float(values["kl_ctl_value"]),
            "ppo/response_tokens": mean(len(one.response_ids) for one in scored),
            "ppo/ended": mean(one.ended(self.tokenizer.eos_token_id) for one in scored),
            "time/rollout_seconds": generate,
            "time/score_seconds": score,
            "time/experience_seconds": values["time/rollout_time"] * chunks - generate - score,
        }

    def _log_line(self, values: Mapping[str, float]) -> None:
        self.metrics.log(self.iteration, values)
        shown = {key: values[f"ppo/{key}"] for key in ("reward", "kl") if f"ppo/{key}" in values}
        self.progress.update(self.iteration, **shown)

    def _save(self, *, final: bool = False, best: bool = False) -> None:
        numbers = {
            "iteration": self.iteration,
            "best_reward": self.best_reward if math.isfinite(self.best_reward) else None,
        }
        self.metrics.sync()
        with self.stage.publish(self.iteration, final=final, best=best) as directory:
            write_trainer(directory, self.trainer, self.tokenizer, numbers)
        self.stage.prune(self.config.runtime.keep_checkpoints)
        self._saved_at = self.iteration

    def _write_samples(self, scored: Sequence[Scored]) -> None:
        lines = [sample_line(self.tokenizer, one.row, one.summary, one.score) for one in scored]
        done = self.iteration + bool(self._steps)
        self.stage.write_text(f"samples/step-{done:08d}.jsonl", "".join(lines))


def mean(values: Any) -> float:
    """Of numbers or booleans; nan of none."""
    listed = [float(value) for value in values]
    return sum(listed) / len(listed) if listed else math.nan


def number(value: Any) -> float:
    """Of a number or a tensor of one; trlX's may still hang on the graph of its loss."""
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def _averages(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: mean(row[key] for row in rows) for key in STEP_KEYS} if rows else {}
