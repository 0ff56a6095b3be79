"""PPO: align the SFT policy with the reward model, on a KL leash.

One iteration, as in Ziegler et al. 2019, Stiennon et al. 2020 and Huang et al. 2024:

 1. draw prompts
 2. sample a summary for each; score it; evaluate it under policy, reference and value function
 3. scores and KL penalties become token rewards, then advantages and returns
 4. passes over the rollouts in minibatches: clipped policy loss, clipped value loss
 5. move the KL coefficient
 6. now and then: summarise held-out posts, keep the best policy, save

Shapes: B rollouts, R response columns, T prompt and response columns.
"""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlhf.advantages import gae, k1, k3, token_rewards, whiten
from rlhf.checkpoint import StageDir, write_text_atomically
from rlhf.config import Config
from rlhf.environment import EnvironmentRow, load_environment
from rlhf.errors import RlhfError, StopRequested
from rlhf.losses import policy_loss, value_loss
from rlhf.ppo_setup import Learner, build_learner, load_learner, save_learner
from rlhf.prompt import decode_response
from rlhf.rollout import Rollout, minibatch, stack
from rlhf.runtime import StopSignal, agreed, from_first, generator
from rlhf.telemetry import Metrics, Progress, Stopwatch

logger = logging.getLogger(__name__)

# Each use of chance has a stream of its own, so that none depends on what ran before it.
PROMPTS, SAMPLING, SHUFFLE, EVALUATION = range(4)


@dataclass(frozen=True)
class Experience:
    """The rollouts of an iteration and what is learnt from them; the tensors are [B, R] and share the mask."""

    rollouts: list[Rollout]
    mask_BR: Tensor
    logprobs_BR: Tensor
    values_BR: Tensor
    advantages_BR: Tensor
    returns_BR: Tensor


def run(config: Config, run_dir: Path, stop: StopSignal) -> None:
    """Train from the last checkpoint, or from SFT, through `ppo.iterations`, and publish `final`.

    Raises PrerequisiteError when SFT, the reward model or the environment is missing, and
    StopRequested after a signal, with the state saved.
    """
    ppo, stage = config.ppo, StageDir(run_dir, "ppo")
    environment = StageDir(run_dir, "prepare").final()
    train = load_environment(environment, "train")
    valid = load_environment(environment, "valid")[: ppo.eval_posts]
    learner = build_learner(config, run_dir)
    if saved := from_first(stage.latest):
        load_learner(learner, saved[1])
    writes, tensorboard = learner.accelerator.is_main_process, config.runtime.tensorboard
    first = learner.iteration + 1 if saved else 0
    with (
        Metrics(stage.path, tensorboard=tensorboard, start_step=first, enabled=writes) as metrics,
        Progress(stage.path, "ppo", ppo.iterations, "iterations", done=learner.iteration, enabled=writes) as progress,
    ):
        if not saved:
            metrics.log(0, evaluate(learner, valid, stage.path))
        while learner.iteration < ppo.iterations:
            values = iterate(learner, train, stop)
            if values is None:
                save_learner(learner, stage)
                raise StopRequested("stopped on request, the state is saved; run the same command again to continue")
            last, best = learner.iteration == ppo.iterations, False
            if last or learner.iteration % ppo.eval_every_iterations == 0:
                held_out = evaluate(learner, valid, stage.path)
                best = is_best(learner, held_out)
                values |= held_out
            metrics.log(learner.iteration, values)
            progress.update(learner.iteration, reward=values["ppo/reward"], kl=values["ppo/kl"])
            if last or best or learner.iteration % ppo.save_every_iterations == 0:
                save_learner(learner, stage, final=last, best=best)
                if writes:
                    stage.prune(config.runtime.keep_checkpoints)


