"""Packed sequences: where their tokens lie, who sees whom, and what of them is read."""

from __future__ import annotations

import pytest
import torch

from rlhf.packing import Grid, pack, pack_groups


def test_a_grid_spreads_and_gathers() -> None:
    grid = Grid(torch.tensor([0, 1, 3]), rows=2, columns=3)
    spread = grid.spread(torch.tensor([5, 6, 7]))
    assert spread.tolist() == [[5, 6, 0], [7, 0, 0]]
    assert grid.gather(spread).tolist() == [5, 6, 7]
    assert not grid.is_full


def test_a_full_grid_moves_nothing() -> None:
    values = torch.tensor([5, 6, 7, 8])
    grid = Grid(torch.arange(4), rows=2, columns=2)
    assert grid.spread(values).data_ptr() == values.data_ptr()
    assert grid.gather(grid.spread(values)).data_ptr() == values.data_ptr()


def test_gradients_pass_through_a_grid() -> None:
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    grid = Grid(torch.tensor([0, 1, 3]), rows=2, columns=3)
    (grid.gather(grid.spread(values)) * torch.tensor([4.0, 5.0, 6.0])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [4.0, 5.0, 6.0]


def test_sequences_lie_one_after_another_each_counted_from_0() -> None:
    packed = pack([[7, 8, 9], [4]], keep=1)
    assert packed.ids_N.tolist() == [7, 8, 9, 4]
    assert packed.positions_N.tolist() == [0, 1, 2, 0]
    assert packed.tokens.spread(packed.ids_N).tolist() == [[7, 8, 9], [4, 0, 0]]
    assert packed.seen_B1TT is None


def test_the_last_tokens_are_kept_and_lie_by_sequence() -> None:
    packed = pack([[7, 8, 9], [4], [5, 6]], keep=[2, 0, 1])
    kept = packed.pick(packed.ids_N)
    assert kept.tolist() == [8, 9, 6]
    assert packed.per_sequence(kept).tolist() == [[8, 9], [0, 0], [6, 0]]
    assert packed.kept_mask().tolist() == [[True, True], [False, False], [True, False]]
    assert packed.kept is not None
    # By hand: 8 sees 7 and 8, 9 all three; the empty places the first column; 6 both of its row.
    t, f = True, False
    expected = [[[t, t, f], [t, t, t]], [[t, f, f], [t, f, f]], [[t, t, f], [t, f, f]]]
    assert packed.kept.seen_B1QT.squeeze(1).tolist() == expected


def test_all_tokens_are_kept_without_a_number() -> None:
    packed = pack([[7, 8], [4]], keep=None)
    assert packed.pick(packed.ids_N).tolist() == [7, 8, 4]
    assert pack([[7, 8], [4]], keep=1).whole().pick(packed.ids_N).tolist() == [7, 8, 4]


def test_endings_share_their_beginning_and_see_nothing_of_each_other() -> None:
    packed = pack_groups([[7, 8]], [[[1, 2], [3]]], keep=1)
    assert packed.ids_N.tolist() == [7, 8, 1, 2, 3]
    assert packed.positions_N.tolist() == [0, 1, 2, 3, 2]
    assert packed.seen_B1TT is not None
    assert packed.seen_B1TT[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert packed.pick(packed.ids_N).tolist() == [2, 3]
    assert packed.kept is not None
    assert packed.kept.seen_B1QT[0, 0].int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    assert packed.spans == ((range(2), range(2, 4)), (range(2), range(4, 5)))


def test_kept_tokens_of_several_rows_with_several_endings() -> None:
    packed = pack_groups([[7], [8, 9]], [[[1, 2], [3]], [[4, 5]]], keep=[1, 1, 2])
    assert packed.pick(packed.ids_N).tolist() == [2, 3, 4, 5]
    assert packed.per_sequence(packed.pick(packed.ids_N)).tolist() == [[2, 0], [3, 0], [4, 5]]
    assert packed.kept is not None
    assert packed.kept.queries.spread(packed.pick(packed.ids_N)).tolist() == [[2, 3], [4, 5]]


def test_no_more_can_be_kept_than_there_is() -> None:
    with pytest.raises(AssertionError, match="more is to be kept"):
        pack([[7, 8]], keep=3)
