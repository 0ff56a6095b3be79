"""Rollouts scored while the next ones are written, where that is not done by the cores that write.

A service is asked, or a GPU computes, in a thread beside the stage's own. Processes agree with each other in the main
thread only, where the scores are waited for, so that all of them do so in the same order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from rlhf.remote_scorer import RemoteScorer, keep_trying
from rlhf.scoring import Scorer

Wait: TypeAlias = Callable[[], Tensor]
"""Gives scores_B, float32 on the CPU, once they are there; raises what scoring raised. For the main thread."""

Start: TypeAlias = Callable[[Sequence[Sequence[int]]], Wait]
"""Has sequences scored; scores that are not finite are passed on."""

LOOK_SECONDS = 1.0
"""Who waits for a service looks up so often, to show life and to hear of a wish to stop."""

Result = TypeVar("Result")


class Ahead:
    """A thread that does one thing after the other, in the order given, until its block ends.

    What has not begun then is dropped, what has is waited for; `ending` tells it to make haste. A thread has its own
    gradient mode and autocast: they are as at the start of a program, whatever the main thread has set.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._ending = threading.Event()

    def __enter__(self) -> Ahead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def ending(self) -> bool:
        """Whether nobody waits for results any more."""
        return self._ending.is_set()

    def submit(self, work: Callable[[], Tensor]) -> Future[Tensor]:
        """Line up; the result, or what was raised, is in the future."""
        return self._thread.submit(work)


@contextmanager
def scoring_ahead(scorer: Scorer | RemoteScorer, *, heed: Callable[[], None]) -> Iterator[Start]:
    """How rollouts are scored within the block: beside other work by a service or a GPU, at once by the CPU.

    All processes have to start, and to wait, equally often and in the same order. heed is for waits in vain: see
    `rlhf.remote_scorer.keep_trying`. Nothing is under way any more when the block has ended, however it ends.
    """
    if isinstance(scorer, Scorer) and scorer.device.type != "cuda":
        # The cores that would score are those that generate.
        yield partial(_at_once, scorer)
        return
    with Ahead() as ahead:
        if isinstance(scorer, RemoteScorer):
            yield partial(_by_service, scorer, ahead, heed)
        else:
            yield partial(_by_gpu, scorer, ahead)


def one_behind(begun: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """The result of each piece of work, asked for once the next piece has been begun."""
    before: Callable[[], Result] | None = None
    for finish in begun:
        if before is not None:
            yield before()
        before = finish
    if before is not None:
        yield before()


def _at_once(scorer: Scorer, sequences: Sequence[Sequence[int]]) -> Wait:
    scores_B = scorer.score(sequences, allow_nonfinite=True)
    return lambda: scores_B


def _by_service(
    scorer: RemoteScorer, ahead: Ahead, heed: Callable[[], None], sequences: Sequence[Sequence[int]]
) -> Wait:
    ask = partial(scorer.score, sequences, allow_nonfinite=True, stopped=ahead.ending)
    asked = [ahead.submit(ask)]

    def attempt() -> Tensor | None:
        if not asked:
            asked.append(ahead.submit(ask))
        # What was submitted before may try for long, and meanwhile this thread has to heed.
        if asked[0] in wait(asked, timeout=LOOK_SECONDS).not_done:
            return None
        return asked.pop().result()

    return partial(keep_trying, attempt, heed=heed)


def _by_gpu(scorer: Scorer, ahead: Ahead, sequences: Sequence[Sequence[int]]) -> Wait:
    stream = scorer.side_stream
    # What the main thread has launched on that GPU, such as the copy of the weights, comes first.
    before = torch.cuda.current_stream(scorer.device).record_event()

    def score() -> Tensor:
        # Only numbers leave the stream, once it is done: the scores come back on the CPU.
        with torch.cuda.stream(stream):
            stream.wait_event(before)
            return scorer.score(sequences, allow_nonfinite=True)

    return ahead.submit(score).result
