"""One call of /score, and the scoring of token ids that every call needs."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Sequence
from concurrent.futures import Executor

from app.encoding import FieldErrors, encode_posts, encode_summary
from app.fair_queue import Job
from app.schemas import Score, ScoreAnswer, ScoreRequest
from app.served import ServedRun
from app.settings import Settings
from rlhf.prompt import EncodedPrompt


async def score_sequences(
    served: ServedRun, sequences: Sequence[Sequence[int]], *, call: Hashable, accepted: bool
) -> list[float]:
    """The reward model's score of each sequence, in order, in batches shared with all callers.

    accepted: they complete a call that was accepted before, and are not refused for want of room.
    """
    loop = asyncio.get_running_loop()
    jobs = [Job(call=call, ids=ids, cost=len(ids), outcome=loop.create_future()) for ids in sequences]
    try:
        served.scoring.submit(jobs, accepted=accepted)
        outcomes = await asyncio.gather(*(job.outcome for job in jobs))
    finally:
        for job in jobs:
            job.outcome.cancel()
    return [outcome.score for outcome in outcomes]


async def score(
    request: ScoreRequest, served: ServedRun, settings: Settings, tokenizing: Executor, *, request_id: str
) -> ScoreAnswer:
    """Scores in the order of the items. Raises ProblemError for items that are wrong or for which there is no room."""
    errors = FieldErrors()
    errors.check_count("items", len(request.items), settings.max_items)
    errors.check_timeout(request.timeout_seconds, settings.timeout_seconds)
    errors.raise_any()
    encode = asyncio.get_running_loop().run_in_executor(tokenizing, _encode, request, served, errors)
    posts, summaries, references = await encode
    errors.raise_any()

    sequences = [[*post.ids, *summary] for post, summary in zip(posts, summaries, strict=True)]
    compared = [index for index, ids in enumerate(references) if ids is not None]
    sequences += [[*posts[index].ids, *(references[index] or ())] for index in compared]
    scores = await score_sequences(served, sequences, call=object(), accepted=False)
    reference_scores = dict(zip(compared, scores[len(posts) :], strict=True))
    info = served.reward.info
    return ScoreAnswer(
        id=request_id,
        run=info.run,
        step=info.step,
        results=[
            _result(index, posts[index], len(summaries[index]), scores[index], reference_scores.get(index))
            for index in range(len(posts))
        ],
    )


def _encode(
    request: ScoreRequest, served: ServedRun, errors: FieldErrors
) -> tuple[list[EncodedPrompt], list[list[int]], list[list[int] | None]]:
    """Prompts, summaries and references as token ids; what does not fit is added to errors."""
    reward = served.reward
    posts = encode_posts(
        [item.post for item in request.items],
        reward.tokenizer,
        max_tokens=reward.info.max_prompt_tokens,
        truncation=request.truncation,
        field=lambda number: f"items.{number}.post",
        errors=errors,
    )

    def ids_of(text: str | None, index: int, name: str) -> list[int] | None:
        if text is None:
            return None
        room = None if reward.positions is None else reward.positions - len(posts[index].ids)
        return encode_summary(text, reward.tokenizer, max_tokens=room, field=f"items.{index}.{name}", errors=errors)

    summaries = [ids_of(item.summary, index, "summary") or [] for index, item in enumerate(request.items)]
    references = [ids_of(item.reference, index, "reference") for index, item in enumerate(request.items)]
    return posts, summaries, references


def _result(index: int, post: EncodedPrompt, summary_tokens: int, score: float, reference: float | None) -> Score:
    return Score(
        index=index,
        score=score,
        reference_score=reference,
        delta=None if reference is None else score - reference,
        prompt_tokens=len(post.ids),
        summary_tokens=summary_tokens,
        cut_tokens=post.cut_tokens,
    )