def iterate(learner: Learner, rows: list[EnvironmentRow], stop: StopSignal) -> dict[str, float] | None:
    """One iteration's steps 1 to 5, and its metrics; None when a signal came before anything was learnt."""
    watch = Stopwatch()
    rollouts = sample(learner, draw_prompts(learner, rows), watch, stop)
    if rollouts is None:
        return None
    experience, values = learn_from(learner, rollouts)
    with watch("train"):
        values |= optimise(learner, experience)
    learner.kl.update(values["ppo/kl"], learner.config.ppo.rollouts_per_iteration)
    learner.iteration += 1
    values |= {f"time/{phase}_seconds": seconds for phase, seconds in watch.seconds.items()}
    tokens = values["ppo/response_tokens"] * learner.config.ppo.rollouts_per_iteration
    return values | {"ppo/tokens_per_second": tokens / sum(watch.seconds.values())}


def draw_prompts(learner: Learner, rows: list[EnvironmentRow]) -> list[EnvironmentRow]:
    """This process's share of the next prompts, in an order shuffled anew each epoch, then by length."""
    config, count = learner.config, learner.config.ppo.rollouts_per_iteration
    drawn: list[EnvironmentRow] = []
    for place in range(learner.iteration * count, (learner.iteration + 1) * count):
        epoch, index = divmod(place, len(rows))
        if not drawn or index == 0:
            order = torch.randperm(len(rows), generator=generator(config.seed, PROMPTS, epoch)).tolist()
        drawn.append(rows[order[index]])
    # Prompts of like length share a batch, and each process gets as many of each length.
    drawn.sort(key=lambda row: (len(row.prompt_ids), row.id))
    return drawn[learner.accelerator.process_index :: learner.accelerator.num_processes]


def sample(learner: Learner, rows: list[EnvironmentRow], watch: Stopwatch, stop: StopSignal) -> list[Rollout] | None:
    """Rollouts in chunks; None when a signal came, since nothing has been learnt yet that could be lost."""
    config, rank = learner.config, learner.accelerator.process_index
    rollouts: list[Rollout] = []
    for start in range(0, len(rows), config.ppo.rollout_chunk):
        if agreed(stop.requested):
            return None
        rollouts += learner.collector.collect(
            rows[start : start + config.ppo.rollout_chunk],
            stream=generator(config.seed, SAMPLING, learner.iteration, rank, start, device=learner.device),
            watch=watch,
        )
    return rollouts


def learn_from(learner: Learner, rollouts: list[Rollout]) -> tuple[Experience, dict[str, float]]:
    """Step 3: scores and KL penalties become token rewards, advantages and returns."""
    ppo = learner.config.ppo
    logprobs_BR = stack([rollout.logprobs_R for rollout in rollouts])
    reference_BR = stack([rollout.reference_logprobs_R for rollout in rollouts])
    values_BR = stack([rollout.values_R for rollout in rollouts])
    mask_BR = stack([torch.ones_like(rollout.response_R, dtype=torch.bool) for rollout in rollouts])
    rewards_B = sequence_rewards(learner, rollouts).to(values_BR.device)

    token_rewards_BR = token_rewards(rewards_B, k1(logprobs_BR, reference_BR), mask_BR, kl_coef=learner.kl.coef)
    advantages_BR, returns_BR = gae(token_rewards_BR, values_BR, mask_BR, gamma=ppo.gamma, lam=ppo.lam)
    whitened_BR = whiten(advantages_BR, mask_BR, reduce=learner.sum_over_processes)

    # k3 of KL(policy || reference) on the policy's own samples; 0 for a masked column.
    kl_B = k3(reference_BR, logprobs_BR).sum(dim=1)
    unexplained, spread = (returns_BR - values_BR)[mask_BR].var(), returns_BR[mask_BR].var()
    lengths_B = mask_BR.sum(dim=1).float()
    values = {
        "ppo/reward": rewards_B.mean(),
        "ppo/score": torch.tensor([rollout.score for rollout in rollouts]).mean(),
        "ppo/kl": kl_B.mean(),
        "ppo/kl_coef": torch.tensor(learner.kl.coef),
        "ppo/entropy": torch.tensor([rollout.entropy for rollout in rollouts]).mean(),
        "ppo/explained_variance": 1 - unexplained / spread,
        "ppo/response_tokens": lengths_B.mean(),
        "ppo/ended": torch.tensor([float(rollout.ended) for rollout in rollouts]).mean(),
        "ppo/sampler_gap": torch.tensor([rollout.sampler_gap for rollout in rollouts]).max(),
    }
    experience = Experience(rollouts, mask_BR, logprobs_BR, values_BR, whitened_BR, returns_BR)
    return experience, learner.mean_values(values)


