"""What the service tells Prometheus, under vLLM's names where there is one.

`model` is ppo, sft or reward. A caller's text is never in a label.

| metric | labels | what |
| --- | --- | --- |
| rlhf_num_requests_running | model | summaries being written, or texts being scored, now |
| rlhf_num_requests_waiting | model | work that waits for its turn now |
| rlhf_request_queue_time_seconds | model | time from being accepted to being started |
| rlhf_time_to_first_token_seconds | model | time from being accepted to the first token |
| rlhf_e2e_request_latency_seconds | route | time from a request's headers to the last of its answer |
| rlhf_prompt_tokens_total | model | tokens read |
| rlhf_generation_tokens_total | model | tokens written |
| rlhf_request_prompt_tokens | model | tokens read for one summary |
| rlhf_request_generation_tokens | model | tokens written for one summary: its length |
| rlhf_request_success_total | model, finished_reason | summaries finished: stop or length |
| rlhf_iteration_batch_size | model | summaries that got a token in one step |
| rlhf_scoring_batch_size | | texts that the reward model read at once |
| rlhf_reward | model | score of a summary that this policy wrote |
| rlhf_requests_refused_total | reason | errors told, by the last part of the problem's type |
| rlhf_requests_abandoned_total | | requests whose caller went away before the answer |
| rlhf_http_requests_total | route, status | answers; route is the template, status 499 an abandoned request |
| rlhf_model_info | model, run, stage, step, … | 1 for each model that is served |
| rlhf_reloads_total | result | reloads: changed, unchanged or failed |
| process_*, python_* | | memory, CPU time, open files, garbage collection |
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import (
    CONTENT_TYPE_PLAIN_0_0_4,
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from app.schemas import FinishReason, ModelInfo

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
REWARDS = (-10, -5, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 5, 10)
INFO_LABELS = ("model", "run", "stage", "step", "prompt_version", "parameters", "dtype", "device", "checksum", "engine")


class Metrics:
    """The numbers of one service, in a registry of its own. Every method may be called from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._running = self._gauge("num_requests_running", "Work in progress now.", "model")
        self._waiting = self._gauge("num_requests_waiting", "Work that waits for its turn now.", "model")
        self._queue_time = self._histogram("request_queue_time_seconds", "Time in the queue.", SECONDS, "model")
        self._first_token = self._histogram("time_to_first_token_seconds", "Time to first token.", SECONDS, "model")
        self._latency = self._histogram("e2e_request_latency_seconds", "Time of a request.", SECONDS, "route")
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens read.", "model")
        self._generation_tokens = self._counter("generation_tokens", "Tokens written.", "model")
        self._prompt_length = self._histogram("request_prompt_tokens", "Tokens read a summary.", TOKENS, "model")
        self._length = self._histogram("request_generation_tokens", "Tokens written a summary.", TOKENS, "model")
        self._success = self._counter("request_success", "Summaries finished.", "model", "finished_reason")
        self._step_rows = self._histogram("iteration_batch_size", "Summaries given a token in a step.", ROWS, "model")
        self._scored_rows = self._histogram("scoring_batch_size", "Texts that were scored at once.", ROWS)
        self._reward = self._histogram("reward", "Score of a summary that this policy wrote.", REWARDS, "model")
        self._refused = self._counter("requests_refused", "Errors told to callers.", "reason")
        self._abandoned = self._counter("requests_abandoned", "Requests whose caller went away.")
        self._http = self._counter("http_requests", "Answers.", "route", "status")
        self._info = self._gauge("model_info", "Models that are served.", *INFO_LABELS)
        self._served: set[tuple[str, ...]] = set()
        self._reloads = self._counter("reloads", "Reloads by what came of them.", "result")

    def _gauge(self, name: str, meaning: str, *labels: str) -> Gauge:
        return Gauge(f"rlhf_{name}", meaning, labels, registry=self.registry)

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(f"rlhf_{name}", meaning, labels, registry=self.registry)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"rlhf_{name}", meaning, labels, buckets=buckets, registry=self.registry)

    def set_running(self, model: str, count: int) -> None:
        """So many pieces of work are in progress now."""
        self._running.labels(model).set(count)

    def set_waiting(self, model: str, count: int) -> None:
        """So many pieces of work wait for their turn now."""
        self._waiting.labels(model).set(count)

    def left_queue(self, model: str, waited_seconds: float) -> None:
        """A piece of work was started after this time in the queue."""
        self._queue_time.labels(model).observe(waited_seconds)

    def first_token(self, model: str, seconds: float) -> None:
        """A summary got its first token this time after it was accepted."""
        self._first_token.labels(model).observe(seconds)

    def step(self, model: str, rows: int) -> None:
        """A step of the policy gave a token to each of so many summaries."""
        self._step_rows.labels(model).observe(rows)

    def summary_finished(self, model: str, reason: FinishReason, *, prompt_tokens: int, generation_tokens: int) -> None:
        """A policy finished a summary."""
        self._success.labels(model, reason).inc()
        self._prompt_tokens.labels(model).inc(prompt_tokens)
        self._prompt_length.labels(model).observe(prompt_tokens)
        self._generation_tokens.labels(model).inc(generation_tokens)
        self._length.labels(model).observe(generation_tokens)

    def batch_scored(self, rows: int, tokens: int) -> None:
        """The reward model read so many texts, of so many tokens together, at once."""
        self._scored_rows.observe(rows)
        self._prompt_tokens.labels("reward").inc(tokens)

    def summary_scored(self, model: str, score: float) -> None:
        """A summary that this policy wrote got this score."""
        self._reward.labels(model).observe(score)

    def refused(self, reason: str) -> None:
        """A caller was told a problem; reason is its kind's name."""
        self._refused.labels(reason).inc()

    def abandoned(self) -> None:
        """A caller went away before its answer was whole."""
        self._abandoned.inc()

    def answered(self, route: str, status: int, seconds: float) -> None:
        """A request ended; route is the path's template, never the path."""
        self._http.labels(route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def serving(self, models: Iterable[ModelInfo]) -> None:
        """These models, and no others, are served from now on."""
        before, self._served = self._served, {tuple(_info_values(model)) for model in models}
        for values in self._served:
            self._info.labels(*values).set(1)
        for values in before - self._served:
            self._info.remove(*values)

    def reloaded(self, result: str) -> None:
        """A reload ended: changed, unchanged or failed."""
        self._reloads.labels(result).inc()

    def render(self) -> bytes:
        """Everything in Prometheus' text format, whose content type is CONTENT_TYPE."""
        return generate_latest(self.registry)


def _info_values(model: ModelInfo) -> list[str]:
    told = {"model": model.id} | model.model_dump(exclude_none=True)
    return [str(told.get(label, "")) for label in INFO_LABELS]
