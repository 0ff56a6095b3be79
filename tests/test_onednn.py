"""oneDNN's products equal torch's own, and stay out of whatever they do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rlhf import onednn

ROWS, WIDTH, OUT = onednn.BLOCK_ROWS, 24, 40


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each of oneDNN's products had."""
    if not onednn.is_available():
        pytest.skip("needs a torch with oneDNN, as those for x86 are")
    rows: list[int] = []
    multiply = onednn.multiply

    def counted(entering_MI: Tensor, weight: Tensor, bias_O: Tensor | None, *, gelu: bool = False) -> Tensor:
        rows.append(len(entering_MI))
        return multiply(entering_MI, weight, bias_O, gelu=gelu)

    monkeypatch.setattr(onednn, "multiply", counted)
    return rows


@torch.no_grad()
@pytest.mark.parametrize("rows", [ROWS, 2 * ROWS + 5])
def test_an_mlp_equals_its_modules(multiplied: list[int], rows: int) -> None:
    torch.manual_seed(1)
    fc_in, act, fc_out = nn.Linear(WIDTH, OUT), nn.GELU(approximate="tanh"), nn.Linear(OUT, WIDTH)
    entering = torch.randn(rows, WIDTH)
    torch.testing.assert_close(
        onednn.mlp(fc_in, act, fc_out, entering), fc_out(act(fc_in(entering))), atol=1e-5, rtol=1e-5
    )
    assert multiplied == [ROWS, ROWS] * (rows // ROWS)


@torch.no_grad()
def test_a_weight_that_was_laid_out_gives_the_same(multiplied: list[int]) -> None:
    weight, bias = torch.randn(OUT, WIDTH), torch.randn(OUT)
    entering = torch.randn(3, WIDTH)
    found = onednn.multiply(entering, onednn.laid_out(weight, 3), bias)
    torch.testing.assert_close(found, entering @ weight.t() + bias, atol=1e-5, rtol=1e-5)


class Doubled(nn.Linear):
    def forward(self, entering: Tensor) -> Tensor:
        return 2 * super().forward(entering)


def test_all_else_goes_through_the_modules(multiplied: list[int]) -> None:
    """Other layers, hooks, precisions and activations, few rows, and whatever wants gradients."""
    hooked, plain, back, act = nn.Linear(WIDTH, OUT), nn.Linear(WIDTH, OUT), nn.Linear(OUT, WIDTH), nn.GELU("tanh")
    called = []
    hooked.register_forward_hook(lambda *_: called.append(1))
    entering = torch.randn(ROWS, WIDTH)
    assert onednn.mlp(plain, act, back, entering).requires_grad
    with torch.no_grad():
        for fc_in, through in ((hooked, act), (Doubled(WIDTH, OUT), act), (plain, nn.GELU()), (plain, nn.ReLU())):
            assert torch.equal(onednn.mlp(fc_in, through, back, entering), back(through(fc_in(entering))))
        assert called == [1, 1]
        onednn.mlp(plain, act, back, entering[1:])
        with torch.autocast("cpu", torch.bfloat16):
            assert onednn.mlp(plain, act, back, entering).dtype == torch.bfloat16
        assert onednn.mlp(plain.double(), act, back.double(), entering.double()).dtype == torch.float64
    assert multiplied == []