def sequence_rewards(learner: Learner, rollouts: list[Rollout]) -> Tensor:
    """One reward a rollout: the score against the reference's, clipped, scaled, less what a missing end costs."""
    ppo = learner.config.ppo
    score_B = torch.tensor([rollout.score for rollout in rollouts])
    ended_B = torch.tensor([rollout.ended for rollout in rollouts])
    if ppo.reward == "delta":
        score_B = score_B - torch.tensor([rollout.row.reference_score for rollout in rollouts])
    if ppo.missing_eos_score is not None:
        score_B = torch.where(ended_B, score_B, ppo.missing_eos_score)
    score_B = score_B - ppo.missing_eos_penalty * (~ended_B)
    if ppo.clip_score is not None:
        score_B = score_B.clamp(-ppo.clip_score, ppo.clip_score)
    if ppo.scale_score == "running":
        _, std = learner.moments.update(learner.accelerator.gather(score_B.to(learner.device)).cpu())
        score_B = score_B / std
    return score_B


def optimise(learner: Learner, experience: Experience) -> dict[str, float]:
    """Step 4: passes over the rollouts; ends early when the policy has moved further than `ppo.stop_kl`."""
    ppo, share = learner.config.ppo, learner.accelerator.num_processes
    size = ppo.minibatch_size // share
    seen: list[dict[str, float]] = []
    for epoch in range(ppo.inner_epochs):
        stream = generator(learner.config.seed, SHUFFLE, learner.iteration, epoch)
        order = torch.randperm(len(experience.rollouts), generator=stream)
        for start in range(0, len(order), size):
            values = optimise_minibatch(learner, experience, order[start : start + size])
            seen.append(values)
            if ppo.stop_kl is not None and values["ppo/approx_kl"] > ppo.stop_kl:
                logger.info("iteration=%d inner epochs end early at minibatch %d", learner.iteration, len(seen))
                return average(seen)
    return average(seen)


def optimise_minibatch(learner: Learner, experience: Experience, picked: Tensor) -> dict[str, float]:
    """One optimiser step; the gradient is that of the mean over all tokens of the minibatch on all processes."""
    ppo, accelerator = learner.config.ppo, learner.accelerator
    tokens = learner.sum_over_processes(experience.mask_BR[picked].sum().double())
    totals: dict[str, Tensor] = {}
    parts = picked.split(ppo.micro_batch_size)
    for part in parts:
        batch, trunk_BTH = minibatch([experience.rollouts[i] for i in part.tolist()], pad_id=learner.collector.pad_id)
        mask_BR = batch.response_mask_BR
        columns = slice(0, mask_BR.shape[1])
        with nullcontext() if part is parts[-1] else accelerator.no_sync(learner.model):
            output = learner.model(trunk_BTH, batch.ids_BT, batch.mask_BT, batch.response_start)
            policy, policy_stats = policy_loss(
                output.logprobs_BR,
                experience.logprobs_BR[part, columns],
                experience.advantages_BR[part, columns],
                mask_BR,
                clip=ppo.clip_ratio,
            )
            value, value_stats = value_loss(
                output.values_BR,
                experience.values_BR[part, columns],
                experience.returns_BR[part, columns],
                mask_BR,
                clip=ppo.clip_value,
            )
            share = mask_BR.sum() / tokens
            # Processes' gradients are averaged, so each counts its share times their number.
            accelerator.backward((policy + ppo.vf_coef * value) * share * accelerator.num_processes)
        stats = {
            "ppo/policy_loss": policy.detach(),
            "ppo/value_loss": value.detach(),
            "ppo/ratio": policy_stats["ratio"],
            "ppo/clip_fraction": policy_stats["clip_fraction"],
            "ppo/approx_kl": policy_stats["approx_kl"],
            "ppo/value_clip_fraction": value_stats["clip_fraction"],
        }
        totals = {key: totals.get(key, 0.0) + share * value for key, value in stats.items()}
    grad_norm = accelerator.clip_grad_norm_(learner.actor.trainable_parameters(), ppo.optimizer.max_grad_norm)
    # With float16, infinities are part of finding the loss scale: accelerate skips such a step.
    if accelerator.scaler is None and not torch.isfinite(grad_norm):
        raise RlhfError(
            f"the gradient of PPO iteration {learner.iteration} is not finite; the last checkpoint is good: "
            "try a lower ppo.optimizer.learning_rate"
        )
    values = learner.sum_values(totals)
    values["ppo/grad_norm"] = float(grad_norm)
    values["ppo/learning_rate"] = learner.optimizer.param_groups[0]["lr"]
    learner.optimizer.step()
    learner.schedule.step()
    learner.optimizer.zero_grad()
    return values


