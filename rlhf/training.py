"""The loop of SFT and of the reward model's training, from the first step to the published model.

 1. a line of metrics that is due, with its evaluation
 2. asked to stop? Save and leave
 3. the micro-batches of one optimiser step: forward, backward
 4. the optimiser's step, unless the numbers are wrong
 5. what is due now: a line, an evaluation, a checkpoint

The step's number alone says which examples come (`collate.LengthGroupedSampler`), so that nothing of the data's
order has to be saved, and the same ones come on any number of processes. A step that is skipped uses up its batch;
the learning rate moves with the steps taken.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from rlhf.checkpoint import StageDir
from rlhf.collate import LengthGroupedSampler, micro_batches
from rlhf.config import Config
from rlhf.errors import StopRequested
from rlhf.health import Health
from rlhf.oversight import Oversight
from rlhf.processes import is_first_process
from rlhf.runtime import wait_for_all
from rlhf.saver import Saver
from rlhf.stopping import StopSignal
from rlhf.telemetry import Metrics, Progress
from rlhf.training_checkpoint import load_training, publish_final, save_training
from rlhf.training_setup import Learner, Plan, Session, Task, Window, build_learner
from rlhf.watchdog import Watchdog

logger = logging.getLogger(__name__)

Start = tuple[int, Path] | None
"""The step and the directory of the checkpoint to go on from; None at the beginning."""


@dataclass(frozen=True)
class Step:
    """What an optimiser step came to, over all processes. wrong says why it was skipped, if it was."""

    loss: float
    tokens: int
    grad_norm: float
    learning_rate: float
    seconds: float
    wrong: str | None


def train(
    task: Task,
    plan: Plan,
    accelerator: Accelerator,
    *,
    config: Config,
    stage: StageDir,
    tokenizer: PreTrainedTokenizerBase,
    start: Start,
    stop: StopSignal,
) -> None:
    """Train, going on from `start`, whose model the task holds, to the last step; evaluate and publish `final`.

    Raises StopRequested, with the state saved, when asked to stop, and DivergedError when the numbers go wrong.
    """
    runtime, writes = config.runtime, is_first_process()
    health = Health(stage, tolerate=runtime.max_bad_steps)
    learner = build_learner(task, accelerator, plan, health, precision=runtime.precision)
    if start:
        load_training(learner, start[1])
    position = learner.position
    first_line = position.step + (position.due is None)  # a line that is due is written again
    with (
        stop.deferred(),
        Metrics(stage, tensorboard=runtime.tensorboard, start_step=first_line, enabled=writes) as metrics,
        Progress(stage, plan.total_steps, "steps", done=position.step, enabled=writes) as progress,
        Saver(stage, keep=runtime.keep_checkpoints, metrics=metrics) as saver,
        Watchdog(runtime.hang_after_seconds) as watchdog,
    ):
        oversight = Oversight(stop, watchdog)
        session = Session(task, learner, tokenizer, stage, runtime, metrics, progress, saver, oversight)
        measured = train_to_end(session, seed=config.seed)
        saver.wait()  # the last step's save reads the model's config, which a stage may change now
        with learner.strategy.whole(), learner.strategy.autocast():
            numbers = task.finish(measured, session.interrupted)
        watchdog.beat()
        if numbers is None:
            leave(session)
        else:
            publish_final(session, numbers)


def train_to_end(session: Session, *, seed: int) -> dict[str, float]:
    """The loop; returns the last evaluation."""
    task, learner, position = session.task, session.learner, session.learner.position
    section, total = task.section, learner.plan.total_steps
    lengths = [example.length for example in task.examples]
    sampler = LengthGroupedSampler(lengths, batch_size=section.batch_size, seed=seed)
    order: list[int] = []
    save_due = False
    while True:
        # 1. A line of metrics that is due, with its evaluation
        measured: dict[str, float] = {}
        if position.due is not None:
            if position.evaluation_due:
                measured = evaluate(session)
            session.metrics.log(position.step, position.due | measured)
        if position.step == total:
            return measured
        position.due, position.evaluation_due = None, False

        # 2. Asked to stop? Save and leave
        if session.interrupted():
            leave(session)

        # 3. and 4. One optimiser step
        epoch, number = divmod(position.step, learner.plan.epoch_steps)
        if not order or number == 0:
            sampler.epoch = epoch
            order = list(sampler)
        batch = order[number * section.batch_size : (number + 1) * section.batch_size]
        parts = micro_batches(batch, size=section.micro_batch_size, processes=learner.processes)
        step = optimise(session, parts[learner.rank :: learner.processes])
        position.step += 1
        record(session, step, batch)

        # 5. What is due now: a line and an evaluation, which the next round writes, a checkpoint
        position.evaluation_due = position.step % section.eval_every_steps == 0 or position.step == total
        position.due = due_line(session, step)
        save_due |= position.step % section.save_every_steps == 0 or position.step == total
        if save_due and learner.health.is_well:
            save(session)
            save_due = False


def optimise(session: Session, parts: Sequence[Sequence[int]]) -> Step:
    """One optimiser step on this process's micro-batches, given as indices of examples.

    An empty one is made up for by the first example, which then does not count: all processes take part alike.
    """
    task, learner, started = session.task, session.learner, time.monotonic()
    device = learner.accelerator.device
    batches = [task.collate([task.examples[index] for index in part or [0]]).to(device) for part in parts]
    counts = [(batch.counted, batch.tokens) if part else (0, 0) for part, batch in zip(parts, batches, strict=True)]
    items, tokens = learner.total(torch.tensor(counts).sum(dim=0)).tolist()
    loss = torch.zeros((), device=device)
    learner.network.train()
    for number, (part, batch) in enumerate(zip(parts, batches, strict=True), start=1):
        with learner.strategy.micro_batch(last=number == len(parts)):
            share = task.loss(learner.strategy.model, batch) * bool(part) / items
            # Gradients are averaged over processes, but this is already a share of the whole.
            learner.strategy.backward(share * learner.processes)
        loss += share.detach()
        session.oversight.watchdog.beat()
    whole = float(learner.total(loss))
    rate = float(learner.schedule.get_last_lr()[0])
    grad_norm, wrong = update(learner, whole, clip=task.section.optimizer.max_grad_norm)
    return Step(whole, tokens, grad_norm, rate, time.monotonic() - started, wrong)


def update(learner: Learner, loss: float, *, clip: float) -> tuple[float, str | None]:
    """Take the optimiser's step; the norm of the gradients, and why the step was skipped, if it was.

    All that is looked at is the same on all processes.
    """
    wrong = None if math.isfinite(loss) else f"the loss is {loss}"
    stepped = learner.strategy.step(clip=clip, wrong=wrong)
    if stepped.taken:
        learner.schedule.step()
    return stepped.grad_norm, stepped.wrong


def record(session: Session, step: Step, indices: Sequence[int]) -> None:
    """Add a step to the window of the next line; a skipped one is noted with the ids of its batch."""
    position, health = session.learner.position, session.learner.health
    session.progress.update(position.step)
    if step.wrong is not None:
        examples = session.task.examples
        health.skip(position.step, step.wrong, [examples[index].id for index in indices])
        return
    health.fine()
    window = position.window
    window.steps += 1
    window.loss += step.loss
    window.tokens += step.tokens
    window.seconds += step.seconds


def due_line(session: Session, step: Step) -> dict[str, float] | None:
    """The numbers of the steps since the last line, when it is time for one; none but the evaluation's: empty."""
    position, name = session.learner.position, session.stage.stage
    window, last = position.window, position.step == session.learner.plan.total_steps
    time_for_one = position.step == 1 or last or position.step % session.runtime.log_every_steps == 0
    if not time_for_one or not window.steps:
        return {} if position.evaluation_due else None
    position.window = Window()
    loss = window.loss / window.steps
    session.progress.update(position.step, loss=loss)
    return {
        f"{name}/loss": loss,
        f"{name}/grad_norm": step.grad_norm,
        f"{name}/learning_rate": step.learning_rate,
        f"{name}/tokens_per_second": window.tokens / max(window.seconds, 1e-9),
        "time/save_seconds": window.save_seconds,
    }


