"""What SFT and the reward model's training share: Hugging Face's Trainer, made to keep the house's contracts.

The Trainer runs the loop over batches. Ours are the order of the data, the learning-rate curve, the metrics,
stopping on request, and checkpoints that are published whole and verified before anyone resumes from them.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerControl,
    TrainingArguments,
)

from rlhf.checkpoint import StageDir
from rlhf.collate import EncodedExample, EncodedPair, LengthGroupedSampler
from rlhf.config import RewardConfig, RuntimeConfig, SftConfig
from rlhf.errors import ConfigError, StopRequested
from rlhf.processes import is_first_process, process_count
from rlhf.runtime import StopSignal, agreed, wait_for_all
from rlhf.schedule import learning_rate_scheduler
from rlhf.shares import check_training_shares
from rlhf.trainer_callbacks import EpochCallback, StageCallback

logger = logging.getLogger(__name__)

Start = tuple[int, Path] | None
"""The step and the directory of the checkpoint to go on from; None at the beginning."""


@dataclass(frozen=True)
class Plan:
    """How many batches make an optimiser step of one process, and how many such steps there are."""

    accumulation: int
    total_steps: int


def plan_training(section: SftConfig | RewardConfig, *, name: str, examples: int) -> Plan:
    """Derive accumulation and steps for this number of processes.

    Raises ConfigError when micro-batches and processes do not divide the batch.
    """
    processes = process_count()
    check_training_shares(section, name=name, processes=processes)
    accumulation = section.batch_size // (section.micro_batch_size * processes)
    batches = math.ceil(math.ceil(examples / section.micro_batch_size) / processes)
    steps = math.ceil(section.epochs * math.ceil(batches / accumulation))
    return Plan(accumulation=accumulation, total_steps=min(steps, section.max_steps or steps))


def training_arguments(
    section: SftConfig | RewardConfig,
    *,
    stage: StageDir,
    plan: Plan,
    runtime: RuntimeConfig,
    device: torch.device,
    seed: int,
) -> TrainingArguments:
    """The Trainer's settings from ours. Make them before the model: DeepSpeed's ZeRO-3 shards it as it loads.

    Raises ConfigError for a DeepSpeed file that is not there and for float16 without a GPU.
    """
    on_cpu = device.type == "cpu"
    if on_cpu and runtime.precision == "float16":
        raise ConfigError("runtime.precision=float16 trains on a GPU only; use bfloat16 or float32 on the CPU")
    arguments = TrainingArguments(
        output_dir=str(stage.path / "trainer"),
        seed=seed,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and "WORLD_SIZE" in os.environ else None,
        bf16=runtime.precision == "bfloat16",
        fp16=runtime.precision == "float16",
        deepspeed=deepspeed_file(section.deepspeed, key=f"{stage.stage}.deepspeed"),
        gradient_checkpointing=section.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        per_device_train_batch_size=section.micro_batch_size,
        per_device_eval_batch_size=section.micro_batch_size,
        gradient_accumulation_steps=plan.accumulation,
        max_steps=plan.total_steps,
        learning_rate=section.optimizer.learning_rate,
        adam_beta1=section.optimizer.betas[0],
        adam_beta2=section.optimizer.betas[1],
        adam_epsilon=section.optimizer.eps,
        weight_decay=section.optimizer.weight_decay,
        max_grad_norm=section.optimizer.max_grad_norm,
        logging_steps=runtime.log_every_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it waits for the device at every step; on_log looks at the loss
        eval_strategy="steps",
        eval_steps=section.eval_every_steps,
        save_strategy="steps",
        save_steps=section.save_every_steps,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        ddp_find_unused_parameters=False,
    )
    # Several visible GPUs and one process would become nn.DataParallel, with batches of another size.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


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


class StageTrainer(Trainer):
    """A Trainer with our order of data and our learning rates; subclasses say what the loss is.

    measure turns what `prediction_step` gives for the held-out examples, in their order, into metrics.
    """

    control: TrainerControl
    lr_scheduler: LambdaLR | None

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        section: SftConfig | RewardConfig,
        arguments: TrainingArguments,
        collator: Callable[[Sequence[Any]], dict[str, Tensor]],
        train: Sequence[EncodedExample] | Sequence[EncodedPair],
        valid: Sequence[EncodedExample] | Sequence[EncodedPair],
        measure: Callable[[NDArray[np.float32]], dict[str, float]],
        callback: StageCallback,
    ) -> None:
        lengths = [example.length for example in train]
        self.sampler = LengthGroupedSampler(lengths, batch_size=section.batch_size, seed=arguments.seed)
        # The Trainer writes this argument into the model's config, which we publish.
        arguments.use_cache = getattr(model.config, "use_cache", True)
        super().__init__(
            model=model,
            args=arguments,
            data_collator=collator,
            train_dataset=train,
            eval_dataset=valid,
            callbacks=[EpochCallback(self.sampler), callback],
        )
        self.remove_callback(PrinterCallback)  # it prints to stdout
        self.section, self.measure = section, measure
        self._tokens = torch.zeros((), dtype=torch.int64, device=arguments.device)
        self._clock = time.monotonic()

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure, and let the callback write it; called by the Trainer with arguments of its own."""
        started = time.monotonic()
        loader = self.get_eval_dataloader()
        rows = self.evaluation_loop(loader, "Evaluation", prediction_loss_only=False).predictions
        metrics = self.measure(rows)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._clock += time.monotonic() - started
        return metrics

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One forward and backward pass; counts the tokens on the device, without waiting for it."""
        self._tokens += inputs["attention_mask"].sum().to(self._tokens.device)
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens a second, over all processes (taken as alike), since the last time."""
        if "loss" in logs:
            elapsed = time.monotonic() - self._clock
            logs["tokens_per_second"] = self._tokens.item() * self.args.world_size / max(elapsed, 1e-9)
            self._tokens.zero_()
            self._clock = time.monotonic()
        super().log(logs, start_time)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        """Our learning-rate curve."""
        if self.lr_scheduler is None:
            self.lr_scheduler = learning_rate_scheduler(
                optimizer or self.optimizer, total=num_training_steps, config=self.section.optimizer
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def floating_point_ops(self, inputs: dict[str, Tensor]) -> int:
        """Not counted: the Trainer would walk over all parameters at every step."""
        return 0

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        return self.sampler


def train_to_end(trainer: StageTrainer, *, start: Start, stop: StopSignal) -> None:
    """Train, going on from `start`, to the last step.

    Raises StopRequested, with the state saved, when asked to stop.
    """
    total = trainer.args.max_steps
    if start is not None and start[0] >= total:
        trainer.state.global_step = start[0]  # only the evaluation and the publishing are left to do
        return
    trainer.train(resume_from_checkpoint=str(start[1]) if start else None)
    check_stop(trainer, stop)


def check_stop(trainer: StageTrainer, stop: StopSignal) -> None:
    """Raise StopRequested on every process when any was asked to stop; the state has been saved."""
    step, total = trainer.state.global_step, trainer.args.max_steps
    if step < total or agreed(stop.requested):
        raise StopRequested(
            f"stopped on request; step {step} of {total} is saved: run the same command again to continue"
        )


def publish_model(
    trainer: StageTrainer, *, stage: StageDir, tokenizer: PreTrainedTokenizerBase, metrics: str, keep: int
) -> None:
    """Publish model, tokenizer and `metrics.json` as the stage's final directory."""
    # DeepSpeed gathers the weights from all processes, so all have to ask.
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if is_first_process():
        with stage.publish(trainer.state.global_step, final=True) as directory:
            trainer.model.save_pretrained(directory, state_dict=weights)
            tokenizer.save_pretrained(directory)
            (directory / "metrics.json").write_text(metrics, encoding="utf-8")
        stage.prune(keep)
        shutil.rmtree(stage.path / "trainer", ignore_errors=True)
    wait_for_all()


def remove_unpublished(stage: StageDir) -> None:
    """Remove what a killed Trainer left; a half-written `checkpoint-N` must never be resumed from."""
    if is_first_process():
        shutil.rmtree(stage.path / "trainer", ignore_errors=True)
