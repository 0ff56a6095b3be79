"""PPO: align the SFT policy with the reward model, on a KL leash.

One iteration, as in Ziegler et al. 2019, Stiennon et al. 2020 and Huang et al. 2024:

 1. draw prompts
 2. sample a summary for each; score it; evaluate it under policy, reference and value function
 3. scores and KL penalties become token rewards, then advantages and returns
 4. passes over the rollouts in minibatches: clipped policy loss, clipped value loss
 5. move the KL coefficient
 6. now and then: summarise held-out posts, keep the best policy, save

Shapes: B rollouts, R response columns, N tokens, K response tokens of a batch.
"""

from __future__ import annotations

import logging
import math
import time
from typing import NoReturn

import torch
from torch import Tensor

from rlhf.actor_critic import ActorOutput
from rlhf.advantages import gae, k1, k3, token_rewards, whiten
from rlhf.checkpoint import StageDir
from rlhf.config import Config
from rlhf.environment import EnvironmentRow, load_environment
from rlhf.errors import StopRequested
from rlhf.exchange import exchange, share_out
from rlhf.experience import Experience, InHand
from rlhf.losses import policy_loss, value_loss
from rlhf.overlap import scoring_ahead
from rlhf.oversight import Interrupted, Oversight
from rlhf.ppo_evaluation import evaluate, is_best
from rlhf.ppo_setup import PROMPTS, SAMPLING, SHUFFLE, Learner, build_learner, chances
from rlhf.ppo_state import load_learner, snapshot
from rlhf.rollout import Rollout, minibatch, stack
from rlhf.runtime import from_first, generator, wait_for_all
from rlhf.saver import Saver
from rlhf.stopping import StopSignal
from rlhf.telemetry import Metrics, Progress, Stopwatch
from rlhf.training_state import load_schedule
from rlhf.trlx.train import run as run_trlx
from rlhf.watchdog import Watchdog

logger = logging.getLogger(__name__)

SHOWN = ("reward", "kl")


def run(config: Config, stage: StageDir, stop: StopSignal) -> None:
    """Train from the last checkpoint, or from SFT, through `ppo.iterations`, and publish `final`.

    Raises PrerequisiteError when SFT, the reward model or the environment is missing, StopRequested after a signal,
    with the state saved, and DivergedError when the numbers went wrong for good.
    """
    if config.ppo.engine == "trlx":
        run_trlx(config, stage, stop)
        return
    environment = StageDir(stage.run_dir, "prepare").final()
    train = load_environment(environment, "train")
    valid = load_environment(environment, "valid")[: config.ppo.eval_posts]
    saved = from_first(stage.latest)
    learner = build_learner(config, stage, start=saved[1] if saved else None, stopped=lambda: stop.requested)
    if saved:
        load_learner(learner, saved[1], train)
    writes, done = learner.accelerator.is_main_process, learner.iteration
    first = done if learner.unlogged is not None else done + 1
    with (
        stop.deferred(),
        Watchdog(config.runtime.hang_after_seconds) as watchdog,
        Metrics(stage, tensorboard=config.runtime.tensorboard, start_step=first, enabled=writes) as metrics,
        Progress(stage, config.ppo.iterations, "iterations", done=done, enabled=writes) as progress,
        Saver(stage, keep=config.runtime.keep_checkpoints, metrics=metrics) as saver,
    ):
        try:
            train_to_end(learner, train, valid, metrics, progress, saver, Oversight(stop, watchdog))
        except Interrupted:
            leave(learner, saver)
        finally:
            learner.close()
    wait_for_all()


