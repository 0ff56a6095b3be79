"""What each stage holds on a device at its fullest moments, and in the host's memory; formulas only, no torch.

Each batch is taken at its worst: every row as long as the configuration lets it be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from rlhf import memory_activations as memory
from rlhf.config import RewardConfig, SftConfig
from rlhf.memory_activations import Batch, Numerics
from rlhf.memory_steps import MicroBatch, Phase, step_phases
from rlhf.memory_strategy import FLOAT, MOMENTS, Parts
from rlhf.memory_trained import (
    Setting,
    Trained,
    resting_state,
    state_of,
    trained_ppo,
    trained_reward,
    trained_sft,
)
from rlhf.vllm_limits import cache_tokens


@dataclass(frozen=True)
class Need:
    """A stage's moments on a device, and host memory.

    loaded: bytes of the model that each process reads into host memory before it goes to the device. kept: what each
    process keeps there afterwards; kept_first: what the first process does beside that.
    """

    phases: tuple[Phase, ...]
    loaded: int = 0
    kept: Parts = field(default_factory=dict)
    kept_first: Parts = field(default_factory=dict)

    @property
    def peak(self) -> Phase:
        """The fullest moment."""
        return max(self.phases, key=lambda phase: phase.total)


def sft_need(setting: Setting) -> Need:
    """Steps, and summaries of held-out posts."""
    config, shape, section = setting.config, setting.shape, setting.config.sft
    trained = trained_sft(setting)
    positions = config.prompt.max_response_tokens if section.loss_on == "summary" else setting.choosing_tokens
    batch = Batch(section.micro_batch_size, setting.choosing_tokens, kept=positions)
    phases = _steps(setting, section, trained, batch, positions=batch.all_kept)
    rows = min(config.evaluate.batch_size, -(-section.rouge_posts // setting.processes))
    phases += _gathering(resting_state(setting, trained))
    phases.append(Phase("summaries", resting_state(setting, trained) | _generating(setting, trained, rows=rows)))
    return Need(tuple(phases), FLOAT * shape.policy_numbers, *_training_host(setting, trained))


def reward_need(setting: Setting) -> Need:
    """Steps, and the scores by which the model is shifted."""
    section, shape = setting.config.reward, setting.shape
    trained = trained_reward(setting)
    phases = _steps(setting, section, trained, _pairs(setting), positions=0)
    form = setting.form(autocast=True)
    scoring = memory.scoring_work(shape, form, batch_tokens=setting.config.prepare.batch_tokens, tokens=setting.tokens)
    copies = memory.autocast_copies(trained.matrices, form)
    phases += _gathering(resting_state(setting, trained))
    phases.append(
        Phase("scores", resting_state(setting, trained) | {"precision copies": copies, "activations": scoring})
    )
    return Need(tuple(phases), FLOAT * shape.reward_numbers, *_training_host(setting, trained))


def prepare_need(setting: Setting) -> Need:
    """The reward model on references."""
    scoring = _scoring(setting, setting.config.prepare.batch_tokens)
    return Need((Phase("scores", {"reward model": setting.width * setting.shape.reward_numbers} | scoring),))


def ppo_need(setting: Setting) -> Need:
    """Rollouts, their scores and likelihoods, and steps."""
    config, shape, ppo = setting.config, setting.shape, setting.config.ppo
    trained, value = trained_ppo(setting)
    resting = resting_state(setting, trained) | _beside_policy(setting, trained)
    form, response = setting.form(autocast=True), config.prompt.max_response_tokens
    chunk = min(ppo.rollout_chunk, -(-ppo.rollouts_per_iteration // setting.processes))
    copies = memory.autocast_copies(trained.matrices, form)
    trunk = _trunk_bytes(setting)
    kept: Parts = {"rollouts": ppo.rollouts_per_iteration * trunk}
    logits = memory.evaluated_logits(shape, form, positions=chunk * response)
    passing = memory.passing(shape, form, Batch(chunk, setting.choosing_tokens, kept=response))
    looking: Parts = {"precision copies": copies, "activations": chunk * trunk + max(passing, logits)}
    scoring = _scoring(setting, config.prepare.batch_tokens)
    colocated = ppo.reward_placement == "colocated"
    # A GPU scores a chunk while the next one is written (rlhf.overlap).
    beside: Parts = {"scoring": scoring["activations"]} if colocated and setting.device == "cuda" else {}
    phases = [
        Phase("rollouts", resting | kept | beside | _sampling(setting, trained, rows=chunk)),
        Phase("likelihoods", resting | kept | beside | looking),
    ]
    if colocated:
        phases.append(Phase("scores", resting | kept | scoring))
    phases += _gathering(resting)
    steps = _ppo_steps(setting, trained)
    phases += [Phase(step.name, step.parts | kept | _beside_policy(setting, trained)) for step in steps]
    if ppo.reward_placement == "dedicated":
        phases.append(
            Phase("scores, on a GPU of their own", {"reward model": setting.width * shape.reward_numbers} | scoring)
        )
    told_apart = tuple(_with_value(phase, value, setting) for phase in phases)
    return Need(told_apart, 0, *_training_host(setting, trained))


def evaluate_need(setting: Setting) -> Need:
    """Summaries and likelihoods by one policy at a time, and scores."""
    config, shape = setting.config, setting.shape
    section, form, response = config.evaluate, setting.form(autocast=False), config.prompt.max_response_tokens
    policy: Parts = {"weights": setting.width * shape.policy_numbers}
    rows = section.batch_size
    passing = memory.passing(shape, form, Batch(rows, setting.choosing_tokens, kept=response))
    logits = memory.evaluated_logits(shape, form, positions=rows * response)
    phases = (
        Phase("summaries", policy | _written(setting, form) | _cache_and_work(setting, form, rows=rows)),
        Phase("likelihoods", policy | {"activations": max(passing, logits)}),
        Phase(
            "scores",
            {"reward model": setting.width * shape.reward_numbers} | _scoring(setting, section.batch_tokens),
        ),
    )
    return Need(phases)


NEEDS: dict[str, Callable[[Setting], Need]] = {
    "sft": sft_need,
    "reward": reward_need,
    "prepare": prepare_need,
    "ppo": ppo_need,
    "evaluate": evaluate_need,
}
"""By stage, in the pipeline's order."""


