"""Rewards, advantages, whitening and controllers on numbers small enough to work out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf.advantages import (
    AdaptiveKl,
    FixedKl,
    RunningMoments,
    gae,
    k1,
    k3,
    kl_controller,
    token_rewards,
    whiten,
)
from rlhf.config import PpoConfig

LN2 = math.log(2.0)


def row(*values: float) -> Tensor:
    return torch.tensor([values])


def test_kl_estimates() -> None:
    logprobs, reference = row(-1.0, -1.0 - LN2, -1.0 + LN2), row(-1.0, -1.0, -1.0)
    torch.testing.assert_close(k1(logprobs, reference), row(0.0, -LN2, LN2))
    # 1/2 - 1 + ln 2 and 2 - 1 - ln 2
    torch.testing.assert_close(k3(logprobs, reference), row(0.0, LN2 - 0.5, 1.0 - LN2))


def test_k3_keeps_small_differences() -> None:
    # x^2 / 2 for small x; e^x - 1 - x rounds to 0 or worse in float32
    assert k3(row(1e-3), row(0.0)).item() == pytest.approx(5e-7, rel=0.05)


def test_score_lands_on_the_last_counted_token() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    kl = torch.tensor([[0.5, 1.0, 9.0], [0.0, -1.0, 2.0]])
    rewards = token_rewards(torch.tensor([3.0, -1.0]), kl, mask, kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 2.9, 0.0], [0.0, 0.1, -1.2]]))


def test_score_lands_where_the_index_says() -> None:
    rewards = token_rewards(
        torch.tensor([3.0]), row(1.0, 1.0, 1.0), torch.tensor([[1, 0, 0]]), kl_coef=0.1,
        score_index_B=torch.tensor([2]),
    )  # fmt: skip
    torch.testing.assert_close(rewards, row(-0.1, 0.0, 3.0))


def test_a_response_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="response 1 has no counted token"):
        token_rewards(torch.zeros(2), torch.zeros(2, 2), torch.tensor([[1, 0], [0, 0]]), kl_coef=0.1)


def test_gae_by_hand() -> None:
    """gamma 1/2, lambda 1/2."""
    rewards, values = row(1.0, 2.0, 8.0), row(1.0, 2.0, 4.0)
    advantages, returns = gae(rewards, values, torch.ones(1, 3), gamma=0.5, lam=0.5)
    # deltas from the right: 8 - 4 = 4; 2 + 2 - 2 = 2; 1 + 1 - 1 = 1
    torch.testing.assert_close(advantages, row(1 + 0.25 * 3, 2 + 0.25 * 4, 4.0))
    torch.testing.assert_close(returns, row(2.75, 5.0, 8.0))


def test_gae_with_lambda_one_returns_what_was_earned() -> None:
    _, returns = gae(row(1.0, 0.0, 5.0), row(0.3, -7.0, 2.0), torch.ones(1, 3), gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, row(6.0, 5.0, 5.0))


@pytest.mark.parametrize("padded", [(0, 1), (1, 2), (0, 3)])
def test_gae_skips_uncounted_columns(padded: tuple[int, int]) -> None:
    """Before, between or behind the counted ones: the same results, and 0 in the gaps."""
    rewards, values, mask = (torch.full((1, 5), 99.0), torch.full((1, 5), -99.0), torch.ones(1, 5).bool())
    mask[0, list(padded)] = False
    rewards[mask], values[mask] = torch.tensor([1.0, 2.0, 8.0]), torch.tensor([1.0, 2.0, 4.0])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    torch.testing.assert_close(advantages[mask], torch.tensor([1.75, 3.0, 4.0]))
    torch.testing.assert_close(returns[mask], torch.tensor([2.75, 5.0, 8.0]))
    assert advantages[~mask].tolist() == [0.0, 0.0]
    assert returns[~mask].tolist() == [0.0, 0.0]


def test_gae_rows_do_not_mix() -> None:
    mask = torch.tensor([[1, 1], [1, 0]])
    advantages, _ = gae(torch.tensor([[0.0, 4.0], [3.0, 9.0]]), torch.zeros(2, 2), mask, gamma=1.0, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[2.0, 4.0], [3.0, 0.0]]))


def test_whiten_by_hand() -> None:
    # 1, 2, 3: mean 2, sample deviation 1
    whitened = whiten(torch.tensor([[1.0, 2.0], [3.0, 1e6]]), torch.tensor([[1, 1], [1, 0]]))
    torch.testing.assert_close(whitened, torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))


def test_whiten_far_from_zero() -> None:
    whitened = whiten(row(1e4 + 1, 1e4 + 2, 1e4 + 3), torch.ones(1, 3))
    torch.testing.assert_close(whitened, row(-1.0, 0.0, 1.0), atol=1e-3, rtol=0)


def test_whiten_needs_two_entries() -> None:
    with pytest.raises(ValueError, match="at least 2 counted entries, not 1"):
        whiten(row(1.0, 2.0), torch.tensor([[1, 0]]))


def test_whiten_of_equal_entries_is_zero() -> None:
    assert whiten(row(0.1, 0.1, 0.1), torch.ones(1, 3)).abs().max() < 1e-6


def test_adaptive_kl_moves_by_at_most_a_fifth_of_the_share_of_its_horizon() -> None:
    controller = AdaptiveKl(0.1, target=6.0, horizon=1000)
    controller.update(6.6, rollouts=100)  # error 0.1
    assert controller.coef == pytest.approx(0.1 * 1.01)
    controller = AdaptiveKl(0.1, target=6.0, horizon=1000)
    controller.update(60.0, rollouts=100)  # error clipped to 0.2
    assert controller.coef == pytest.approx(0.1 * 1.02)
    controller = AdaptiveKl(0.1, target=6.0, horizon=1000)
    controller.update(0.0, rollouts=100)  # error clipped to -0.2
    assert controller.coef == pytest.approx(0.1 * 0.98)


def test_fixed_kl_stays() -> None:
    controller = FixedKl(0.05)
    controller.update(60.0, rollouts=100)
    assert controller.coef == 0.05


def test_controller_as_configured_and_from_a_checkpoint() -> None:
    assert type(kl_controller(PpoConfig(kl_controller="fixed", init_kl_coef=0.05))) is FixedKl
    controller = kl_controller(PpoConfig(init_kl_coef=0.1, kl_target=3.0, kl_horizon=10))
    assert isinstance(controller, AdaptiveKl)
    controller.update(30.0, rollouts=5)
    assert controller.coef == pytest.approx(0.11)
    resumed = kl_controller(PpoConfig(init_kl_coef=0.1, kl_target=3.0, kl_horizon=10))
    resumed.load_state_dict(controller.state_dict())
    assert resumed.coef == controller.coef


def test_running_moments_merge_batches() -> None:
    """1, 2, 3 | 4, 5 | 6, 7: mean 4, sample variance 28/6."""
    moments = RunningMoments()
    assert moments.update(torch.tensor([1.0, 2.0, 3.0])) == pytest.approx((2.0, 1.0))
    moments.update(torch.tensor([4.0, 5.0]))
    moments.update(torch.tensor([]))
    assert moments.update(torch.tensor([6.0, 7.0])) == pytest.approx((4.0, math.sqrt(28 / 6)))


def test_running_deviation_is_one_until_there_is_one() -> None:
    moments = RunningMoments()
    assert moments.std == 1.0
    moments.update(torch.tensor([5.0]))
    assert moments.std == 1.0
    moments.update(torch.tensor([0.1, 0.1, 0.1]) + 4.9)
    assert moments.std == 1.0


def test_running_moments_go_on_from_a_checkpoint() -> None:
    moments, resumed = RunningMoments(), RunningMoments()
    moments.update(torch.tensor([1.0, 2.0, 3.0]))
    resumed.load_state_dict(moments.state_dict())
    following = torch.tensor([4.0, 9.0])
    assert resumed.update(following) == moments.update(following)
