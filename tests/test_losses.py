"""Losses on numbers small enough to work out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf.losses import (
    pairwise_divergent_loss,
    pairwise_last_loss,
    policy_loss,
    token_logprobs,
    value_loss,
)

LN2, LN3 = math.log(2.0), math.log(3.0)


def row(*values: float) -> Tensor:
    return torch.tensor([values])


def test_token_logprobs_are_of_the_softmax() -> None:
    # exp(logits) = 1, 3: probabilities 1/4 and 3/4
    logits_BRV = torch.tensor([[[0.0, LN3], [0.0, LN3]]])
    logprobs_BR = token_logprobs(logits_BRV, torch.tensor([[0, 1]]))
    torch.testing.assert_close(logprobs_BR, row(math.log(0.25), math.log(0.75)))


def test_temperature_divides_the_logits() -> None:
    # halved: 1, sqrt 3
    logits_BRV = torch.tensor([[[0.0, LN3]]])
    expected = -math.log(1.0 + math.sqrt(3.0))
    torch.testing.assert_close(token_logprobs(logits_BRV, torch.tensor([[0]]), temperature=2.0), row(expected))


def test_logprobs_of_half_precision_logits_are_float32() -> None:
    logits_BRV = torch.zeros(1, 1, 1000, dtype=torch.bfloat16)
    logprobs_BR = token_logprobs(logits_BRV, torch.tensor([[7]]))
    assert logprobs_BR.dtype == torch.float32
    torch.testing.assert_close(logprobs_BR, row(-math.log(1000.0)))


def test_last_loss_is_the_mean_over_pairs() -> None:
    # sigmoid(0) = 1/2; sigmoid(ln 3) = 3/4
    loss = pairwise_last_loss(torch.tensor([1.0, LN3]), torch.tensor([1.0, 0.0]))
    assert loss.item() == pytest.approx((LN2 + math.log(4 / 3)) / 2)


def test_last_loss_stays_finite_far_apart() -> None:
    assert pairwise_last_loss(torch.tensor([-500.0]), torch.tensor([500.0])).item() == pytest.approx(1000.0)


def test_divergent_loss_counts_from_the_first_difference_to_the_longer_end() -> None:
    """Pair 0 differs from column 1, the longer one ends after column 2; pair 1 differs in column 2 only."""
    chosen_ids = torch.tensor([[5, 6, 0, 0], [5, 6, 7, 0]])
    rejected_ids = torch.tensor([[5, 8, 9, 0], [5, 6, 8, 0]])
    chosen_mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    rejected_mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]])
    chosen = torch.tensor([[9.0, LN3, 0.0, 9.0], [9.0, 9.0, LN3, 9.0]])
    rejected = torch.zeros(2, 4)
    loss = pairwise_divergent_loss(chosen, rejected, chosen_ids, rejected_ids, chosen_mask, rejected_mask)
    # pair 0: margins ln 3 and 0; pair 1: margin ln 3
    first, second = (math.log(4 / 3) + LN2) / 2, math.log(4 / 3)
    assert loss.item() == pytest.approx((first + second) / 2)


def test_divergent_loss_sees_an_end_that_padding_with_eos_hides() -> None:
    """EOS (0) ends the chosen one in column 2 and pads the rejected one there: only the masks differ."""
    ids = torch.tensor([[5, 6, 0]])
    margins = torch.tensor([[9.0, 9.0, LN3]])
    loss = pairwise_divergent_loss(
        margins, torch.zeros(1, 3), ids, ids, torch.tensor([[1, 1, 1]]), torch.tensor([[1, 1, 0]])
    )
    assert loss.item() == pytest.approx(math.log(4 / 3))


def test_divergent_loss_refuses_equal_rows() -> None:
    ids = torch.tensor([[5, 6], [5, 7]])
    other = torch.tensor([[5, 8], [5, 7]])
    scores, mask = torch.zeros(2, 2), torch.ones(2, 2)
    with pytest.raises(ValueError, match="pair 1 are the same tokens"):
        pairwise_divergent_loss(scores, scores, ids, other, mask, mask)


def test_divergent_loss_refuses_left_padding() -> None:
    scores, mask = torch.zeros(1, 2), torch.tensor([[0, 1]])
    with pytest.raises(ValueError, match="on the right"):
        pairwise_divergent_loss(scores, scores, torch.tensor([[0, 5]]), torch.tensor([[0, 6]]), mask, torch.ones(1, 2))


def test_policy_loss_clips_only_what_would_gain() -> None:
    """Ratios 3/2, 3/2, 1/2, 1/2 under advantages 1, -1, 1, -1, clipped at 0.8 and 1.2."""
    ratios = torch.tensor([[1.5, 1.5, 0.5, 0.5]])
    advantages = row(1.0, -1.0, 1.0, -1.0)
    loss, stats = policy_loss(ratios.log(), torch.zeros(1, 4), advantages, torch.ones(1, 4), clip=0.2)
    # -1.2 (clipped), +1.5, -0.5, +0.8 (clipped)
    assert loss.item() == pytest.approx((-1.2 + 1.5 - 0.5 + 0.8) / 4)
    assert stats["clip_fraction"].item() == pytest.approx(0.5)
    assert stats["ratio"].item() == pytest.approx(1.0)


def test_policy_loss_of_the_same_policy() -> None:
    logprobs = row(-1.0, -2.0).requires_grad_()
    loss, stats = policy_loss(logprobs, logprobs.detach(), row(2.0, 4.0), torch.ones(1, 2), clip=0.2)
    assert loss.item() == pytest.approx(-3.0)
    assert {name: value.item() for name, value in stats.items()} == {
        "ratio": 1.0,
        "clip_fraction": 0.0,
        "approx_kl": 0.0,
    }
    loss.backward()
    torch.testing.assert_close(logprobs.grad, row(-1.0, -2.0))


def test_policy_loss_approx_kl_averages_counted_tokens() -> None:
    # e^x - 1 - x at x = ln 2, over one counted token
    _, stats = policy_loss(row(LN2, 9.0), row(0.0, 0.0), row(0.0, 0.0), torch.tensor([[1, 0]]), clip=0.2)
    assert stats["approx_kl"].item() == pytest.approx(1.0 - LN2)


def test_masked_tokens_give_no_loss_and_no_gradient() -> None:
    logprobs = row(0.0, 1e4).requires_grad_()
    values = row(1.0, math.inf).requires_grad_()
    mask = torch.tensor([[True, False]])
    policy, _ = policy_loss(logprobs, row(0.0, 0.0), row(1.0, 5.0), mask, clip=0.2)
    value, _ = value_loss(values, row(1.0, 0.0), row(0.0, 0.0), mask, clip=0.2)
    assert policy.item() == pytest.approx(-1.0)
    assert value.item() == pytest.approx(0.5)
    (policy + value).backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[-1.0, 0.0]]


def test_value_loss_takes_the_worse_of_plain_and_clipped() -> None:
    """Old values 0, clip 0.2: a value of 1 is held at 0.2."""
    values, returns = row(1.0, 1.0, 0.1), row(1.0, 0.0, 0.0)
    loss, stats = value_loss(values, torch.zeros(1, 3), returns, torch.ones(1, 3), clip=0.2)
    # (0.2 - 1)^2 = 0.64 beats 0; 1 beats 0.04; 0.01 either way
    assert loss.item() == pytest.approx(0.5 * (0.64 + 1.0 + 0.01) / 3)
    assert stats["clip_fraction"].item() == pytest.approx(1 / 3)
    assert stats["error"].item() == pytest.approx((0.0 + 1.0 + 0.01) / 3)