def evaluate(learner: Learner, rows: list[EnvironmentRow], directory: Path) -> dict[str, float]:
    """Step 6: summaries of held-out posts, sampled with the same chances each time, and a table of some."""
    config, accelerator = learner.config, learner.accelerator
    mine = sorted(rows, key=lambda row: (len(row.prompt_ids), row.id))[
        accelerator.process_index :: accelerator.num_processes
    ]
    shown: list[Rollout] = []
    sums = dict.fromkeys(("reward", "score", "kl", "response_tokens", "ended", "posts"), 0.0)
    for start in range(0, len(mine), config.ppo.rollout_chunk):
        rollouts = learner.collector.collect(
            mine[start : start + config.ppo.rollout_chunk],
            stream=generator(config.seed, EVALUATION, accelerator.process_index, start, device=learner.device),
            watch=Stopwatch(),
        )
        for rollout in rollouts:
            sums["reward"] += rollout.score - rollout.row.reference_score * (config.ppo.reward == "delta")
            sums["score"] += rollout.score
            sums["kl"] += float(k3(rollout.reference_logprobs_R, rollout.logprobs_R).sum())
            sums["response_tokens"] += len(rollout.response_R)
            sums["ended"] += rollout.ended
            sums["posts"] += 1
        shown += rollouts[: config.ppo.sample_table_posts - len(shown)]
    if accelerator.is_main_process:
        write_samples(learner, directory, shown)
    totals = learner.sum_values({key: torch.tensor(value) for key, value in sums.items()})
    return {f"ppo/eval_{key}": total / totals["posts"] for key, total in totals.items() if key != "posts"}


def write_samples(learner: Learner, directory: Path, rollouts: list[Rollout]) -> None:
    """A table of held-out posts, their summaries and scores, one JSON line each."""
    lines = []
    for rollout in rollouts:
        row = {
            "id": rollout.row.id,
            "prompt": learner.tokenizer.decode(rollout.row.prompt_ids),
            "summary": decode_response(learner.tokenizer, rollout.response_R.tolist()),
            "score": rollout.score,
            "reference_score": rollout.row.reference_score,
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text_atomically(directory / "samples" / f"step-{learner.iteration:08d}.jsonl", "".join(lines))


def is_best(learner: Learner, held_out: dict[str, float]) -> bool:
    """Whether this policy has the highest held-out reward of those within the KL budget."""
    reward = held_out["ppo/eval_reward"]
    if held_out["ppo/eval_kl"] > learner.config.ppo.kl_budget or reward <= learner.best_reward:
        return False
    learner.best_reward = reward
    return True


def average(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each key."""
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
