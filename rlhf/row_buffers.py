"""Keys and values of all blocks, in buffers that stay where they are: a row a sequence, filled from column 0 on.

Shapes: L blocks, B rows, h heads, C columns, D head size, A rows in use, M tokens, N rows, U rows before repetition.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COLUMNS_AT_ONCE = 64
"""A buffer grows to a multiple of this many columns, so that it seldom does."""


class RowBuffers:
    """What the attention reads. It is made when the first keys come, on their device and in their precision.

    Columns that a row has not filled hold finite numbers, so that a mask hides them.
    """

    def __init__(self, *, layers: int, rows: int, heads: int) -> None:
        self._layers, self._rows, self._heads = layers, rows, heads
        self.columns = 0
        self._buffers: list[Tensor] = []  # of each block the keys, then the values: [2, B, h, C, D]
        self._flat: list[Tensor] = []  # the same as [2 · B · h · C, D]
        self._zero = self._hidden = torch.empty(())

    def reserve(self, columns: int) -> None:
        """Have at least this many columns; before anything is stored just as many, which lie closest together."""
        if not self._buffers:
            self.columns = max(columns, self.columns)
        elif columns > self.columns:
            grown = -(-columns // COLUMNS_AT_ONCE) * COLUMNS_AT_ONCE
            for layer, buffer in enumerate(self._buffers):  # one at a time: only that one is there twice
                self._use(layer, torch.nn.functional.pad(buffer, (0, 0, 0, grown - self.columns)))
            self.columns = grown

    def places(self, row_M: Tensor, column_M: Tensor) -> Tensor:
        """Where keys and values of tokens in these rows and columns belong, for `store`: M · 2 · h numbers."""
        # Keys and values of all rows follow each other, so a value lies `rows` rows after its key.
        key_h = torch.arange(self._heads, device=row_M.device) * self.columns
        both_2h = torch.cat([key_h, key_h + self._rows * self._heads * self.columns])
        return ((row_M * (self._heads * self.columns) + column_M)[:, None] + both_2h).flatten()

    def seen(self, length_A: Tensor, columns: int) -> Tensor:
        """For a query in column `length` of each row: 0 where it attends, minus infinity elsewhere, [A, 1, 1, C]."""
        column_C = torch.arange(columns, device=length_A.device)
        return torch.where(column_C <= length_A[:, None], self._zero, self._hidden)[:, None, None]

    def store(self, layer: int, places: Tensor, key_value: Tensor) -> None:
        """Put a block's new keys and values, [M, 2 · h · D], where they belong."""
        size = key_value.shape[-1] // (2 * self._heads)
        if not self._buffers:
            self._make(key_value, size)
        self._flat[layer].index_copy_(0, places, key_value.view(-1, size))

    def read(self, first: int, end: int, columns: int) -> tuple[Tensor, ...]:
        """Of some rows and the first columns, each block's keys, then its values; no copies.

        Each is [rows, h, columns, D].
        """
        return tuple(part for buffer in self._buffers for part in buffer[:, first:end, :, :columns].unbind(0))

    def repeat(self, first: int, source_N: Tensor) -> None:
        """Let row first + n have what row first + source_N[n] has."""
        for buffer in self._buffers:
            buffer[:, first : first + len(source_N)] = buffer[:, first + source_N]

    def move(self, source: int, target: int, *, columns: int) -> None:
        """Copy what a row has in the first columns over another."""
        for buffer in self._buffers:
            buffer[:, target, :, :columns] = buffer[:, source, :, :columns]

    def wipe(self, rows: Sequence[int]) -> None:
        """Set rows to zero."""
        for buffer in self._buffers:
            buffer[:, list(rows)] = 0

    def _make(self, like: Tensor, size: int) -> None:
        shape = 2, self._rows, self._heads, self.columns, size
        self._buffers = [like.new_zeros(shape) for _ in range(self._layers)]
        self._flat = [buffer.view(-1, size) for buffer in self._buffers]
        self._zero, self._hidden = like.new_tensor(0.0), like.new_tensor(-torch.inf)

    def _use(self, layer: int, buffer: Tensor) -> None:
        self._buffers[layer], self._flat[layer] = buffer, buffer.view(-1, buffer.shape[-1])


def moves(count: int, gone: Sequence[int]) -> list[int]:
    """Which of `count` rows stands in each place once some are gone; the last ones move into the free places."""
    order = list(range(count))
    for row in sorted(set(gone), reverse=True):
        last = order.pop()
        if row < len(order):
            order[row] = last
    return order
