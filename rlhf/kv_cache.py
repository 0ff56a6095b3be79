"""A batch on its way through a causal LM, one row a sequence; rows join and leave between any two tokens.

Keys and values lie in buffers that stay where they are: a row is [heads, columns, head size] of each block. The
rows in use are the first ones, so that what the attention reads is a view and nothing is copied from step to step.
Prompts that join together are left-padded to one width; so every row has its own first and its own newest column.

Shapes: A rows in use, N rows that join, U distinct prompts among them, P prompt columns, T columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from rlhf.models import position_ids
from rlhf.row_buffers import COLUMNS_AT_ONCE, moves
from rlhf.sequences import left_pad


class Decoder:
    """Runs a model on at most `rows` sequences at a time; each pass gives the logits of every new token."""

    def __init__(self, model: PreTrainedModel, *, rows: int, pad_id: int) -> None:
        self._model = model
        self._pad_id = pad_id
        self._rows = rows
        self._cache = _RowCache(rows)
        self._starts_A = torch.empty(0, dtype=torch.long)
        self._ends_A = torch.empty(0, dtype=torch.long)
        self._check_attention()

    def __len__(self) -> int:
        """Rows in use."""
        return len(self._starts_A)

    def join(self, prompts: Sequence[Sequence[int]], *, room: int) -> Tensor:
        """Let these follow the rows in use, with columns for `room` tokens after each; a prompt that comes
        twice is computed once. Gives logits_NV of each one's first token, float32."""
        assert len(self) + len(prompts) <= self._rows, "more rows than the decoder has"
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        numbers = {prompt: number for number, prompt in enumerate(distinct)}
        source_N = torch.tensor([numbers[tuple(prompt)] for prompt in prompts])
        ids_UP, mask_UP = left_pad(distinct, self._pad_id)
        width = ids_UP.shape[1]
        self._check_window(width + room)
        device = self._model.device
        self._cache.prefill(first_row=len(self), source_N=source_N.to(device), columns=width + room)
        causal_PP = torch.ones(width, width, dtype=torch.bool).tril()
        seen_UPP = (causal_PP & mask_UP[:, None, :]).to(device)
        logits_UV = self._pass(ids_UP.to(device), seen_UPP, position_ids(mask_UP).to(device))
        starts_U = width - mask_UP.sum(dim=1)
        self._starts_A = torch.cat([self._starts_A, starts_U[source_N]])
        self._ends_A = torch.cat([self._ends_A, torch.full((len(prompts),), width)])
        return logits_UV[source_N.to(device)]

    def step(self, tokens_A: Tensor) -> Tensor:
        """Append a token to each row in use; gives logits_AV of the token after it, float32."""
        device = self._model.device
        width = int(self._ends_A.max()) + 1
        starts_A, ends_A = self._starts_A.to(device), self._ends_A.to(device)
        self._cache.decode(columns_A=ends_A, width=width)
        columns_T = torch.arange(width, device=device)
        seen_AT = (columns_T >= starts_A[:, None]) & (columns_T <= ends_A[:, None])
        logits_AV = self._pass(tokens_A.to(device)[:, None], seen_AT[:, None, :], (ends_A - starts_A)[:, None])
        self._ends_A = self._ends_A + 1
        return logits_AV

    def leave(self, rows: Sequence[int]) -> list[int]:
        """Take rows out; the last ones move into their places. Gives, for each row in use then, its place before."""
        order = moves(len(self), rows)
        for row, before in enumerate(order):
            if row != before:
                self._cache.move(before, row)
        # They may hold NaN, which would reach the next rows in their places even through a mask.
        self._cache.wipe(len(order), len(self))
        index = torch.tensor(order, dtype=torch.long)
        self._starts_A, self._ends_A = self._starts_A[index], self._ends_A[index]
        return order

    def _pass(self, ids: Tensor, seen: Tensor, positions: Tensor) -> Tensor:
        """seen [rows, queries, columns] says which columns each new token attends to."""
        mask = torch.zeros(seen.shape, dtype=self._model.dtype, device=seen.device)
        mask.masked_fill_(~seen, torch.finfo(self._model.dtype).min)
        output = self._model(
            input_ids=ids,
            attention_mask=mask[:, None],
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def _check_attention(self) -> None:
        kinds = set(getattr(self._model.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if kinds:
            raise ValueError(
                f"{type(self._model).__name__} has layers of {', '.join(kinds)}; choose another model.base"
            )

    def _check_window(self, columns: int) -> None:
        window = getattr(self._model.config, "sliding_window", None)
        if window is not None and columns > window:
            raise ValueError(f"{columns} tokens are more than the attention's window of {window}; shorten the prompts")


@dataclass(frozen=True)
class _Prefill:
    """New rows from first_row on; row n of them takes what was computed for source_N[n]."""

    first_row: int
    source_N: Tensor
    columns: int


@dataclass(frozen=True)
class _Decode:
    """One new token a row, at its own column; the attention sees `width` columns."""

    columns_A: Tensor
    width: int


class _RowCache(Cache):
    """What the model's blocks hand their keys and values to; the decoder says before each pass where they belong."""

    def __init__(self, rows: int) -> None:
        super().__init__(layers=[])
        self._rows = rows
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._target: _Prefill | _Decode | None = None

    def prefill(self, *, first_row: int, source_N: Tensor, columns: int) -> None:
        """The next pass brings whole prompts."""
        self._target = _Prefill(first_row, source_N, columns)

    def decode(self, *, columns_A: Tensor, width: int) -> None:
        """The next pass brings one token a row."""
        self._target = _Decode(columns_A, width)

    def move(self, source: int, target: int) -> None:
        """Copy a row over another."""
        for buffer in (*self._keys, *self._values):
            buffer[target] = buffer[source]

    def wipe(self, first: int, end: int) -> None:
        """Set rows to zero."""
        for buffer in (*self._keys, *self._values):
            buffer[first:end] = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a block's new keys and values, [rows, heads, new columns, head size]; gives all it attends to."""
        if layer_idx == len(self._keys):
            self._keys.append(self._empty(key_states))
            self._values.append(self._empty(value_states))
        target = self._target
        if isinstance(target, _Prefill):
            self._keys[layer_idx] = self._store_prompts(self._keys[layer_idx], key_states, target)
            self._values[layer_idx] = self._store_prompts(self._values[layer_idx], value_states, target)
            return key_states, value_states
        assert target is not None, "the decoder has not said where this belongs"
        return (
            _store_tokens(self._keys[layer_idx], key_states, target),
            _store_tokens(self._values[layer_idx], value_states, target),
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Not used: positions and masks are given to the model."""
        return 0

    def _empty(self, states: Tensor) -> Tensor:
        _, heads, _, size = states.shape
        return states.new_zeros(self._rows, heads, 0, size)

    def _store_prompts(self, buffer: Tensor, states: Tensor, target: _Prefill) -> Tensor:
        missing = target.columns - buffer.shape[2]
        if missing > 0:
            grown = -(-missing // COLUMNS_AT_ONCE) * COLUMNS_AT_ONCE
            buffer = torch.nn.functional.pad(buffer, (0, 0, 0, grown))
        end = target.first_row + len(target.source_N)
        buffer[target.first_row : end, :, : states.shape[2]] = states[target.source_N]
        return buffer


def _store_tokens(buffer: Tensor, states: Tensor, target: _Decode) -> Tensor:
    rows = len(target.columns_A)
    buffer[torch.arange(rows, device=buffer.device), :, target.columns_A] = states[:, :, 0]
    return buffer[:rows, :, : target.width]
