"""The phases of our code: what each must spend, and how long it takes: sampling and scoring alone, then PPO."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf.checkpoint import StageDir
from rlhf.config import Config
from rlhf.environment import EnvironmentRow
from rlhf.generation import BuiltinEngine
from rlhf.models import load_policy, load_reward_model
from rlhf.oversight import Oversight
from rlhf.ppo_setup import build_learner
from rlhf.sampling import Sampling
from rlhf.scoring import Scorer
from rlhf.stages.ppo import iterate
from rlhf.stopping import StopSignal
from rlhf.watchdog import Watchdog
from tests.benchmarks import limits
from tests.benchmarks.bench_run import Size
from tests.benchmarks.limits import Phase
from tests.benchmarks.machine import Clock
from tests.tiny_run import byte_tokenizer

PPO_PHASES = ("rollout", "score", "experience", "train")


@dataclass(frozen=True)
class Task:
    """What a phase must spend, on how many of which unit."""

    phase: Phase
    count: int
    unit: str


def tasks(size: Size, dtype: torch.dtype) -> dict[str, Task]:
    """Every phase by name, in the order of the table; those of a PPO iteration begin with `ppo`."""
    shape = size.shape(dtype)
    batch = {"rows": size.chunk, "prompt": size.prompt}
    prefill = limits.prefill(shape, **batch)
    decode = limits.decode(shape, **batch, response=size.response)
    ppo = ppo_phases(size, dtype)
    return {
        "prefill": Task(prefill, size.chunk, "prompts"),
        "decode": Task(decode, size.chunk * (size.response - 1), "tokens"),
        "summaries": Task(limits.together([prefill, decode]), size.chunk, "summaries"),
        "scoring": Task(_scored(size, dtype), size.scored, "sequences"),
        **{f"ppo {name}": Task(phase, size.rollouts, "rollouts") for name, phase in ppo.items()},
    }


def ppo_phases(size: Size, dtype: torch.dtype) -> dict[str, Phase]:
    """What each phase of an iteration must spend, and the iteration."""
    shape, chunks = size.shape(dtype), size.rollouts // size.chunk
    batch = {"rows": size.chunk, "prompt": size.prompt, "passes": chunks}
    found = {
        "rollout": limits.together(
            [limits.prefill(shape, **batch), limits.decode(shape, **batch, response=size.response)]
        ),
        "score": limits.scoring(shape, rows=size.chunk, tokens=size.tokens, passes=chunks),
        "experience": limits.experience(shape, **batch, response=size.response),
        "train": limits.training(
            shape, rows=size.minibatch, prompt=size.prompt, response=size.response, steps=size.steps
        ),
    }
    return found | {"iteration": limits.together(found.values())}


def time_sampling(
    policy_dir: Path, rows: list[EnvironmentRow], size: Size, *, dtype: torch.dtype, clock: Clock, repeats: int
) -> dict[str, float]:
    """Seconds of one batch of `size.chunk` summaries: up to the first token, from there on, and together."""
    tokenizer, device = byte_tokenizer(), clock.device
    engine = BuiltinEngine(
        load_policy(policy_dir, dtype=dtype, device=device),
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
    )
    prompts = [row.prompt_ids for row in rows[: size.chunk]]

    def writing(tokens: int) -> Callable[[], object]:
        sampling = Sampling(max_new_tokens=tokens)
        return lambda: engine.generate(prompts, sampling, generator=torch.Generator().manual_seed(1))

    first = clock.best(writing(1), repeats=repeats)
    whole = clock.best(writing(size.response), repeats=repeats)
    return {"prefill": first, "decode": whole - first, "summaries": whole}


def time_scoring(
    reward_dir: Path, rows: list[EnvironmentRow], size: Size, *, dtype: torch.dtype, clock: Clock, repeats: int
) -> dict[str, float]:
    """Seconds of `size.scored` sequences as long as a prompt and its response, in passes of `size.batch_tokens`."""
    scorer = Scorer(
        load_reward_model(reward_dir, dtype=dtype, device=clock.device),
        batch_tokens=size.batch_tokens,
    )
    prompts = [rows[number % len(rows)].prompt_ids for number in range(size.scored)]
    sequences = [[*prompt, *range(size.response)] for prompt in prompts]
    return {"scoring": clock.best(lambda: scorer.score(sequences), repeats=repeats)}


def time_iterations(
    config: Config, run_dir: Path, rows: list[EnvironmentRow], *, clock: Clock, count: int
) -> dict[str, float]:
    """Seconds of PPO iterations, their phases as the stage times them: of `count` after the first the quickest."""
    found = run_iterations(config, run_dir, rows, clock=clock, count=count + 1)
    return {f"ppo {name}": seconds for name, seconds in quickest(found[1:]).items()}


def run_iterations(
    config: Config, run_dir: Path, rows: list[EnvironmentRow], *, clock: Clock, count: int
) -> list[dict[str, float]]:
    """Seconds by phase of each of so many iterations, and under `iteration` of all of it; nothing is saved."""
    learner = build_learner(config, StageDir(run_dir, "ppo"))
    found: list[dict[str, float]] = []
    with Watchdog(config.runtime.hang_after_seconds) as watchdog:
        for _ in range(count):
            started = clock()
            iterate(learner, rows, Oversight(StopSignal(), watchdog))
            seconds = clock() - started
            values, learner.unlogged = learner.unlogged or {}, None
            found.append({name: values[f"time/{name}_seconds"] for name in PPO_PHASES} | {"iteration": seconds})
    return found


def quickest(found: list[dict[str, float]]) -> Mapping[str, float]:
    """Of each phase."""
    return {name: min(seconds[name] for seconds in found) for name in found[0]}


def free_memory() -> None:
    """Models that nobody refers to any more give their memory back, on a GPU to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _scored(size: Size, dtype: torch.dtype) -> Phase:
    """Full passes, and a last one with the rest."""
    shape, rows = size.shape(dtype), max(size.batch_tokens // size.tokens, 1)
    full, rest = divmod(size.scored, rows)
    phases = [limits.scoring(shape, rows=rows, tokens=size.tokens, passes=full)]
    if rest:
        phases.append(limits.scoring(shape, rows=rest, tokens=size.tokens))
    return limits.together(phases)
