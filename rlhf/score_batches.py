"""Which sequences are scored together: what begins alike in one row, rows in batches by their tokens.

A row is what the attention computes as one (`rlhf.packing`): a sequence, or several whose common beginning stands in
it once. The other layers then compute fewer tokens, the attention more pairs, since endings see nothing of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WORTH_SHARING = 0.25
"""A sequence joins a row when that saves at least this part of what it costs alone."""

MOST_ROW_TOKENS = 2048
"""No sequence joins a row beyond this: the mask of shared rows grows with the square of their length."""


@dataclass(frozen=True)
class Row:
    """Sequences, by number, of which the first `common` tokens are computed once; `tokens` are computed in all."""

    members: tuple[int, ...]
    common: int
    tokens: int

    @property
    def is_shared(self) -> bool:
        """Whether it holds more than one sequence."""
        return len(self.members) > 1

    def cost(self, hidden: int) -> float:
        """Its floating-point operations in a block, in units of 4 · hidden.

        A token costs 24 · hidden² in the linear layers, a pair of tokens 4 · hidden in the attention. Alone, a token
        looks only back, which the kernel makes use of; under a mask all pairs are computed.
        """
        return 6 * hidden * self.tokens + self.tokens**2 * (1.0 if self.is_shared else 0.5)


def lone_rows(sequences: Sequence[Sequence[int]]) -> list[Row]:
    """Each sequence in a row of its own."""
    return [_alone(sequences, number) for number in range(len(sequences))]


def shared_rows(sequences: Sequence[Sequence[int]], *, hidden: int) -> list[Row]:
    """Distinct sequences in rows, neighbours in the order of their tokens together where that saves enough.

    Every sequence keeps at least its last token to itself. hidden is the model's width, by which tokens and pairs of
    tokens are weighed.
    """
    order = sorted(range(len(sequences)), key=lambda number: tuple(sequences[number]))
    rows: list[Row] = []
    for number in order:
        alone = _alone(sequences, number)
        if rows:
            joined = _joined(sequences, rows[-1], number)
            saved = rows[-1].cost(hidden) + alone.cost(hidden) - joined.cost(hidden)
            if joined.tokens <= MOST_ROW_TOKENS and saved >= WORTH_SHARING * alone.cost(hidden):
                rows[-1] = joined
                continue
        rows.append(alone)
    return rows


def row_batches(rows: Sequence[Row], *, tokens: int, grid: int) -> list[list[Row]]:
    """Rows in batches as `length_batches` makes them; shared ones, which need a mask, apart from the others."""
    batches = []
    for kind in ([row for row in rows if row.is_shared], [row for row in rows if not row.is_shared]):
        picked = length_batches([row.tokens for row in kind], tokens=tokens, grid=grid)
        batches += [[kind[index] for index in batch] for batch in picked]
    return sorted(batches, key=lambda batch: -batch[0].tokens)


def length_batches(lengths: Sequence[int], *, tokens: int, grid: int) -> list[list[int]]:
    """Indices in batches of like length, the longest first: what does not fit into memory fails at once.

    The lengths of a batch add up to `tokens` at most, and padded to the longest to `grid` at most; what is longer
    goes alone.
    """
    batches: list[list[int]] = []
    filled = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        # The first of a batch is its longest.
        if batches and filled + lengths[index] <= tokens and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= grid:
            batches[-1].append(index)
            filled += lengths[index]
        else:
            batches.append([index])
            filled = lengths[index]
    return batches


def _alone(sequences: Sequence[Sequence[int]], number: int) -> Row:
    return Row((number,), 0, len(sequences[number]))


def _joined(sequences: Sequence[Sequence[int]], row: Row, number: int) -> Row:
    """The row with one more sequence, whose neighbour the row's last one is."""
    last, more = sequences[row.members[-1]], sequences[number]
    common = _common_beginning(last, more, at_most=row.common if row.is_shared else len(last) - 1)
    members = (*row.members, number)
    return Row(members, common, common + sum(len(sequences[member]) - common for member in members))


def _common_beginning(one: Sequence[int], other: Sequence[int], *, at_most: int) -> int:
    """How many first tokens are the same, leaving at least the last of either."""
    most = min(at_most, len(one) - 1, len(other) - 1)
    return next((place for place in range(most) if one[place] != other[place]), most)
