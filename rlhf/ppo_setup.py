"""What PPO's loop works with: the networks, the optimiser and all that steers training."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase

from rlhf.actor_critic import ActorCritic
from rlhf.adapter_files import load_adapter
from rlhf.adapters import has_adapters
from rlhf.advantages import AdaptiveKl, FixedKl, RunningMoments, kl_controller
from rlhf.checkpoint import StageDir
from rlhf.config import Config, PpoConfig
from rlhf.errors import ConfigError
from rlhf.experience import InHand
from rlhf.generation import Sampling, draw_chances
from rlhf.health import Health
from rlhf.lora import ADAPTER_DIR, quantized
from rlhf.models import load_policy, load_reward_model
from rlhf.placement import scorer_device
from rlhf.ppo_sampler import open_sampler, plain_weights
from rlhf.processes import process_count
from rlhf.quantized import check_quantize
from rlhf.remote_scorer import RemoteScorer, open_remote_scorer
from rlhf.rollout import Collector
from rlhf.runtime import generator, prepare_runtime, torch_dtype
from rlhf.schedule import learning_rate_scheduler
from rlhf.scoring import Scorer
from rlhf.sharding import Share, Strategy, make_accelerator, shards_weights, spread
from rlhf.shares import check_ppo_shares
from rlhf.tokenizer import load_tokenizer
from rlhf.vllm_limits import check_ppo_sampler

logger = logging.getLogger(__name__)

# Each use of chance has a stream of its own, so that none depends on what ran before it.
PROMPTS, SAMPLING, SHUFFLE, EVALUATION = range(4)

VALUE_FILE = "value.safetensors"

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
    strategy: Strategy
    schedule: LambdaLR
    collector: Collector
    scorer: Scorer | RemoteScorer
    source: Path  # the SFT policy's directory
    tokenizer: PreTrainedTokenizerBase
    kl: FixedKl | AdaptiveKl
    moments: RunningMoments
    health: Health
    iteration: int = 0
    best_reward: float = -math.inf
    unlogged: dict[str, float] | None = field(default_factory=dict)
    in_hand: InHand | None = None
    handed_over: int | None = None  # after so many optimiser steps the sampler's copy of the weights was taken
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

    def sampler_ready(self) -> None:
        """Give a sampler with weights of its own the policy's, unless it has these.

        All processes call it inside `strategy.whole()`, before they sample.
        """
        steps = self.schedule.last_epoch
        if self.config.ppo.sampler == "builtin" or steps == self.handed_over:
            return
        started = time.monotonic()
        self.collector.engine.sync(plain_weights(self.actor.policy))
        self.handed_over = steps
        logger.debug("handed weights to the sampler step=%d seconds=%.3f", steps, time.monotonic() - started)

    def close(self) -> None:
        """Give back what the sampler holds; nothing is sampled after this."""
        self.collector.engine.close()


def chances(learner: Learner, places: Sequence[int], *stream: int) -> Tensor:
    """chances_BR of the rollouts at these places: those that one process would draw, chunk by chunk, for all."""
    config, size = learner.config, learner.config.ppo.rollout_chunk
    shape, starts = (size, config.prompt.max_response_tokens), sorted({place // size * size for place in places})
    # The 0 is the first process's number, by which each had a stream of its own once.
    drawn = {
        start: draw_chances(shape, generator(config.seed, *stream, 0, start, device=learner.device)) for start in starts
    }
    rows = [drawn[place // size * size][place % size] for place in places]
    return torch.stack(rows) if rows else torch.empty(0, shape[1])


def build_learner(
    config: Config, stage: StageDir, *, start: Path | None = None, stopped: Callable[[], bool] = lambda: False
) -> Learner:
    """A PPO run at its beginning: the SFT policy, its frozen reference and a fresh value function.

    start is a checkpoint whose weights these are to have, after the reference was taken; the rest is load_learner's.
    stopped says whether this process was asked to stop, for who waits for scores.
    Raises PrerequisiteError when SFT or the reward model is missing, ConfigError when a setting does
    not fit the model or the number of processes.
    """
    ppo, (sft, reward) = config.ppo, (StageDir(stage.run_dir, name).final() for name in ("sft", "reward"))
    device = prepare_runtime(config.runtime, seed=config.seed)
    check_ppo_shares(ppo, process_count())
    check_ppo_sampler(ppo)
    accelerator = make_accelerator(
        ppo.deepspeed,
        key="ppo.deepspeed",
        share=share_of(ppo),
        optimizer=ppo.optimizer,
        runtime=config.runtime,
        device=device,
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.mixed_precision != "no":
        raise ConfigError(
            f"ppo.deepspeed={ppo.deepspeed} keeps trained weights in 16 bits, which PPO does not; use "
            "runtime.precision: bfloat16, and leave bf16 and fp16 out of the file"
        )
    check_quantize(ppo.lora, key="ppo", device=device, sharded=shards_weights(accelerator))
    tokenizer = load_tokenizer(sft, key="sft/final")
    actor = build_actor(config, sft, reward, accelerator.device)
    if start is not None:
        load_weights(actor, start)
    optimizer = torch.optim.AdamW(
        actor.trainable_parameters(),
        lr=ppo.optimizer.learning_rate,
        betas=ppo.optimizer.betas,
        eps=ppo.optimizer.eps,
        weight_decay=ppo.optimizer.weight_decay,
        # One pass over the weights; and on a GPU a step would otherwise take another four bytes a weight.
        fused=True,
    )
    total = ppo.schedule_steps or ppo.total_optimizer_steps
    schedule = learning_rate_scheduler(optimizer, total=total, config=ppo.optimizer)
    strategy = spread(accelerator, actor, optimizer, precision=config.runtime.precision)
    collector = Collector(
        actor=actor,
        engine=open_sampler(config, actor.policy, sft, tokenizer, accelerator.device),
        sampling=Sampling(max_new_tokens=config.prompt.max_response_tokens, temperature=ppo.temperature),
        autocast=strategy.autocast,
    )
    return Learner(
        config,
        stage,
        accelerator,
        actor,
        strategy,
        schedule,
        collector,
        build_scorer(config, reward, accelerator.device, stopped),
        sft,
        tokenizer,
        kl_controller(ppo),
        RunningMoments(),
        Health(stage, tolerate=config.runtime.max_bad_steps),
    )


def build_actor(config: Config, sft: Path, reward: Path, device: torch.device) -> ActorCritic:
    """The SFT policy with its reference and a value function. Raises ConfigError when a setting does not fit it."""
    ppo, dtype = config.ppo, torch_dtype(config.runtime.precision)
    policy = quantized(load_policy(sft), ppo.lora, dtype=dtype, device=device).to(device)
    try:
        return ActorCritic(
            policy,
            unfrozen_layers=ppo.unfrozen_layers,
            temperature=ppo.temperature,
            value_model=load_reward_model(reward, device=device) if ppo.value_network == "separate" else None,
            frozen_dtype=dtype,
            lora=ppo.lora,
            seed=config.seed,
        ).to(device)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def build_scorer(
    config: Config, reward: Path, device: torch.device, stopped: Callable[[], bool]
) -> Scorer | RemoteScorer:
    """The reward model where `ppo.reward_placement` says; device is the policy's."""
    placement = config.ppo.reward_placement
    if placement == "remote":
        return open_remote_scorer(config, reward, stopped=stopped)
    model = load_reward_model(
        reward,
        dtype=torch_dtype(config.runtime.precision),
        device=scorer_device(placement, device, process_count()),
    )
    return Scorer(model, batch_tokens=config.prepare.batch_tokens)


def load_weights(actor: ActorCritic, directory: Path) -> None:
    """Give policy and value function what a checkpoint holds; the reference stays."""
    if has_adapters(actor.policy):
        load_adapter(actor.policy, directory / ADAPTER_DIR)
    else:
        actor.policy.load_state_dict(load_policy(directory).state_dict())
    actor.value_head.load_state_dict(load_file(directory / VALUE_FILE))


def share_of(ppo: PpoConfig) -> Share:
    """What an optimiser step is to one process."""
    rollouts = ppo.minibatch_size // process_count()
    micro = math.gcd(rollouts, ppo.micro_batch_size)
    return Share(micro, rollouts // micro)
