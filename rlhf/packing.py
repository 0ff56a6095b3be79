"""Token sequences on their way through a model one after another, without padding.

Norms, linear layers and MLPs see each token once and nothing else. Only the attention wants sequences side by side:
it gets a grid of rows, padded on the right. Sequences that begin alike can share a row, in which the common beginning
stands once. What is read of a sequence are its last tokens, the kept ones; the rest need not leave the last block.

Shapes: S sequences, B rows of the grid, T its columns, N tokens, K kept tokens, Q most kept tokens of a row,
R most kept tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Grid:
    """Where M entries lie side by side: entry m in place row · columns + column of a grid padded on the right."""

    places_M: Tensor
    rows: int
    columns: int

    @property
    def is_full(self) -> bool:
        """Whether there is no padding."""
        return len(self.places_M) == self.rows * self.columns

    def spread(self, entries: Tensor) -> Tensor:
        """[M, …] to [rows, columns, …], 0 where nothing lies. Has gradients."""
        if not self.is_full:
            empty = entries.new_zeros(self.rows * self.columns, *entries.shape[1:])
            entries = empty.index_copy_(0, self.places_M, entries)
        return entries.unflatten(0, (self.rows, self.columns))

    def gather(self, spread: Tensor) -> Tensor:
        """[rows, columns, …] back to [M, …]. Has gradients."""
        flat = spread.flatten(0, 1)
        return flat if self.is_full else flat.index_select(0, self.places_M)

    def to(self, device: torch.device | str) -> Grid:
        """On another device."""
        return replace(self, places_M=self.places_M.to(device, non_blocking=True))


@dataclass(frozen=True)
class Kept:
    """The tokens of which the final hidden state is read, sequence by sequence.

    index_K are their numbers among the N tokens, counts how many each sequence has. by_sequence is the grid of S rows
    and R columns, queries that of the attention in the last block, B rows and Q columns.
    seen_B1QT is True where a kept token attends to a column of its row.
    """

    index_K: Tensor
    counts: tuple[int, ...]
    by_sequence: Grid
    queries: Grid
    seen_B1QT: Tensor

    def to(self, device: torch.device | str) -> Kept:
        """On another device."""
        return replace(
            self,
            index_K=self.index_K.to(device, non_blocking=True),
            by_sequence=self.by_sequence.to(device),
            queries=self.queries.to(device),
            seen_B1QT=self.seen_B1QT.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class Packed:
    """Sequences for one pass through a model; made by `pack` and `pack_groups`.

    tokens is the attention's grid, B rows and T columns. seen_B1TT is True where a column (the last but one
    dimension) attends to another of its row; None stands for all up to itself. kept is None when all tokens are read.
    spans tells for each sequence which of the N tokens it is made of: its row's beginning, and its own.
    """

    ids_N: Tensor
    positions_N: Tensor
    tokens: Grid
    seen_B1TT: Tensor | None
    kept: Kept | None
    spans: tuple[tuple[range, range], ...]

    def to(self, device: torch.device | str) -> Packed:
        """On another device."""
        return replace(
            self,
            ids_N=self.ids_N.to(device, non_blocking=True),
            positions_N=self.positions_N.to(device, non_blocking=True),
            tokens=self.tokens.to(device),
            seen_B1TT=None if self.seen_B1TT is None else self.seen_B1TT.to(device, non_blocking=True),
            kept=None if self.kept is None else self.kept.to(device),
        )

    def whole(self) -> Packed:
        """The same, with all tokens read, in the order of ids_N."""
        return replace(self, kept=None)

    def pick(self, entries: Tensor) -> Tensor:
        """Of [N, …] those of the kept tokens, [K, …]. Has gradients."""
        return entries if self.kept is None else entries.index_select(0, self.kept.index_K)

    def per_sequence(self, values: Tensor) -> Tensor:
        """Values of the kept tokens, [K, …], as [S, R, …], 0 where a sequence has fewer. Has gradients."""
        assert self.kept is not None, "tokens that several sequences share belong to none of them"
        return self.kept.by_sequence.spread(values)

    def kept_mask(self) -> Tensor:
        """True where `per_sequence` has a value: bool [S, R]."""
        assert self.kept is not None, "as above"
        return self.per_sequence(torch.ones_like(self.kept.index_K, dtype=torch.bool))


def pack(sequences: Sequence[Sequence[int]], *, keep: int | Sequence[int] | None) -> Packed:
    """Each sequence in a row of its own, on the CPU.

    keep is how many tokens at the end of each are read: one number for all, or one each; None reads all.
    """
    return _pack([(sequence, ()) for sequence in sequences], keep)


def pack_groups(
    beginnings: Sequence[Sequence[int]],
    endings: Sequence[Sequence[Sequence[int]]],
    *,
    keep: int | Sequence[int] | None,
) -> Packed:
    """Each beginning in a row with all its endings, on the CPU: sequence by sequence a beginning and one ending.

    The beginning is computed once, and no ending sees another. keep counts tokens at the end of each sequence, as in
    `pack`, and is at most an ending's length.
    """
    return _pack(list(zip(beginnings, endings, strict=True)), keep)


def _pack(rows: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], keep: int | Sequence[int] | None) -> Packed:
    lengths = [[len(beginning), *map(len, endings)] for beginning, endings in rows]
    widths = [sum(parts) for parts in lengths]
    starts = [0, *accumulate(widths)]
    ids_N = np.concatenate(
        [np.asarray(part, np.int64) for beginning, endings in rows for part in (beginning, *endings)]
    )
    columns_N = np.concatenate([np.arange(width) for width in widths])
    row_N = np.repeat(np.arange(len(rows)), widths)
    shape = len(rows), max(widths)
    spans = tuple(span for start, row in zip(starts, lengths, strict=False) for span in _spans(start, row))
    seen_B1TT = _seen(lengths, shape[1]) if any(len(row) > 2 for row in lengths) else None
    return Packed(
        ids_N=torch.from_numpy(ids_N),
        positions_N=torch.from_numpy(np.concatenate([_positions(row) for row in lengths])),
        tokens=Grid(torch.from_numpy(row_N * shape[1] + columns_N), *shape),
        seen_B1TT=seen_B1TT,
        kept=None if keep is None else _kept(spans, keep, row_N, columns_N, shape, seen_B1TT),
        spans=spans,
    )


def _spans(start: int, parts: Sequence[int]) -> list[tuple[range, range]]:
    """Of a row of tokens from `start` on: for each sequence the range of its beginning and that of its ending."""
    beginning, *endings = parts
    shared = range(start, start + beginning)
    if not endings:
        return [(range(start, start), shared)]
    ends = accumulate(endings, initial=shared.stop)
    return [(shared, range(end, end + length)) for end, length in zip(ends, endings, strict=False)]


def _positions(parts: Sequence[int]) -> Integers:
    """Positions along a row: every ending goes on where the beginning stops."""
    beginning, *endings = parts
    return np.concatenate([np.arange(beginning), *(np.arange(beginning, beginning + length) for length in endings)])


def _seen(lengths: Sequence[Sequence[int]], columns: int) -> Tensor:
    """Who sees whom in each row, [B, 1, T, T]: up to itself, the beginning and its own ending.

    Padding sees what precedes it, so that no place sees nothing, of which attention makes NaN.
    """
    part_BT = np.zeros((len(lengths), columns), np.int64)
    for row, parts in enumerate(lengths):
        part_BT[row, : sum(parts)] = np.repeat(np.arange(len(parts)), parts)
    part = torch.from_numpy(part_BT)
    alike_BTT = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
    return (alike_BTT & torch.ones(columns, columns, dtype=torch.bool).tril())[:, None]


def _kept(
    spans: Sequence[tuple[range, range]],
    keep: int | Sequence[int],
    row_N: Integers,
    columns_N: Integers,
    shape: tuple[int, int],
    seen_B1TT: Tensor | None,
) -> Kept:
    counts = [keep] * len(spans) if isinstance(keep, int) else list(keep)
    for (_, own), count in zip(spans, counts, strict=True):
        assert 0 <= count <= len(own), "more is to be kept of a sequence than it has of its own"
    index_K = np.concatenate([np.arange(own.stop - n, own.stop) for (_, own), n in zip(spans, counts, strict=True)])
    most = max(counts)
    by_sequence = np.concatenate([number * most + np.arange(n) for number, n in enumerate(counts)])
    # Sequences of one row lie together, so kept tokens of a row do, too.
    row_K = row_N[index_K]
    rank_K = np.arange(len(index_K)) - np.searchsorted(row_K, row_K)
    queries = int(rank_K.max()) + 1 if len(index_K) else 0
    place_K, column_K = torch.from_numpy(row_K * queries + rank_K), torch.from_numpy(columns_N[index_K])
    # A place in which no query lies sees the first column.
    last_BQ = torch.zeros(shape[0] * queries, dtype=torch.int64).index_copy(0, place_K, column_K)
    last_BQ = last_BQ.view(shape[0], queries)
    seen_B1QT = (torch.arange(shape[1]) <= last_BQ[..., None])[:, None]
    if seen_B1TT is not None:
        seen_B1QT = seen_B1TT.expand(-1, 1, -1, -1)[torch.arange(shape[0])[:, None], 0, last_BQ][:, None]
    return Kept(
        torch.from_numpy(index_K),
        tuple(counts),
        Grid(torch.from_numpy(by_sequence), len(counts), most),
        Grid(place_K, shape[0], queries),
        seen_B1QT,
    )