def train_to_end(
    learner: Learner,
    train: list[EnvironmentRow],
    valid: list[EnvironmentRow],
    metrics: Metrics,
    progress: Progress,
    saver: Saver,
    oversight: Oversight,
) -> None:
    """Iterate, and after each iteration look at the policy, log and save."""
    ppo = learner.config.ppo
    while True:
        if (values := learner.unlogged) is not None:
            iteration, last, best = learner.iteration, learner.iteration == ppo.iterations, False
            if last or iteration % ppo.eval_every_iterations == 0:
                held_out = evaluate(learner, valid, oversight)
                best = iteration > 0 and is_best(learner, held_out)
                values = values | held_out
            metrics.log(iteration, values)
            learner.unlogged = None
            progress.update(iteration, **{key: values[f"ppo/{key}"] for key in SHOWN if f"ppo/{key}" in values})
            due = best or (iteration > 0 and iteration % ppo.save_every_iterations == 0)
            if last or (due and learner.health.is_well):
                save(learner, saver, final=last, best=best)
        if learner.iteration == ppo.iterations:
            return
        iterate(learner, train, oversight)


def iterate(learner: Learner, rows: list[EnvironmentRow], oversight: Oversight) -> None:
    """One iteration's steps 1 to 5, or what is left of one in hand; its metrics wait in `learner.unlogged`."""
    watch = Stopwatch()
    if learner.in_hand is None:
        rollouts = sample(learner, draw_prompts(learner, rows), watch, oversight)
        if ids := [rollout.row.id for rollout in rollouts if not is_sound(rollout)]:
            skip_iteration(learner, {}, "a score or a log-probability of the rollouts is not finite", ids)
            return
        experience, values = learn_from(learner, rollouts)
        if not values["ppo/kl"] <= learner.config.ppo.max_kl:
            reason = f"the rollouts' KL to SFT is {values['ppo/kl']:.4g} nats, over ppo.max_kl"
            skip_iteration(learner, values, reason, [rollout.row.id for rollout in rollouts])
            return
        learner.in_hand = InHand(experience, values | times(watch))
    watch = Stopwatch()
    with watch("train"):
        optimise(learner, learner.in_hand, oversight)
    values = learner.in_hand.values | average(learner.in_hand.seen) | times(watch)
    tokens = values["ppo/response_tokens"] * learner.config.ppo.rollouts_per_iteration
    spent = sum(seconds for key, seconds in values.items() if key.startswith("time/"))
    values |= {"ppo/tokens_per_second": tokens / spent, "time/save_seconds": learner.save_seconds}
    learner.kl.update(values["ppo/kl"], learner.config.ppo.rollouts_per_iteration)
    learner.iteration, learner.in_hand, learner.save_seconds = learner.iteration + 1, None, 0.0
    learner.unlogged = values


def skip_iteration(learner: Learner, values: dict[str, float], reason: str, ids: list[str]) -> None:
    """Learn nothing from an iteration's rollouts. Raises DivergedError when too many in a row were such."""
    learner.health.skip(learner.iteration + 1, reason, ids)
    learner.iteration += 1
    learner.unlogged = values | {"ppo/skipped": 1.0}


def draw_prompts(learner: Learner, rows: list[EnvironmentRow]) -> list[EnvironmentRow]:
    """The next prompts, in an order shuffled anew each epoch, then by length, so that those of a batch are alike."""
    config, count = learner.config, learner.config.ppo.rollouts_per_iteration
    drawn: list[EnvironmentRow] = []
    for place in range(learner.iteration * count, (learner.iteration + 1) * count):
        epoch, index = divmod(place, len(rows))
        if not drawn or index == 0:
            order = torch.randperm(len(rows), generator=generator(config.seed, PROMPTS, epoch)).tolist()
        drawn.append(rows[order[index]])
    return sorted(drawn, key=lambda row: (len(row.prompt_ids), row.id))


