"""What PPO's loop works with: the networks, the optimiser and all that steers training; built, saved, loaded.

A checkpoint holds the policy as transformers saves it, the value function and the optimiser's moments in
safetensors, and the numbers in JSON. Nothing in it is unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase

from rlhf.actor_critic import ActorCritic
from rlhf.advantages import AdaptiveKl, FixedKl, RunningMoments, kl_controller
from rlhf.checkpoint import StageDir
from rlhf.config import Config
from rlhf.errors import ConfigError
from rlhf.generation import BuiltinEngine, Sampling
from rlhf.models import load_policy, load_reward_model
from rlhf.pipeline import CONFIG_FILE
from rlhf.rollout import Collector
from rlhf.runtime import prepare_runtime, torch_dtype
from rlhf.schedule import learning_rate_scheduler
from rlhf.scoring import Scorer
from rlhf.shares import check_ppo_shares
from rlhf.tokenizer import load_tokenizer

ACCELERATE_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
VALUE_FILE, OPTIMIZER_FILE, STATE_FILE = "value.safetensors", "optimizer.safetensors", "training_state.json"


@dataclass
class Learner:
    """The networks and the state of a PPO run; what changes from iteration to iteration is saved."""

    config: Config
    accelerator: Accelerator
    actor: ActorCritic
    model: torch.nn.Module  # the actor as accelerate wraps it: its forward synchronises gradients
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    collector: Collector
    tokenizer: PreTrainedTokenizerBase
    kl: FixedKl | AdaptiveKl
    moments: RunningMoments
    iteration: int = 0
    best_reward: float = -math.inf

    @property
    def device(self) -> torch.device:
        """Where this process's networks are."""
        return self.accelerator.device

    def sum_over_processes(self, tensor: Tensor) -> Tensor:
        """The elementwise sum, the same on every process."""
        if self.accelerator.num_processes == 1:
            return tensor
        summed: Tensor = self.accelerator.reduce(tensor.to(self.device), reduction="sum")
        return summed

    def sum_values(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Named sums, in one exchange."""
        packed = self.sum_over_processes(torch.stack([value.double().to(self.device) for value in values.values()]))
        return dict(zip(values, packed.tolist(), strict=True))

    def mean_values(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Named means over processes, in one exchange."""
        return {key: total / self.accelerator.num_processes for key, total in self.sum_values(values).items()}


def build_learner(config: Config, run_dir: Path) -> Learner:
    """A PPO run at its beginning: the SFT policy, its frozen reference and a fresh value function.

    Raises PrerequisiteError when SFT or the reward model is missing, ConfigError when a setting does
    not fit the model or the number of processes.
    """
    ppo, sft, reward = config.ppo, StageDir(run_dir, "sft").final(), StageDir(run_dir, "reward").final()
    device = prepare_runtime(config.runtime, seed=config.seed)
    frozen_dtype = torch_dtype(config.runtime.precision)
    accelerator = Accelerator(
        mixed_precision=ACCELERATE_PRECISION[config.runtime.precision],
        cpu=device.type == "cpu",
        # Else each process holds its gradients twice: 7 GB more for eight blocks of GPT-J-6B.
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    check_ppo_shares(config.ppo, accelerator.num_processes)
    tokenizer = load_tokenizer(sft, key="sft/final")
    policy = load_policy(sft, device=accelerator.device)
    separate = ppo.value_network == "separate"
    try:
        actor = ActorCritic(
            policy,
            unfrozen_layers=ppo.unfrozen_layers,
            temperature=ppo.temperature,
            value_model=load_reward_model(reward, device=accelerator.device) if separate else None,
            frozen_dtype=frozen_dtype,
        ).to(accelerator.device)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    optimizer = torch.optim.AdamW(
        actor.trainable_parameters(),
        lr=ppo.optimizer.learning_rate,
        betas=ppo.optimizer.betas,
        eps=ppo.optimizer.eps,
        weight_decay=ppo.optimizer.weight_decay,
    )
    total = ppo.schedule_steps or ppo.total_optimizer_steps
    schedule = learning_rate_scheduler(optimizer, total=total, config=ppo.optimizer)
    model, optimizer = accelerator.prepare(actor, optimizer)
    collector = Collector(
        actor=actor,
        engine=BuiltinEngine(policy, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id),
        scorer=Scorer(
            load_reward_model(reward, dtype=frozen_dtype, device=accelerator.device),
            pad_id=tokenizer.pad_token_id,
            batch_tokens=config.prepare.batch_tokens,
        ),
        sampling=Sampling(max_new_tokens=config.prompt.max_response_tokens, temperature=ppo.temperature),
        pad_id=tokenizer.pad_token_id,
        autocast=accelerator.autocast,
    )
    return Learner(
        config,
        accelerator,
        actor,
        model,
        optimizer,
        schedule,
        collector,
        tokenizer,
        kl_controller(ppo),
        RunningMoments(),
    )


def save_learner(learner: Learner, stage: StageDir, *, final: bool = False, best: bool = False) -> None:
    """Publish a checkpoint; the other processes wait until it is there."""
    learner.accelerator.wait_for_everyone()
    if learner.accelerator.is_main_process:
        with stage.publish(learner.iteration, final=final, best=best) as directory:
            learner.actor.policy.save_pretrained(directory)
            learner.tokenizer.save_pretrained(directory)
            save_file(learner.actor.value_head.state_dict(), directory / VALUE_FILE)
            save_file(_optimizer_tensors(learner.optimizer), directory / OPTIMIZER_FILE)
            (directory / CONFIG_FILE).write_text(learner.config.to_yaml(), encoding="utf-8")
            state = {
                "iteration": learner.iteration,
                "best_reward": learner.best_reward if math.isfinite(learner.best_reward) else None,
                "kl": learner.kl.state_dict(),
                "moments": learner.moments.state_dict(),
                "schedule_steps": learner.schedule.last_epoch,
            }
            (directory / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    learner.accelerator.wait_for_everyone()


def load_learner(learner: Learner, directory: Path) -> None:
    """Put a learner where a checkpoint left off."""
    state = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
    learner.actor.policy.load_state_dict(load_policy(directory).state_dict())
    learner.actor.value_head.load_state_dict(load_file(directory / VALUE_FILE))
    _load_optimizer_tensors(learner.optimizer, load_file(directory / OPTIMIZER_FILE))
    learner.kl.load_state_dict(state["kl"])
    learner.moments.load_state_dict(state["moments"])
    learner.schedule.load_state_dict(learner.schedule.state_dict() | {"last_epoch": state["schedule_steps"]})
    for group, base in zip(learner.optimizer.param_groups, learner.schedule.base_lrs, strict=True):
        group["lr"] = base * learner.schedule.lr_lambdas[0](state["schedule_steps"])
    learner.iteration = state["iteration"]
    learner.best_reward = -math.inf if state["best_reward"] is None else state["best_reward"]


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments, by parameter number and name."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": tensor for number, entry in state.items() for name, tensor in entry.items()}


def _load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
