"""A loaded run with its queues, for as long as any call needs it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from app.batching import GenerationQueue, QueueLimits, ScoringQueue
from app.loading import LoadedPolicy, LoadedReward, LoadedRun
from app.metrics import Metrics
from app.schemas import ModelInfo
from app.settings import Settings
from app.tracing import Tracer


@dataclass(frozen=True)
class ServedPolicy:
    """A policy and the queue before it."""

    loaded: LoadedPolicy
    queue: GenerationQueue


class ServedRun:
    """Everything of one run, from its checkpoints to its threads. A call holds on to the one that it began with."""

    def __init__(self, run: LoadedRun, settings: Settings, metrics: Metrics, tracer: Tracer) -> None:
        """Call it in the event loop."""
        self.run = run
        self.metrics = metrics
        self.tracer = tracer
        self.policies: Mapping[str, ServedPolicy] = {
            name: ServedPolicy(
                policy,
                GenerationQueue(
                    policy.engine.open(settings.slots),
                    model=name,
                    limits=_limits(settings, settings.prefill_tokens),
                    metrics=metrics,
                ),
            )
            for name, policy in run.policies.items()
        }
        self.reward: LoadedReward = run.reward
        self.scoring = ScoringQueue(
            run.reward.scorer, model="reward", limits=_limits(settings, settings.score_batch_tokens), metrics=metrics
        )
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def models(self) -> list[ModelInfo]:
        """What is served."""
        return [*(policy.info for policy in self.run.policies.values()), self.reward.info]

    @contextmanager
    def held(self) -> Iterator[ServedRun]:
        """Keep everything running for the time of a call."""
        self._calls += 1
        self._idle.clear()
        try:
            yield self
        finally:
            self._calls -= 1
            if self._calls == 0:
                self._idle.set()

    def trouble(self, *, stall_seconds: float) -> str | None:
        """What is wrong with the threads, if anything."""
        workers = [policy.queue.worker for policy in self.policies.values()] + [self.scoring.worker]
        return next((found for worker in workers if (found := worker.trouble(stall_seconds=stall_seconds))), None)

    async def idle(self) -> None:
        """Wait until no call is being answered."""
        await self._idle.wait()

    async def close(self) -> None:
        """End the threads, each after the step that it is in, and give the memory back."""
        for policy in self.policies.values():
            await asyncio.to_thread(policy.queue.close)
            await asyncio.to_thread(policy.loaded.engine.close)
        await asyncio.to_thread(self.scoring.close)


def _limits(settings: Settings, batch_tokens: int) -> QueueLimits:
    return QueueLimits(tokens=settings.queue_tokens, seconds=settings.max_wait_seconds, batch_tokens=batch_tokens)
