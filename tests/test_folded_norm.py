"""A norm folded into the layers that read it gives what it gives by itself, and leaves tokens without gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rlhf.folded_norm import FoldedNorm, can_fold
from rlhf.gptj import packed_states
from rlhf.models import split_backbone
from rlhf.packing import pack
from tests.test_gptj import SEQUENCES, fused, original

HIDDEN, OUT = 12, 20


def norm_and_layer(bias: bool) -> tuple[nn.LayerNorm, nn.Linear]:
    torch.manual_seed(1)
    norm, layer = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, OUT, bias=bias)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    with torch.no_grad():
        norm.weight[3] = 0.0  # nothing may be divided by it
    return norm, layer


@pytest.mark.parametrize("bias", [True, False])
def test_result_and_gradients_equal_those_of_norm_and_layer(bias: bool) -> None:
    norm, layer = norm_and_layer(bias)
    hidden_NH, weights_NO = torch.randn(7, HIDDEN), torch.randn(7, OUT)
    found = []
    for folded in (True, False):
        norm.zero_grad()
        layer.zero_grad()
        fold = FoldedNorm(norm)
        result = fold.into(layer, fold.normalised(hidden_NH)) if folded else layer(norm(hidden_NH))
        (result * weights_NO).sum().backward()
        found.append([result.detach(), *(p.grad.clone() for p in (*norm.parameters(), *layer.parameters()))])
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


def test_only_what_is_trained_over_something_frozen_is_folded() -> None:
    norm, layer = norm_and_layer(bias=True)
    hidden_NH = torch.randn(7, HIDDEN)
    assert can_fold(norm, [layer], hidden_NH)
    assert not can_fold(norm, [layer], hidden_NH.clone().requires_grad_())
    assert not can_fold(norm, [layer], hidden_NH.double())
    assert not can_fold(nn.LayerNorm(HIDDEN, bias=False), [layer], hidden_NH)
    assert not can_fold(nn.Identity(), [layer], hidden_NH)
    assert not can_fold(norm, [layer, nn.Bilinear(2, 2, 2)], hidden_NH)
    with torch.no_grad():
        assert not can_fold(norm, [layer], hidden_NH)
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_fold(norm, [layer], hidden_NH)
    handle = norm.register_forward_hook(lambda *_: None)
    assert not can_fold(norm, [layer], hidden_NH)
    handle.remove()
    norm.requires_grad_(False)
    assert not can_fold(norm, [layer], hidden_NH)


def test_a_trained_top_over_a_frozen_trunk_has_the_gradients_of_a_plain_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def noted(norm: nn.Module, layers: list[nn.Module], hidden_NH: Tensor) -> bool:
        asked.append(can_fold(norm, layers, hidden_NH))
        return asked[-1]

    model, packed = fused(original()), pack(SEQUENCES, keep=2)
    trunk, top = split_backbone(model.transformer, 2)
    with torch.no_grad():
        trunk_NH = packed_states(trunk, packed.whole(), None)
    gradients = []
    for judge in (noted, lambda *_: False):
        monkeypatch.setattr("rlhf.gptj.can_fold", judge)
        top.zero_grad()
        packed_states(top, packed, trunk_NH).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in top.h.parameters()])
    assert asked == [True, False]  # the block above has an input that wants a gradient
    for folded, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(folded, plain, atol=1e-5 * float(plain.abs().max()), rtol=1e-5)
