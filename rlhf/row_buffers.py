"""Keys and values of all blocks, in buffers that stay where they are: a row a sequence, filled from column 0 on.

Shapes: B rows, h heads, C columns, D head size, H hidden, A rows in use, N rows, U rows before repetition, T columns
that prompts fill.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from rlhf.bag_attention import BagStep, bags_are_fast
from rlhf.gptj import attend

COLUMNS_AT_ONCE = 64
"""A buffer grows to a multiple of this many columns, so that it seldom does."""


class Step(Protocol):
    """One more token for each of the rows in use: what the attention of all blocks has in common."""

    def append(self, layer: int, key_AhD: Tensor, value_AhD: Tensor) -> None:
        """Keep the new tokens' keys and values."""
        ...

    def mix(self, layer: int, query_AhD: Tensor) -> Tensor:
        """What the new tokens attend to, themselves included: [A, H]."""
        ...


class RowBuffers:
    """What the attention reads. It is made when the first keys come, on their device and in their precision.

    Columns that a row in use has not filled hold finite numbers, so that a mask hides them.
    """

    def __init__(self, *, layers: int, rows: int) -> None:
        self._layers, self._rows = layers, rows
        self.columns = 0
        # Of each block, [B, h, C, D]; where bags of embeddings are fast, keys lie as [B, h, D, C] behind that.
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._bags = False

    def reserve(self, columns: int) -> None:
        """Have at least this many columns; before anything is stored just as many, which lie closest together."""
        if not self._values:
            self.columns = max(columns, self.columns)
        elif columns > self.columns:
            self.columns = -(-columns // COLUMNS_AT_ONCE) * COLUMNS_AT_ONCE
            for buffers in (self._keys, self._values):
                for layer, buffer in enumerate(buffers):  # one at a time: only that one is there twice
                    buffers[layer] = self._empty(buffer, transposed=self._bags and buffers is self._keys)
                    _put(buffers[layer], buffer)

    def fill(self, layer: int, first: int, key_UhTD: Tensor, value_UhTD: Tensor) -> None:
        """Put prompts' keys and values into the rows from `first` on."""
        if not self._values:
            self._make(value_UhTD)
        rows = slice(first, first + len(value_UhTD))
        _put(self._keys[layer][rows], key_UhTD)
        _put(self._values[layer][rows], value_UhTD)

    def step(self, length_A: Tensor, columns: int) -> Step:
        """For a new token in column `length` of each of the first A rows, where the first `columns` are read."""
        if self._bags:
            keys = [key_BhCD.transpose(2, 3) for key_BhCD in self._keys]
            return BagStep(keys, self._values, length_A, columns)
        return FusedStep(self._keys, self._values, length_A, columns)

    def repeat(self, first: int, source_N: Tensor) -> None:
        """Let row first + n have what row first + source_N[n] has."""
        for buffer in (*self._keys, *self._values):
            buffer[first : first + len(source_N)] = buffer[first + source_N]

    def move(self, source: int, target: int) -> None:
        """Copy a row over another."""
        for buffer in (*self._keys, *self._values):
            buffer[target] = buffer[source]

    def _make(self, like_UhTD: Tensor) -> None:
        self._bags = bags_are_fast(like_UhTD)
        self._keys = [self._empty(like_UhTD, transposed=self._bags) for _ in range(self._layers)]
        self._values = [self._empty(like_UhTD) for _ in range(self._layers)]

    def _empty(self, like_UhTD: Tensor, *, transposed: bool = False) -> Tensor:
        heads, size = like_UhTD.shape[1], like_UhTD.shape[3]
        if transposed:
            return like_UhTD.new_empty(self._rows, heads, size, self.columns).transpose(2, 3)
        return like_UhTD.new_empty(self._rows, heads, self.columns, size)


def _put(rows_UhCD: Tensor, first_UhTD: Tensor) -> None:
    """Fill the first T columns of rows, the others with zeros."""
    columns = first_UhTD.shape[2]
    rows_UhCD[:, :, :columns] = first_UhTD
    rows_UhCD[:, :, columns:] = 0


class FusedStep:
    """By torch's fused attention: anywhere, in any precision."""

    def __init__(
        self, keys_BhCD: Sequence[Tensor], values_BhCD: Sequence[Tensor], length_A: Tensor, columns: int
    ) -> None:
        self._keys, self._values, self._columns = keys_BhCD, values_BhCD, columns
        heads, capacity = values_BhCD[0].shape[1:3]
        row_A1 = torch.arange(len(length_A), device=length_A.device)[:, None]
        head_h = torch.arange(heads, device=length_A.device)
        self._places = ((row_A1 * heads + head_h) * capacity + length_A[:, None]).flatten()
        beyond_AC = torch.arange(columns, device=length_A.device) > length_A[:, None]
        # As numbers to be added; torch would make such of booleans in each block.
        self._seen_A11C = values_BhCD[0].new_zeros(beyond_AC.shape).masked_fill_(beyond_AC, -torch.inf)[:, None, None]

    def append(self, layer: int, key_AhD: Tensor, value_AhD: Tensor) -> None:
        """Keep the new tokens' keys and values."""
        for buffer, new in ((self._keys[layer], key_AhD), (self._values[layer], value_AhD)):
            buffer.view(-1, buffer.shape[-1]).index_copy_(0, self._places, new.flatten(0, 1))

    def mix(self, layer: int, query_AhD: Tensor) -> Tensor:
        """What the new tokens attend to, themselves included: [A, H]."""
        both = self._keys[layer], self._values[layer]
        keys, values = (buffer[: len(query_AhD), :, : self._columns] for buffer in both)
        return attend(query_AhD[:, :, None], keys, values, seen=self._seen_A11C).flatten(1)


def moves(count: int, gone: Sequence[int]) -> list[int]:
    """Which of `count` rows stands in each place once some are gone; the last ones move into the free places."""
    order = list(range(count))
    for row in sorted(set(gone), reverse=True):
        last = order.pop()
        if row < len(order):
            order[row] = last
    return order