def sample(learner: Learner, rows: list[EnvironmentRow], watch: Stopwatch, oversight: Oversight) -> list[Rollout]:
    """A rollout for each prompt: each process samples and scores its share in chunks, then all have all.

    Stopped in between they are dropped: the same chances give the same ones again.
    """
    ppo, accelerator = learner.config.ppo, learner.accelerator
    places = share_out(len(rows), rank=accelerator.process_index, processes=accelerator.num_processes)
    with learner.strategy.whole(), scoring_ahead(learner.scorer, heed=oversight.heed) as score:
        with watch("rollout"):
            learner.sampler_ready()
        begun = []
        for start in range(0, len(places), ppo.rollout_chunk):
            oversight.heed()
            chunk = places[start : start + ppo.rollout_chunk]
            chances_BR = chances(learner, chunk, SAMPLING, learner.iteration)
            rows_of_chunk = [rows[place] for place in chunk]
            begun.append(learner.collector.begin(rows_of_chunk, chances_BR=chances_BR, score=score, watch=watch))
        mine = [rollout for finish in begun for rollout in finish()]
    with watch("experience"):
        return exchange(mine, rows, learner.device)


def is_sound(rollout: Rollout) -> bool:
    """Whether every number of a rollout is finite; one with another must not reach the policy."""
    tensors = (rollout.logprobs_R, rollout.reference_logprobs_R, rollout.values_R)
    return math.isfinite(rollout.score) and all(bool(tensor.isfinite().all()) for tensor in tensors)


def learn_from(learner: Learner, rollouts: list[Rollout]) -> tuple[Experience, dict[str, float]]:
    """Step 3: scores and KL penalties become token rewards, advantages and returns.

    Every process computes the same from all rollouts; what is decided by are the first one's numbers.
    """
    ppo = learner.config.ppo
    logprobs_BR = stack([rollout.logprobs_R for rollout in rollouts])
    reference_BR = stack([rollout.reference_logprobs_R for rollout in rollouts])
    values_BR = stack([rollout.values_R for rollout in rollouts])
    mask_BR = stack([torch.ones_like(rollout.response_R, dtype=torch.bool) for rollout in rollouts])
    rewards_B = sequence_rewards(learner, rollouts).to(values_BR.device)

    token_rewards_BR = token_rewards(rewards_B, k1(logprobs_BR, reference_BR), mask_BR, kl_coef=learner.kl.coef)
    advantages_BR, returns_BR = gae(token_rewards_BR, values_BR, mask_BR, gamma=ppo.gamma, lam=ppo.lam)
    whitened_BR = whiten(advantages_BR, mask_BR)

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
    numbers = from_first(lambda: {key: float(value) for key, value in values.items()})
    return Experience(rollouts, whitened_BR, returns_BR), numbers


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
        _, std = learner.moments.update(score_B)
        score_B = score_B / std
    return score_B


def optimise(learner: Learner, in_hand: InHand, oversight: Oversight) -> None:
    """Step 4: passes over the rollouts; ends early when the policy has moved further than `ppo.stop_kl`."""
    ppo, experience = learner.config.ppo, in_hand.experience
    for picked in minibatches(learner)[in_hand.done :]:
        oversight.heed()
        values = optimise_minibatch(learner, experience, picked)
        in_hand.done += 1
        if values is None:
            continue
        in_hand.seen.append(values)
        if ppo.stop_kl is not None and values["ppo/approx_kl"] > ppo.stop_kl:
            logger.info("iteration=%d inner epochs end early at minibatch %d", learner.iteration, in_hand.done)
            return


def minibatches(learner: Learner) -> list[Tensor]:
    """The rollouts, by number, of each minibatch of all inner epochs, shuffled anew in each epoch."""
    ppo = learner.config.ppo
    order: list[Tensor] = []
    for epoch in range(ppo.inner_epochs):
        stream = generator(learner.config.seed, SHUFFLE, learner.iteration, epoch)
        order += torch.randperm(ppo.rollouts_per_iteration, generator=stream).split(ppo.minibatch_size)
    return order


