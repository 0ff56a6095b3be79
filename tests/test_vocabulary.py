"""Log-probabilities over the vocabulary in chunks, against the plain path in losses.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf import vocabulary
from rlhf.losses import token_logprobs
from rlhf.vocabulary import choice_logprobs

ROWS, WIDTH = 7, 12


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows a chunk: two whole ones and a rest."""
    monkeypatch.setattr(vocabulary, "CPU_CHUNK", 3 * WIDTH + 1)


def logits_and_tokens(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits_KV = 4 * torch.randn(ROWS, WIDTH, generator=generator)
    return logits_KV.to(dtype).requires_grad_(), torch.randint(WIDTH, (ROWS,), generator=generator)


def plain_entropy(logits_KV: Tensor, temperature: float) -> Tensor:
    return torch.distributions.Categorical(logits=logits_KV.detach().float() / temperature).entropy()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_and_gradients_equal_the_plain_path(dtype: torch.dtype, temperature: float) -> None:
    logits_KV, tokens_K = logits_and_tokens(dtype)
    weights_K = torch.linspace(-1, 2, ROWS)
    logprobs_K, entropy_K = choice_logprobs(logits_KV, tokens_K, temperature=temperature)
    plain_K = token_logprobs(logits_KV, tokens_K, temperature=temperature)
    assert logprobs_K.dtype == entropy_K.dtype == torch.float32
    assert not entropy_K.requires_grad
    torch.testing.assert_close(logprobs_K, plain_K, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(entropy_K, plain_entropy(logits_KV, temperature), atol=2e-6, rtol=1e-6)
    (ours_KV,), (plain_KV,) = (torch.autograd.grad((k * weights_K).sum(), logits_KV) for k in (logprobs_K, plain_K))
    assert ours_KV.dtype == dtype
    close = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 1e-3, "rtol": 8e-3}
    torch.testing.assert_close(ours_KV, plain_KV, **close)


def test_the_gradient_is_the_slope() -> None:
    logits_KV, tokens_K = logits_and_tokens(torch.float64)
    assert torch.autograd.gradcheck(lambda x: choice_logprobs(x, tokens_K, temperature=0.7)[0], (logits_KV,))


def test_entropy_by_hand() -> None:
    # one half, one quarter twice: 1.5 bits; and logits that are doubled: 9/10 and 1/10
    logits_KV = torch.tensor([[math.log(2), 0.0, 0.0, -math.inf], [0.0, 0.0, 0.0, 0.0]])
    _, entropy_K = choice_logprobs(logits_KV, torch.tensor([0, 0]))
    assert entropy_K.tolist() == pytest.approx([1.5 * math.log(2), 2 * math.log(2)])
    _, entropy_K = choice_logprobs(torch.tensor([[math.log(3), 0.0]]), torch.tensor([0]), temperature=0.5)
    assert entropy_K.tolist() == pytest.approx([-(0.9 * math.log(0.9) + 0.1 * math.log(0.1))])


def test_a_token_that_is_ruled_out_adds_nothing() -> None:
    logits_KV = torch.tensor([[math.log(3), 0.0, -math.inf]], requires_grad=True)
    logprobs_K, entropy_K = choice_logprobs(logits_KV, torch.tensor([1]))
    assert logprobs_K.item() == pytest.approx(math.log(1 / 4))
    assert entropy_K.item() == pytest.approx(math.log(4) - 3 / 4 * math.log(3))
    logprobs_K.sum().backward()
    assert logits_KV.grad is not None
    assert logits_KV.grad.tolist() == [pytest.approx([-3 / 4, 3 / 4, 0.0])]
    assert choice_logprobs(logits_KV, torch.tensor([2]))[0].item() == -math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    logprobs_K, _ = choice_logprobs(torch.tensor([[0.0, bad], [0.0, 0.0]]), torch.tensor([0, 0]))
    assert logprobs_K[0].isnan()
    assert logprobs_K[1].item() == pytest.approx(-math.log(2))


def test_no_rows_give_no_results() -> None:
    logprobs_K, entropy_K = choice_logprobs(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
    assert logprobs_K.shape == entropy_K.shape == (0,)


def test_the_logits_stay_as_they_were() -> None:
    logits_KV, tokens_K = logits_and_tokens()
    before_KV = logits_KV.detach().clone()
    choice_logprobs(logits_KV, tokens_K, temperature=0.5)[0].sum().backward()
    assert torch.equal(logits_KV, before_KV)