def evaluate(session: Session) -> dict[str, float]:
    """Measure on held-out data. Raises StopRequested, with the state saved, when asked to stop meanwhile."""
    session.learner.network.eval()
    with session.learner.strategy.whole(), session.learner.strategy.autocast():
        measured = session.task.evaluate(session.interrupted)
    if measured is None:
        leave(session)
    facts = " ".join(f"{key.rpartition('/')[2]}={value:.4g}" for key, value in measured.items())
    logger.info("evaluated stage=%s step=%d %s", session.stage.stage, session.learner.position.step, facts)
    return measured


def save(session: Session) -> None:
    """Save the state; the next line of metrics says how long training stood still."""
    started = time.monotonic()
    save_training(session)
    session.learner.position.window.save_seconds += time.monotonic() - started
    session.oversight.watchdog.beat()


def leave(session: Session) -> NoReturn:
    """Save the state, unless that has been done, and raise StopRequested."""
    learner, total = session.learner, session.learner.plan.total_steps
    if learner.position.step > learner.saved_step:
        save(session)
    session.saver.wait()
    wait_for_all()  # a launcher ends the others when one has left
    if learner.saved_step == 0:
        raise StopRequested("stopped on request before the first step: run the same command again")
    raise StopRequested(
        f"stopped on request; step {learner.saved_step} of {total} is saved: run the same command again to continue"
    )
