"""One call of /score, and the scoring of token ids that every call needs."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Hashable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from app.encoding import FieldErrors, check_token_ids, encode_posts, encode_summary
from app.fair_queue import Job, Outcome
from app.problems import SCORE_NOT_FINITE, ProblemError
from app.schemas import Score, ScoreAnswer, ScoreItem, ScoreRequest, TokenItem
from app.served import ServedRun
from app.settings import Settings
from rlhf.prompt import EncodedPrompt


async def score_sequences(
    served: ServedRun,
    sequences: Sequence[Sequence[int]],
    *,
    call: Hashable,
    accepted: bool,
    allow_nonfinite: bool = False,
) -> list[float]:
    """The reward model's score of each sequence, in order, in batches shared with all callers.

    accepted: they complete a call that was accepted before, and are not refused for want of room. allow_nonfinite:
    a score that is no number is NaN; else it ends the call with a ProblemError.
    """
    loop = asyncio.get_running_loop()
    jobs = [Job(call=call, ids=ids, cost=len(ids), outcome=loop.create_future()) for ids in sequences]
    try:
        served.scoring.submit(jobs, accepted=accepted)
        outcomes = await asyncio.gather(*(job.outcome for job in jobs), return_exceptions=allow_nonfinite)
    finally:
        for job in jobs:
            job.outcome.cancel()
    return [_score_in(outcome) for outcome in outcomes]


def _score_in(outcome: Outcome | BaseException) -> float:
    if isinstance(outcome, ProblemError) and outcome.kind is SCORE_NOT_FINITE:
        return math.nan
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome.score


@dataclass(frozen=True)
class Encoded:
    """An item as token ids. Of a summary in tokens the prompt's and the summary's share are not known."""

    sequence: list[int]
    reference: list[int] | None = None
    post: EncodedPrompt | None = None

    def result(self, index: int, score: float, reference: float | None) -> Score:
        """What the caller is told. Raises ProblemError for a text whose score is no number."""
        told = [score] if reference is None else [score, reference]
        if self.post is not None and not all(map(math.isfinite, told)):
            raise ProblemError(SCORE_NOT_FINITE, f"items.{index}: the reward model's score is not finite")
        return Score(
            index=index,
            score=score if math.isfinite(score) else None,
            reference_score=reference,
            delta=None if reference is None else score - reference,
            prompt_tokens=None if self.post is None else len(self.post.ids),
            summary_tokens=None if self.post is None else len(self.sequence) - len(self.post.ids),
            cut_tokens=0 if self.post is None else self.post.cut_tokens,
        )


async def score(
    request: ScoreRequest, served: ServedRun, settings: Settings, tokenizing: Executor, *, request_id: str
) -> ScoreAnswer:
    """Scores in the order of the items. Raises ProblemError for items that are wrong or for which there is no room."""
    errors = FieldErrors()
    errors.check_count("items", len(request.items), settings.max_items)
    errors.check_timeout(request.timeout_seconds, settings.timeout_seconds)
    errors.raise_any()
    encode = asyncio.get_running_loop().run_in_executor(tokenizing, _encode, request, served, errors)
    items = await encode
    errors.raise_any()

    # A reference right after its summary: near each other in the queue, they are read with one prompt.
    sequences = [ids for item in items for ids in (item.sequence, item.reference) if ids is not None]
    in_tokens = any(item.post is None for item in items)
    scores = iter(await score_sequences(served, sequences, call=object(), accepted=False, allow_nonfinite=in_tokens))
    info = served.reward.info
    return ScoreAnswer(
        id=request_id,
        run=info.run,
        step=info.step,
        checksum=info.checksum,
        results=[
            item.result(index, next(scores), None if item.reference is None else next(scores))
            for index, item in enumerate(items)
        ],
    )


def _encode(request: ScoreRequest, served: ServedRun, errors: FieldErrors) -> list[Encoded]:
    """Every item as token ids; what does not fit is added to errors."""
    items: list[Encoded] = []
    for index, item in enumerate(request.items):
        if isinstance(item, TokenItem):
            items.append(_checked(item, index, served, errors))
        else:
            items.append(_encode_text(item, index, request, served, errors))
    return items


def _checked(item: TokenItem, index: int, served: ServedRun, errors: FieldErrors) -> Encoded:
    reward, field = served.reward, f"items.{index}.token_ids"
    check_token_ids(
        item.token_ids, vocabulary=reward.vocabulary, max_tokens=reward.positions, field=field, errors=errors
    )
    return Encoded(item.token_ids)


def _encode_text(item: ScoreItem, index: int, request: ScoreRequest, served: ServedRun, errors: FieldErrors) -> Encoded:
    """Prompt, summary and reference as token ids."""
    reward = served.reward
    [post] = encode_posts(
        [item.post],
        reward.tokenizer,
        max_tokens=reward.info.max_prompt_tokens,
        truncation=request.truncation,
        field=lambda _: f"items.{index}.post",
        errors=errors,
    )
    room = None if reward.positions is None else reward.positions - len(post.ids)

    def joined(text: str, name: str) -> list[int]:
        field = f"items.{index}.{name}"
        return [*post.ids, *encode_summary(text, reward.tokenizer, max_tokens=room, field=field, errors=errors)]

    reference = None if item.reference is None else joined(item.reference, "reference")
    return Encoded(joined(item.summary, "summary"), reference, post)
