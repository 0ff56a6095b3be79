"""One call of /summarize: candidates are written, scored once a post has all of them, and the best one is given."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Sequence
from concurrent.futures import Executor
from typing import Any

from app.encoding import FieldErrors, encode_posts
from app.fair_queue import Job, Outcome
from app.incremental_text import IncrementalText
from app.problems import ProblemError
from app.schemas import Candidate, DoneEvent, SummarizeAnswer, SummarizeRequest, Summary, TokenEvent
from app.scores import score_sequences
from app.served import ServedRun
from app.settings import Settings
from rlhf.prompt import EncodedPrompt, decode_response
from rlhf.sampling import Sampling

Hear = Callable[[TokenEvent], None]


class SummarizeCall:
    """The posts of one request on their way; nothing of it is left once it has been answered or given up."""

    def __init__(
        self, request: SummarizeRequest, served: ServedRun, *, sampling: Sampling, posts: Sequence[EncodedPrompt]
    ) -> None:
        self.seed = secrets.randbelow(2**32) if request.seed is None else request.seed
        self._request = request
        self._served = served
        self._policy = served.policies[request.model]
        self._sampling = sampling
        self._posts = posts
        self._jobs: list[list[Job]] = []

    @classmethod
    async def begin(
        cls,
        request: SummarizeRequest,
        served: ServedRun,
        settings: Settings,
        tokenizing: Executor,
        *,
        hear: Hear | None = None,
    ) -> SummarizeCall:
        """Judge the request, tokenise its posts and line them up.

        hear is told of every piece of text as it is written. Raises ProblemError for a request that is wrong or for
        which there is no room; nothing has begun then.
        """
        sampling = _sampling(request, served, settings)
        policy = served.policies[request.model].loaded
        errors = FieldErrors()

        def encode() -> list[EncodedPrompt]:
            fits = policy.max_prompt_tokens
            if policy.positions is not None:
                fits = min(fits, policy.positions - sampling.max_new_tokens)
            return encode_posts(
                request.posts,
                policy.tokenizer,
                max_tokens=fits,
                truncation=request.truncation,
                field=lambda number: f"posts.{number}",
                errors=errors,
            )

        with served.tracer.span("tokenize", {"posts": len(request.posts)}):
            posts = await asyncio.get_running_loop().run_in_executor(tokenizing, encode)
        errors.raise_any()
        call = cls(request, served, sampling=sampling, posts=posts)
        call._submit(hear)
        return call

    async def answer(self, request_id: str) -> SummarizeAnswer:
        """All summaries, in the order of the posts."""
        results = await _all([self._summary(index) for index in range(len(self._posts))])
        return SummarizeAnswer(**self.done(request_id).model_dump(), results=results)

    def done(self, request_id: str) -> DoneEvent:
        """What is said once for all posts."""
        info = self._policy.loaded.info
        return DoneEvent(id=request_id, model=self._request.model, run=info.run, step=info.step, seed=self.seed)

    async def summaries(self) -> AsyncIterator[Summary]:
        """Each summary as soon as it is done."""
        tasks = [asyncio.ensure_future(self._summary(index)) for index in range(len(self._posts))]
        try:
            for task in asyncio.as_completed(tasks):
                yield await task
        finally:
            for pending in tasks:
                pending.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def abandon(self) -> None:
        """Give up: what still waits or runs frees its place."""
        for job in (job for jobs in self._jobs for job in jobs):
            if not job.outcome.cancel() and not job.outcome.cancelled():
                job.outcome.exception()  # nobody else may ask for it, and asyncio complains of errors nobody saw

    def _submit(self, hear: Hear | None) -> None:
        loop, call = asyncio.get_running_loop(), object()
        for index, post in enumerate(self._posts):
            jobs = []
            for number in range(self._request.best_of):
                job = Job(
                    call=call,
                    ids=post.ids,
                    cost=len(post.ids) + self._sampling.max_new_tokens,
                    outcome=loop.create_future(),
                    sampling=self._sampling,
                    seed=(self.seed, number),
                )
                if hear is not None:
                    self._listen(job, index, number, hear)
                jobs.append(job)
            self._jobs.append(jobs)
        everything = [job for jobs in self._jobs for job in jobs]
        try:
            self._policy.queue.submit(everything)
        except ProblemError:
            self.abandon()
            raise

    def _listen(self, job: Job, index: int, number: int, hear: Hear) -> None:
        text = IncrementalText(self._policy.loaded.tokenizer)

        def on_end(outcome: asyncio.Future[Outcome]) -> None:
            if not outcome.cancelled():
                say(text.rest())

        def say(piece: str) -> None:
            if piece:
                hear(TokenEvent(index=index, candidate=number, text=piece))

        job.on_token = lambda token: say(text.add(token))
        job.outcome.add_done_callback(on_end)  # called before whoever awaits the outcome goes on

    async def _summary(self, index: int) -> Summary:
        post, request, jobs = self._posts[index], self._request, self._jobs[index]
        outcomes = await _all([self._written(post, job) for job in jobs])
        scores = await self._scores(post, outcomes, call=jobs[0].call)
        candidates = [self._candidate(post, *pair) for pair in zip(outcomes, scores, strict=True)]
        ranked = sorted(candidates, key=lambda candidate: -(candidate.score or 0.0))
        if not request.return_scores:
            ranked = [candidate.model_copy(update={"score": None}) for candidate in ranked]
        return Summary(
            **ranked[0].model_dump(),
            index=index,
            prompt_tokens=len(post.ids),
            cut_tokens=post.cut_tokens,
            candidates=ranked if request.return_candidates else None,
        )

    async def _written(self, post: EncodedPrompt, job: Job) -> Outcome:
        with self._served.tracer.span("generate", {"model": self._request.model, "prompt_tokens": len(post.ids)}):
            return await job.outcome

    async def _scores(
        self, post: EncodedPrompt, outcomes: Sequence[Outcome], *, call: Hashable
    ) -> Sequence[float | None]:
        """The score of each candidate of a post, together, so that the prompt is read once; None if nobody asks."""
        if not self._request.return_scores and self._request.best_of == 1:
            return [None] * len(outcomes)
        sequences = [[*post.ids, *outcome.tokens] for outcome in outcomes]
        with self._served.tracer.span("score", {"candidates": len(outcomes)}):
            scores = await score_sequences(self._served, sequences, call=call, accepted=True)
        for score in scores:
            self._served.metrics.summary_scored(self._request.model, score)
        return scores

    def _candidate(self, post: EncodedPrompt, outcome: Outcome, score: float | None) -> Candidate:
        finish, tokens = outcome.finish, len(outcome.tokens)
        self._served.metrics.summary_finished(
            self._request.model, finish, prompt_tokens=len(post.ids), generation_tokens=tokens
        )
        return Candidate(
            summary=decode_response(self._policy.loaded.tokenizer, outcome.tokens),
            score=score,
            finish_reason=finish,
            completion_tokens=tokens,
        )


def _sampling(request: SummarizeRequest, served: ServedRun, settings: Settings) -> Sampling:
    """How tokens are chosen. Raises ProblemError naming the field that this service cannot do."""
    errors = FieldErrors()
    if request.model not in served.policies:
        errors.add("model", f"{request.model} is not served here; choose from {', '.join(served.policies)}")
        errors.raise_any()
    most = served.policies[request.model].loaded.max_new_tokens
    errors.check_count("posts", len(request.posts), settings.max_posts)
    if request.best_of > settings.max_best_of:
        errors.add("best_of", f"{request.best_of} is more than {settings.max_best_of}")
    if request.best_of > 1 and request.temperature == 0:
        errors.add("temperature", "greedy candidates are all the same; with best_of above 1 it must be above 0")
    if request.max_new_tokens is not None and request.max_new_tokens > most:
        errors.add("max_new_tokens", f"{request.max_new_tokens} is more than {most}, for which the policy was trained")
    errors.check_timeout(request.timeout_seconds, settings.timeout_seconds)
    errors.raise_any()
    drawn = 1.0 if request.best_of > 1 else 0.0
    return Sampling(
        max_new_tokens=request.max_new_tokens or most,
        temperature=drawn if request.temperature is None else request.temperature,
        top_p=request.top_p,
    )


async def _all(work: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """The results in order; the first failure cancels the rest."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
