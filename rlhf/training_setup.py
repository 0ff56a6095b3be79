"""What the loop of SFT and of the reward model works with: the plan, the networks and all that is saved with them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, Self

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.checkpoint import StageDir
from rlhf.collate import EncodedExample, EncodedPair
from rlhf.config import OptimizerConfig, RewardConfig, RuntimeConfig, SftConfig
from rlhf.health import Health
from rlhf.oversight import Oversight
from rlhf.processes import process_count
from rlhf.quantized import check_quantize
from rlhf.saver import Saver
from rlhf.schedule import learning_rate_scheduler
from rlhf.sharding import Share, Strategy, make_accelerator, shards_weights, spread
from rlhf.shares import check_training_shares
from rlhf.telemetry import Metrics, Progress

Interrupted = Callable[[], bool]
"""Whether to break off, the same on all processes; to be asked before each batch, by all of them."""

NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""Parameters without weight decay, as transformers' Trainer knows them by name; those of nn.LayerNorm come on top."""


@dataclass(frozen=True)
class Plan:
    """How many micro-batches of one process make an optimiser step, how many such steps make an epoch and the run.

    Of these only the first depends on the number of processes.
    """

    accumulation: int
    epoch_steps: int
    total_steps: int


def plan_training(section: SftConfig | RewardConfig, *, name: str, examples: int) -> Plan:
    """Derive accumulation and steps for this number of processes.

    Raises ConfigError when micro-batches and processes do not divide the batch.
    """
    processes = process_count()
    check_training_shares(section, name=name, processes=processes)
    accumulation = section.batch_size // (section.micro_batch_size * processes)
    epoch_steps = math.ceil(examples / section.batch_size)
    steps = math.ceil(section.epochs * epoch_steps)
    return Plan(accumulation, epoch_steps, total_steps=min(steps, section.max_steps or steps))


class Batch(Protocol):
    """What a micro-batch is to the loop."""

    @property
    def counted(self) -> int:
        """How many items its loss is the sum of."""
        ...

    @property
    def tokens(self) -> int:
        """How many tokens its sequences have."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """On another device."""
        ...


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a stage wants trained.

    source loads what the stage started from, for adapters to be merged into. collate makes a micro-batch of examples,
    loss gives the summed loss of its counted items: the loss of a step is the sum over all its micro-batches and
    processes divided by their number. evaluate measures the model on held-out data, with metrics under `<stage>/`;
    None when it was interrupted. finish does what is left once training is over, and gives what stands in
    metrics.json, from the last evaluation; None when it was interrupted.
    """

    section: SftConfig | RewardConfig
    model: PreTrainedModel
    source: Callable[[], PreTrainedModel]
    examples: Sequence[EncodedExample] | Sequence[EncodedPair]
    collate: Callable[[Sequence[Any]], Batch]
    loss: Callable[[nn.Module, Any], Tensor]
    evaluate: Callable[[Interrupted], dict[str, float] | None]
    finish: Callable[[dict[str, float], Interrupted], dict[str, Any] | None]


@dataclass
class Window:
    """Sums over all processes since the last line of metrics."""

    steps: int = 0
    loss: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    save_seconds: float = 0.0


@dataclass
class Position:
    """How far a training is. due is the line of metrics of this step that is not written yet, if any."""

    step: int = 0
    window: Window = field(default_factory=Window)
    due: dict[str, float] | None = None
    evaluation_due: bool = False

    def state_dict(self) -> dict[str, Any]:
        """As plain numbers. A number of `due` that is not finite becomes None."""
        state = asdict(self)
        if self.due is not None:
            state["due"] = {key: value if math.isfinite(value) else None for key, value in self.due.items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.step, self.evaluation_due, self.window = state["step"], state["evaluation_due"], Window(**state["window"])
        due = state["due"]
        self.due = due and {key: math.nan if value is None else value for key, value in due.items()}


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW over the weights that are trained; biases and norms do not decay."""
    norms = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            without = id(parameter) in norms or NOT_DECAYED.search(name.lower())
            (kept if without else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


@dataclass
class Learner:
    """The networks and the state of a training; what changes from step to step is saved."""

    plan: Plan
    accelerator: Accelerator
    network: PreTrainedModel
    strategy: Strategy
    schedule: LambdaLR
    health: Health
    position: Position = field(default_factory=Position)
    saved_step: int = 0

    @property
    def processes(self) -> int:
        """How many share the work."""
        return self.accelerator.num_processes

    @property
    def rank(self) -> int:
        """This process's number among them."""
        return self.accelerator.process_index

    def total(self, values: Tensor) -> Tensor:
        """The elementwise sum over processes, the same on all."""
        if self.processes == 1:
            return values
        summed: Tensor = self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")
        return summed


@dataclass(frozen=True)
class Session:
    """A training under way: what is trained, and where it tells and saves what becomes of it."""

    task: Task
    learner: Learner
    tokenizer: PreTrainedTokenizerBase
    stage: StageDir
    runtime: RuntimeConfig
    metrics: Metrics
    progress: Progress
    saver: Saver
    oversight: Oversight

    def interrupted(self) -> bool:
        """Whether any process was asked to stop and the state may be saved; a sign of life at the same time."""
        return self.oversight.asked() and self.learner.health.is_well


def accelerator_for(
    section: SftConfig | RewardConfig, *, name: str, plan: Plan, runtime: RuntimeConfig, device: torch.device
) -> Accelerator:
    """Accelerate for the stage of this name, before its model is loaded.

    Raises ConfigError for settings of DeepSpeed, of precision or of quantised weights that cannot be had here.
    """
    accelerator = make_accelerator(
        section.deepspeed,
        key=f"{name}.deepspeed",
        share=Share(section.micro_batch_size, plan.accumulation),
        optimizer=section.optimizer,
        runtime=runtime,
        device=device,
    )
    check_quantize(section.lora, key=name, device=device, sharded=shards_weights(accelerator))
    return accelerator


def build_learner(task: Task, accelerator: Accelerator, plan: Plan, health: Health, *, precision: str) -> Learner:
    """A training at its beginning, on this process's device."""
    network, config = task.model, task.section.optimizer
    if task.section.gradient_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = make_optimizer(network, config)
    schedule = learning_rate_scheduler(optimizer, total=plan.total_steps, config=config)
    strategy = spread(accelerator, network, optimizer, precision=precision)
    return Learner(plan, accelerator, network, strategy, schedule, health)
