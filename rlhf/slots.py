"""Continuous batching: rows join and leave a running batch between any two tokens.

Shapes: A rows in use, N rows that join, R response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.decoding import open_decoder
from rlhf.runtime import generator
from rlhf.sampling import Sampling, choose_tokens
from rlhf.sequences import check_sequences


@dataclass(frozen=True)
class Request:
    """A prompt to be continued once.

    seed names a random stream of the request's own, so that what it samples depends on nothing beside it.
    """

    prompt: Sequence[int]
    sampling: Sampling
    seed: tuple[int, ...]


@dataclass(frozen=True)
class NextToken:
    """One more token of a row.

    finish comes with the row's last token: `stop` when it is EOS, `length` when no more are wanted, `failed` when
    the model's logits are not finite; the token then means nothing.
    """

    key: int
    token: int
    finish: Literal["stop", "length", "failed"] | None


class RunningBatch(Protocol):
    """Rows being written at the same time, each under a key that the caller chose."""

    @property
    def room(self) -> int:
        """Rows that may join now."""
        ...

    def add(self, requests: Mapping[int, Request]) -> list[NextToken]:
        """Let these join, at most `room`; gives the tokens that came with that, if any.

        Raises ValueError for one that the model cannot take; none joins then.
        """
        ...

    def step(self) -> list[NextToken]:
        """One more token for every row; rows that finish leave."""
        ...

    def abort(self, keys: Collection[int]) -> None:
        """Forget these rows; keys that are not there are passed over."""
        ...


@dataclass
class _Row:
    key: int
    sampling: Sampling
    chances: list[float]
    written: int = 0


class SlotBatch:
    """The built-in engine's running batch, on the model's device and in its precision."""

    def __init__(self, model: PreTrainedModel, *, slots: int, eos_id: int, pad_id: int) -> None:
        self._model = model
        self._slots = slots
        self._eos_id = eos_id
        self._decoder = open_decoder(model, rows=slots, pad_id=pad_id)
        self._rows: list[_Row] = []
        self._tokens_A = torch.empty(0, dtype=torch.long, device=model.device)

    @property
    def room(self) -> int:
        """Rows that may join now."""
        return self._slots - len(self._rows)

    @torch.inference_mode()
    def add(self, requests: Mapping[int, Request]) -> list[NextToken]:
        """Read the prompts in one pass, each distinct one once, and give their first tokens."""
        for request in requests.values():
            check_sequences([request.prompt], self._model, kind="prompt", room=request.sampling.max_new_tokens)
        rows = [_Row(key, request.sampling, _chances(request)) for key, request in requests.items()]
        room = max(row.sampling.max_new_tokens for row in rows)
        logits_NV = self._decoder.join([request.prompt for request in requests.values()], room=room)
        tokens_N = self._choose(rows, logits_NV)
        self._rows += rows
        self._tokens_A = torch.cat([self._tokens_A, tokens_N])
        return self._advance(rows, tokens_N, logits_NV)

    @torch.inference_mode()
    def step(self) -> list[NextToken]:
        """One more token for every row; rows that finish leave."""
        if not self._rows:
            return []
        logits_AV = self._decoder.step(self._tokens_A)
        self._tokens_A = self._choose(self._rows, logits_AV)
        return self._advance(self._rows, self._tokens_A, logits_AV)

    @torch.inference_mode()
    def abort(self, keys: Collection[int]) -> None:
        """Forget these rows; keys that are not there are passed over."""
        self._remove(keys)

    def _remove(self, keys: Collection[int]) -> None:
        gone = [number for number, row in enumerate(self._rows) if row.key in keys]
        if gone:
            order = self._decoder.leave(gone)
            self._rows = [self._rows[number] for number in order]
            self._tokens_A = self._tokens_A[order]

    def _advance(self, rows: Sequence[_Row], tokens_A: Tensor, logits_AV: Tensor) -> list[NextToken]:
        """What the rows gained; those that finish with it leave."""
        sound = logits_AV.isfinite().all(dim=1).tolist()
        news = []
        for row, token, finite in zip(rows, tokens_A.tolist(), sound, strict=True):
            row.written += 1
            news.append(NextToken(row.key, token, self._finish(row, token) if finite else "failed"))
        self._remove({new.key for new in news if new.finish is not None})
        return news

    def _finish(self, row: _Row, token: int) -> Literal["stop", "length"] | None:
        if token == self._eos_id:
            return "stop"
        return "length" if row.written == row.sampling.max_new_tokens else None

    def _choose(self, rows: Sequence[_Row], logits_AV: Tensor) -> Tensor:
        """The next token of each row; rows that are sampled alike are sampled together."""
        kinds = _alike(rows)
        if len(kinds) == 1:
            return self._choose_alike(rows, logits_AV)
        tokens_A = torch.empty(len(rows), dtype=torch.long, device=logits_AV.device)
        for numbers in kinds:
            tokens_A[numbers] = self._choose_alike([rows[number] for number in numbers], logits_AV[numbers])
        return tokens_A

    def _choose_alike(self, rows: Sequence[_Row], logits_AV: Tensor) -> Tensor:
        first = rows[0]
        chances = [row.chances[row.written] for row in rows]
        chances_A = torch.tensor(chances, dtype=torch.float64, device=logits_AV.device)
        blocked = self._eos_id if first.written < first.sampling.min_new_tokens else None
        tokens_A, _ = choose_tokens(logits_AV, first.sampling, chances_A, blocked=blocked)
        return tokens_A


def _chances(request: Request) -> list[float]:
    """One uniform number a token, drawn beforehand."""
    count = request.sampling.max_new_tokens
    chances: list[float] = torch.rand(count, generator=generator(*request.seed), dtype=torch.float64).tolist()
    return chances


def _alike(rows: Sequence[_Row]) -> list[list[int]]:
    """Numbers of rows, grouped by how their next token is chosen."""

    def kind(number: int) -> tuple[float, float, int, bool]:
        row, sampling = rows[number], rows[number].sampling
        return sampling.temperature, sampling.top_p, sampling.top_k, row.written < sampling.min_new_tokens

    return [list(group) for _, group in groupby(sorted(range(len(rows)), key=kind), key=kind)]