def _beside_policy(setting: Setting, trained: Trained) -> Parts:
    """Reference and reward model, both frozen, and vLLM where it samples, on the policy's device."""
    parts: Parts = {}
    if setting.strategy.stage < 3:
        parts["reference"] = trained.reference_bytes
    if setting.config.ppo.reward_placement == "colocated":
        parts["reward model"] = setting.width * setting.shape.reward_numbers
    if setting.config.ppo.sampler == "vllm":
        parts |= _vllm(setting)
    return parts


def _vllm(setting: Setting) -> Parts:
    """vLLM's copy of the policy, whose head is never tied, and its keys and values; it keeps both all the time."""
    config, shape = setting.config, setting.shape
    numbers = shape.policy_numbers + shape.vocab * shape.hidden * shape.tied
    tokens = cache_tokens(config.ppo.rollout_chunk, config.prompt.max_sequence_tokens)
    cache = 2 * shape.layers * shape.kv_size * tokens
    return {"vLLM's weights": setting.width * numbers, "vLLM's kv cache": setting.width * cache}


def _steps(
    setting: Setting, section: SftConfig | RewardConfig, trained: Trained, batch: Batch, *, positions: int
) -> list[Phase]:
    """The moments of an optimiser step of SFT or the reward model."""
    accumulates = section.batch_size > section.micro_batch_size * setting.processes
    return step_phases(setting, trained, MicroBatch(batch, positions, section.gradient_checkpointing, accumulates))


