"""Continuous batching by vLLM, as rlhf/slots.py has it by our own engine."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from rlhf.runtime import generator
from rlhf.sequences import check_sequences
from rlhf.slots import NextToken, Request
from rlhf.vllm_limits import MAX_TEMPERATURE
from rlhf.vllm_process import turn


@dataclass(frozen=True)
class StartedVllm:
    """vLLM at work: its module, its LLMEngine, and the model without weights, which says what can go in."""

    vllm: ModuleType
    llm: Any
    skeleton: PreTrainedModel
    device: torch.device
    eos_id: int


class VllmBatch:
    """Rows that vLLM is writing; they join and leave between any two steps."""

    def __init__(self, started: StartedVllm, *, slots: int) -> None:
        self._started = started
        self._slots = slots
        self._keys: set[int] = set()

    @property
    def room(self) -> int:
        """Rows that may join now."""
        return self._slots - len(self._keys)

    def add(self, requests: Mapping[int, Request]) -> list[NextToken]:
        """Let these join, at most `room`; the next step reads their prompts, so that no token comes yet.

        Raises ValueError for one that the model cannot take, and RuntimeError while another batch of the engine holds
        rows; none joins then.
        """
        assert len(requests) <= self.room, "more rows than the batch has room for"
        llm = self._started.llm
        for request in requests.values():
            self._check(request)
        if llm.get_num_unfinished_requests() != len(self._keys):
            raise RuntimeError("another batch of this engine holds rows; let it finish first")
        tokens_input = self._started.vllm.inputs.tokens_input
        for key, request in requests.items():
            llm.add_request(str(key), tokens_input(list(request.prompt)), self._parameters(request))
            self._keys.add(key)
        return []

    def step(self) -> list[NextToken]:
        """One more token for every row; rows that finish leave.

        A row has none yet when too many prompts came at once for its own to be read in this step.
        """
        return [new for new, _ in self.advance()]

    def advance(self) -> list[tuple[NextToken, float]]:
        """As `step`, each token with its log-probability."""
        if not self._keys:
            return []
        with turn(self._started.device):
            outputs = self._started.llm.step()
        news = []
        for output in outputs:
            response = output.outputs[0]
            for token, found in zip(response.token_ids, response.logprobs, strict=True):
                logprob = found[token].logprob
                finish = self._finish(token, logprob, last=output.finished)
                news.append((NextToken(int(output.request_id), token, finish), logprob))
        self._leave(news)
        return news

    def abort(self, keys: Collection[int]) -> None:
        """Forget these rows; keys that are not there are passed over."""
        gone = self._keys.intersection(keys)
        if gone:
            self._started.llm.abort_request([str(key) for key in gone])
            self._keys -= gone

    def _leave(self, news: Sequence[tuple[NextToken, float]]) -> None:
        self.abort([new.key for new, _ in news if new.finish == "failed"])  # vLLM would go on with these
        self._keys -= {new.key for new, _ in news if new.finish is not None}

    def _finish(self, token: int, logprob: float, *, last: bool) -> Literal["stop", "length", "failed"] | None:
        if not math.isfinite(logprob):
            return "failed"
        if token == self._started.eos_id:
            return "stop"
        return "length" if last else None

    def _check(self, request: Request) -> None:
        room, longest = request.sampling.max_new_tokens, self._started.llm.model_config.max_model_len
        check_sequences([request.prompt], self._started.skeleton, kind="prompt", room=room)
        if request.sampling.temperature > MAX_TEMPERATURE:
            raise ValueError(
                f"temperature={request.sampling.temperature} is above {MAX_TEMPERATURE}, the most that vLLM takes"
            )
        if len(request.prompt) + room > longest:
            raise ValueError(
                f"the prompt has {len(request.prompt)} tokens and {room} to generate, more than the {longest} that the "
                f"engine keeps memory for; cut it to {max(longest - room, 0)}"
            )

    def _parameters(self, request: Request) -> Any:
        vllm, sampling = self._started.vllm, request.sampling
        return vllm.SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_tokens=sampling.min_new_tokens,
            max_tokens=sampling.max_new_tokens,
            seed=generator(*request.seed).initial_seed(),
            ignore_eos=True,  # the model's own idea of EOS; ours is the one that stops
            stop_token_ids=[self._started.eos_id],
            logprobs=0,  # of the chosen token alone
            detokenize=False,
            output_kind=vllm.sampling_params.RequestOutputKind.DELTA,
        )
