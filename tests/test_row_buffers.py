"""Attention of one more token a row, by bags of embeddings and by torch's fused kernel, over the same buffers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rlhf import row_buffers
from rlhf.bag_attention import BagStep, bags_are_fast
from rlhf.row_buffers import FusedStep, RowBuffers

HEADS, SIZE, LAYERS = 3, 10, 2
PROMPTS = (7, 1, 12, 4)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(*, room: int = 4) -> RowBuffers:
    buffers, columns = RowBuffers(layers=LAYERS, rows=len(PROMPTS) + 1), max(PROMPTS)
    buffers.reserve(columns + room)
    for layer in range(LAYERS):
        keys, values = drawn(2, len(PROMPTS), HEADS, columns, SIZE, seed=layer)
        buffers.fill(layer, 0, keys, values)
    return buffers


def written(buffers: RowBuffers, lengths: Sequence[int], *, steps: int) -> Tensor:
    """What the same new tokens attend to in each row, [steps · blocks, rows, H]."""
    given, length_A = [], torch.tensor(lengths)
    for number in range(steps):
        step = buffers.step(length_A, int(length_A.max()) + 1)
        for layer in range(LAYERS):
            query, key, value = drawn(3, 1, HEADS, SIZE, seed=100 + 10 * number + layer).expand(
                -1, len(lengths), -1, -1
            )
            step.append(layer, key, value)
            given.append(step.mix(layer, query))
        length_A = length_A + 1
    return torch.stack(given)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)


def test_bags_are_used_for_float32_on_a_cpu_that_has_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if "fbgemm" in torch.backends.quantized.supported_engines:
        assert isinstance(filled().step(torch.tensor([7]), 8), BagStep)
    assert not bags_are_fast(torch.zeros(1, dtype=torch.bfloat16))
    assert not bags_are_fast(torch.zeros(1, device="meta"))
    monkeypatch.setattr(row_buffers, "bags_are_fast", lambda _: False)
    assert isinstance(filled().step(torch.tensor([7]), 8), FusedStep)


@pytest.mark.parametrize("rows", [1, 4])
def test_bags_give_what_the_fused_kernel_does(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for bags in (True, False):
        monkeypatch.setattr(row_buffers, "bags_are_fast", lambda _, bags=bags: bags)
        found.append(written(filled(), PROMPTS[:rows], steps=4))
    assert_close(*found)


@pytest.mark.parametrize("bags", [True, False])
def test_growing_moving_and_repeating_keep_what_is_attended_to(bags: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_buffers, "bags_are_fast", lambda _: bags)
    expected = written(filled(), PROMPTS, steps=2)
    grown = filled(room=0)
    grown.reserve(max(PROMPTS) + 4)
    assert_close(written(grown, PROMPTS, steps=2), expected)
    changed = filled()
    changed.repeat(1, torch.tensor([1, 1, 2]))  # rows 1 and 2 get row 2, row 3 stays
    changed.move(0, 4)
    lengths = [PROMPTS[row] for row in (0, 2, 2, 3, 0)]
    assert_close(written(changed, lengths, steps=2), expected[:, [0, 2, 2, 3, 0]])


@pytest.mark.parametrize("bags", [True, False])
def test_a_row_left_full_of_nan_does_not_reach_the_next_in_its_place(
    bags: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_buffers, "bags_are_fast", lambda _: bags)
    buffers = filled()
    for layer in range(LAYERS):
        buffers.fill(layer, 0, *torch.full((2, 2, HEADS, buffers.columns, SIZE), torch.nan))
    buffers.move(2, 0)
    for layer in range(LAYERS):
        buffers.fill(layer, 1, *drawn(2, 1, HEADS, 3, SIZE))
    assert written(buffers, [PROMPTS[2], 3], steps=2).isfinite().all()
