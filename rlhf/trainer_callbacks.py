"""What listens to the Trainer: metrics and progress, checkpoints published whole, stopping on request."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import TracebackType
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rlhf.checkpoint import StageDir
from rlhf.collate import LengthGroupedSampler
from rlhf.config import RuntimeConfig
from rlhf.errors import ConfigError
from rlhf.processes import is_first_process
from rlhf.runtime import StopSignal, agreed, wait_for_all
from rlhf.telemetry import Metrics, Progress

logger = logging.getLogger(__name__)


class TrainingLog:
    """Metrics and progress of a training that goes on after `resumed_at` steps; None at the beginning."""

    def __init__(self, stage: StageDir, *, total_steps: int, resumed_at: int | None, runtime: RuntimeConfig) -> None:
        self.name = stage.stage
        writes, first = is_first_process(), 0 if resumed_at is None else resumed_at + 1
        self._metrics = Metrics(stage.path, tensorboard=runtime.tensorboard, start_step=first, enabled=writes)
        self._progress = Progress(stage.path, self.name, total_steps, "steps", done=resumed_at or 0, enabled=writes)

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._metrics.close()
        self._progress.close()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append a line of numbers, each under `<stage>/<key>`."""
        self._metrics.log(step, {f"{self.name}/{key}": value for key, value in values.items()})

    def advance(self, step: int, **shown: float) -> None:
        """Move the progress bar."""
        self._progress.update(step, **shown)


class StageCallback(TrainerCallback):
    """Listens to the Trainer: moves the bar, writes metrics, publishes checkpoints, stops on request."""

    def __init__(
        self,
        *,
        stage: StageDir,
        tokenizer: PreTrainedTokenizerBase,
        runtime: RuntimeConfig,
        log: TrainingLog,
        stop: StopSignal,
    ) -> None:
        self.stage, self.tokenizer, self.runtime = stage, tokenizer, runtime
        self.log, self.stop = log, stop

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Decide what follows the step."""
        self.log.advance(state.global_step)
        if state.global_step >= state.max_steps:
            # The evaluation of the finished model follows the training; no optimiser goes on from here.
            control.should_evaluate = False
            args.save_only_model = True
        elif agreed(self.stop.requested):
            control.should_evaluate = False
            control.should_save = control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Write loss, gradient norm, learning rate and speed; the Trainer's own summary at the end is dropped."""
        if logs is None or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            key = f"{self.stage.stage}.optimizer.learning_rate"
            raise ConfigError(
                f"the loss is {logs['loss']} at step {state.global_step}; lower {key}={args.learning_rate}"
            )
        self.log.write(state.global_step, {key: value for key, value in logs.items() if key != "epoch"})
        self.log.advance(state.global_step, loss=logs["loss"])

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Write the numbers of an evaluation."""
        if metrics:
            self.log.write(state.global_step, metrics)
            logger.info("evaluated stage=%s step=%d %s", self.stage.stage, state.global_step, _facts(metrics))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Turn the Trainer's checkpoint, once every process has written its part, into a published step."""
        wait_for_all()
        if state.is_world_process_zero:
            directory = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            (directory / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle that nobody reads
            self.tokenizer.save_pretrained(directory)
            self.stage.adopt(directory, state.global_step)
            self.stage.prune(self.runtime.keep_checkpoints)
        wait_for_all()


class EpochCallback(TrainerCallback):
    """Tells the sampler its epoch; accelerate's set_epoch does not reach it where batches are skipped."""

    def __init__(self, sampler: LengthGroupedSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Whole epochs behind us, also in the middle of one that is resumed."""
        self.sampler.epoch = int(state.epoch or 0)


def _facts(metrics: dict[str, float]) -> str:
    return " ".join(f"{key}={value:.4g}" for key, value in metrics.items())