def optimise_minibatch(learner: Learner, experience: Experience, picked: Tensor) -> dict[str, float] | None:
    """One optimiser step; the gradient is that of the mean over all tokens of the minibatch, shared by all processes.

    Its metrics; None when a number went wrong, so that the step was skipped.
    """
    ppo, accelerator, strategy = learner.config.ppo, learner.accelerator, learner.strategy
    tokens = experience.mask_BR[picked].sum().double()
    totals: dict[str, Tensor] = {}
    # In the rollouts' order, by length: the parts are of like length, so that their attention has little padding.
    mine = picked[accelerator.process_index :: accelerator.num_processes].sort().values
    parts = mine.split(ppo.micro_batch_size)
    for part in parts:
        batch, trunk_NH = minibatch([experience.rollouts[i] for i in part.tolist()])
        mask_BR = batch.response_mask_SR
        columns = slice(0, mask_BR.shape[1])
        with strategy.micro_batch(last=part is parts[-1]):
            output = ActorOutput(*strategy.model(trunk_NH, batch.packed, batch.tokens_K))
            policy, policy_stats = policy_loss(
                output.logprobs_SR,
                experience.logprobs_BR[part, columns],
                experience.advantages_BR[part, columns],
                mask_BR,
                clip=ppo.clip_ratio,
            )
            value, value_stats = value_loss(
                output.values_SR,
                experience.values_BR[part, columns],
                experience.returns_BR[part, columns],
                mask_BR,
                clip=ppo.clip_value,
            )
            share = mask_BR.sum() / tokens
            # Processes' gradients are averaged, so each counts its share times their number.
            strategy.backward((policy + ppo.vf_coef * value) * share * accelerator.num_processes)
        stats = {
            "ppo/policy_loss": policy.detach(),
            "ppo/value_loss": value.detach(),
            "ppo/ratio": policy_stats["ratio"],
            "ppo/clip_fraction": policy_stats["clip_fraction"],
            "ppo/approx_kl": policy_stats["approx_kl"],
            "ppo/value_clip_fraction": value_stats["clip_fraction"],
        }
        totals = {key: totals.get(key, 0.0) + share * value for key, value in stats.items()}
    return take_step(learner, totals, ids=[experience.rollouts[i].row.id for i in picked.tolist()])


def take_step(learner: Learner, totals: dict[str, Tensor], *, ids: list[str]) -> dict[str, float] | None:
    """Clip the gradients and move the weights, unless the gradients are not finite; ids are the minibatch's posts."""
    rate = float(learner.schedule.get_last_lr()[0])
    stepped = learner.strategy.step(clip=learner.config.ppo.optimizer.max_grad_norm)
    values = learner.sum_values(totals)
    # By its number: torch's own step() complains where the optimiser's was skipped.
    load_schedule(learner.schedule, learner.schedule.last_epoch + 1)
    if stepped.taken:
        learner.health.fine()
        return values | {"ppo/grad_norm": stepped.grad_norm, "ppo/learning_rate": rate}
    if stepped.wrong is not None:
        learner.health.skip(learner.iteration + 1, stepped.wrong, ids)
    return None


def save(learner: Learner, saver: Saver, *, final: bool = False, best: bool = False) -> None:
    """Publish the state as it is now, in the background; `learner.save_seconds` tells how long training stood still."""
    started = time.monotonic()
    saver.wait()
    saver.save(learner.iteration, snapshot(learner), final=final, best=best)
    learner.saved_at, learner.save_seconds = learner.place, time.monotonic() - started


def leave(learner: Learner, saver: Saver) -> NoReturn:
    """Save what is not saved yet, except between bad steps, and raise StopRequested."""
    if learner.place != learner.saved_at and learner.health.is_well:
        save(learner, saver)
    saver.wait()
    wait_for_all()
    raise StopRequested("stopped on request, the state is saved; run the same command again to continue")


def times(watch: Stopwatch) -> dict[str, float]:
    """Seconds by phase, as metrics."""
    return {f"time/{phase}_seconds": seconds for phase, seconds in watch.seconds.items()}


def average(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each key; nothing of nothing."""
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]} if rows else {}