def _pairs(setting: Setting) -> Batch:
    """Of the reward model: packed, a row is a prompt with both its summaries; padded, each summary has one."""
    section, prompt = setting.config.reward, setting.config.prompt
    if not setting.shape.packed:
        return Batch(2 * section.micro_batch_size, setting.tokens, kept=setting.tokens)
    kept = 1 if section.loss == "last" else prompt.max_response_tokens
    tokens = prompt.max_prompt_tokens + 2 * prompt.max_response_tokens
    return Batch(section.micro_batch_size, tokens, kept=2 * kept, shared=True)


def _trunk_bytes(setting: Setting) -> int:
    """The trunk's states of one rollout; without a trunk there are none."""
    states = setting.choosing_tokens * setting.shape.hidden * setting.width
    return states * (setting.config.ppo.unfrozen_layers != "all")


def _ppo_steps(setting: Setting, trained: Trained) -> list[Phase]:
    """The moments of PPO's optimiser step; a micro-batch divides a process's share of the minibatch."""
    ppo, response = setting.config.ppo, setting.config.prompt.max_response_tokens
    share = max(ppo.minibatch_size // setting.processes, 1)
    rows = math.gcd(share, ppo.micro_batch_size)
    batch = Batch(rows, setting.choosing_tokens, kept=response)
    # The trunk's states of the micro-batch are put together; in float32 the first block keeps just these.
    entering = rows * _trunk_bytes(setting) * (setting.width < FLOAT)
    micro = MicroBatch(batch, batch.all_kept, checkpointing=False, accumulates=share > rows, entering=entering)
    return step_phases(setting, trained, micro)


def _gathering(resting: Parts) -> list[Phase]:
    """ZeRO-3 gathers all weights in one piece of memory and copies each out of it before it gives the piece back."""
    if "gathered weights" not in resting:
        return []
    return [Phase("gathering", resting | {"gathered weights": 2 * resting["gathered weights"]})]


def _generating(setting: Setting, trained: Trained, *, rows: int) -> Parts:
    form = setting.form(autocast=True)
    copies: Parts = {"precision copies": memory.autocast_copies(trained.matrices, form)}
    if trained.adapted is None:  # layers with adapters are called as they are
        copies |= _written(setting, form)
    return copies | _cache_and_work(setting, form, rows=rows)


def _written(setting: Setting, form: Numerics) -> Parts:
    copies = memory.written_weights(setting.shape, form, response=setting.config.prompt.max_response_tokens)
    return {"written weights": copies} if copies else {}


def _sampling(setting: Setting, trained: Trained, *, rows: int) -> Parts:
    """What PPO's rollouts take beside what is always there; of vLLM that is activations of a few hundred megabytes."""
    return {} if setting.config.ppo.sampler == "vllm" else _generating(setting, trained, rows=rows)


def _cache_and_work(setting: Setting, form: Numerics, *, rows: int) -> Parts:
    shape, prompt = setting.shape, setting.config.prompt.max_prompt_tokens
    work = memory.generation_work(shape, form, rows=rows, prompt=prompt)
    return {"kv cache": memory.cache(shape, form, rows=rows, tokens=setting.tokens), "activations": work}


def _scoring(setting: Setting, batch_tokens: int) -> Parts:
    form = setting.form(autocast=False)
    work = memory.scoring_work(setting.shape, form, batch_tokens=batch_tokens, tokens=setting.tokens)
    return {"activations": work}


def _with_value(phase: Phase, value: int, setting: Setting) -> Phase:
    """The value function's weights told apart from the policy's."""
    if setting.strategy.stage == 3 or "weights" not in phase.parts:
        return phase
    parts = dict(phase.parts)
    parts["weights"] -= FLOAT * value
    return Phase(phase.name, parts | {"value model": FLOAT * value})


def _training_host(setting: Setting, trained: Trained) -> tuple[Parts, Parts]:
    """What is offloaded, each process; copies for checkpoints, the first process."""
    _, offloaded = state_of(setting, trained)
    copies = FLOAT * trained.numbers + trained.frozen_bytes + MOMENTS * trained.numbers
    return {f"offloaded {name}": size for name, size in offloaded.items()}, {"copies for checkpoints": copies}
