"""What PPO's loop works with: the networks, the optimiser and all that steers training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase

from rlhf.actor_critic import ActorCritic
from rlhf.advantages import AdaptiveKl, FixedKl, RunningMoments, kl_controller
from rlhf.checkpoint import StageDir
from rlhf.config import Config
from rlhf.errors import ConfigError
from rlhf.experience import InHand
from rlhf.generation import BuiltinEngine, Sampling
from rlhf.health import Health
from rlhf.models import load_policy, load_reward_model
from rlhf.rollout import Collector
from rlhf.runtime import ACCELERATE_PRECISION, prepare_runtime, torch_dtype
from rlhf.schedule import learning_rate_scheduler
from rlhf.scoring import Scorer
from rlhf.shares import check_ppo_shares
from rlhf.tokenizer import load_tokenizer
from rlhf.training_state import HostState

# Each use of chance has a stream of its own, so that none depends on what ran before it.
PROMPTS, SAMPLING, SHUFFLE, EVALUATION = range(4)

Place = tuple[int, bool, int]


@dataclass
class Learner:
    """The networks and the state of a PPO run; what changes from iteration to iteration is saved.

    `iteration` counts those that are done. `unlogged` are the metrics of the last one while its evaluation is still
    to come; at the beginning there are none, and only the evaluation is. `in_hand` is an iteration in the middle of
    its inner epochs.
    """

    config: Config
    stage: StageDir
    accelerator: Accelerator
    actor: ActorCritic
    model: torch.nn.Module  # the actor as accelerate wraps it: its forward synchronises gradients
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    collector: Collector
    tokenizer: PreTrainedTokenizerBase
    kl: FixedKl | AdaptiveKl
    moments: RunningMoments
    health: Health
    host: HostState
    iteration: int = 0
    best_reward: float = -math.inf
    unlogged: dict[str, float] | None = field(default_factory=dict)
    in_hand: InHand | None = None
    saved_at: Place = (0, False, -1)
    save_seconds: float = 0.0

    @property
    def place(self) -> Place:
        """How far the run is: iterations done, whether the last is logged, minibatches done of one in hand, or -1."""
        return self.iteration, self.unlogged is None, self.in_hand.done if self.in_hand else -1

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


def build_learner(config: Config, stage: StageDir) -> Learner:
    """A PPO run at its beginning: the SFT policy, its frozen reference and a fresh value function.

    Raises PrerequisiteError when SFT or the reward model is missing, ConfigError when a setting does
    not fit the model or the number of processes.
    """
    ppo, (sft, reward) = config.ppo, (StageDir(stage.run_dir, name).final() for name in ("sft", "reward"))
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
        stage,
        accelerator,
        actor,
        model,
        optimizer,
        schedule,
        collector,
        tokenizer,
        kl_controller(ppo),
        RunningMoments(),
        Health(stage, tolerate=config.runtime.max_bad_steps),
        HostState(policy),
    )
