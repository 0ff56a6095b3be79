"""From scores to advantages: KL estimates, token rewards, GAE, whitening, and what steers the KL penalty.

Shapes: B batch, R response token. Masks are True where an entry counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.config import PpoConfig


def k1(logprobs_BR: Tensor, ref_logprobs_BR: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference): log-ratio. Unbiased, of either sign.

    Source: Schulman 2020, "Approximating KL divergence", k1.
    """
    return logprobs_BR - ref_logprobs_BR


def k3(logprobs_BR: Tensor, ref_logprobs_BR: Tensor) -> Tensor:
    """Per-token estimate e^x - 1 - x, x the log-ratio policy to reference; never negative.

    trlX's sign: x is policy minus reference, so on the policy's own samples this is not an unbiased
    estimate of KL(policy || reference), but it is the number trlX logs and steers by.
    Source: CarperAI/trlx, trlx/trainer/accelerate_ppo_trainer.py, make_experience.
    """
    log_ratio_BR = logprobs_BR - ref_logprobs_BR
    return log_ratio_BR.expm1() - log_ratio_BR


def token_rewards(
    scores_B: Tensor,
    kl_BR: Tensor,
    mask_BR: Tensor,
    *,
    kl_coef: float,
    score_index_B: Tensor | None = None,
) -> Tensor:
    """Reward of each token: -kl_coef * kl, plus the sequence's score at one of them.

    The score lands on the last counted token (EOS, or where the response was cut), or in the column
    that score_index_B names, which the mask need not count. Uncounted tokens bear no penalty.
    Raises ValueError when a row counts no token and score_index_B is not given.
    """
    mask_BR = mask_BR.bool()
    if score_index_B is None:
        if not mask_BR.any(-1).all():
            row = int((~mask_BR.any(-1)).nonzero()[0])
            raise ValueError(f"response {row} has no counted token to carry its score")
        columns_R = torch.arange(mask_BR.shape[1], device=mask_BR.device)
        score_index_B = (columns_R * mask_BR).argmax(-1)
    rewards_BR = torch.where(mask_BR, -kl_coef * kl_BR, 0.0)
    return rewards_BR.scatter_add(1, score_index_B.unsqueeze(1), scores_B.to(rewards_BR.dtype).unsqueeze(1))


def gae(rewards_BR: Tensor, values_BR: Tensor, mask_BR: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns that the values are trained on.

    Uncounted columns are skipped as if they were not there; both results are 0 in them. The value after
    the last counted token is 0.
    Source: Schulman et al. 2016, equation 16; returns are advantages + values.
    """
    mask_BR = mask_BR.bool()
    advantage_B = torch.zeros_like(values_BR[:, 0])
    next_value_B = torch.zeros_like(advantage_B)
    advantages_BR = torch.zeros_like(values_BR)
    for column in reversed(range(values_BR.shape[1])):
        counted_B, value_B = mask_BR[:, column], values_BR[:, column]
        delta_B = rewards_BR[:, column] + gamma * next_value_B - value_B
        advantage_B = torch.where(counted_B, delta_B + gamma * lam * advantage_B, advantage_B)
        next_value_B = torch.where(counted_B, value_B, next_value_B)
        advantages_BR[:, column] = torch.where(counted_B, advantage_B, 0.0)
    return advantages_BR, torch.where(mask_BR, advantages_BR + values_BR, 0.0)


def whiten(values_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """Shift and scale the counted entries to zero mean and unit (sample) variance.

    The uncounted ones come back as 0. Raises ValueError when fewer than two entries count.
    Source: Huang et al. 2024, detail 20; eps and n - 1 as torch.var_mean in trlx/utils/modeling.py, whiten.
    """
    mask_BR = mask_BR.bool()
    counted_N = values_BR[mask_BR].double()
    count = counted_N.numel()
    if count < 2:
        raise ValueError(f"whitening needs at least 2 counted entries, not {count}")
    mean = counted_N.sum() / count
    # A second sum about the mean: one pass with sums of squares would cancel.
    variance = (counted_N - mean).square().sum() / (count - 1)
    whitened_BR = (values_BR.double() - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask_BR, whitened_BR, 0.0).to(values_BR.dtype)


class FixedKl:
    """A KL coefficient that stays as it is."""

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl: float, rollouts: int) -> None:
        """Nothing moves."""

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint."""
        self.coef = state["coef"]


class AdaptiveKl(FixedKl):
    """A KL coefficient that steers the measured KL towards a target.

    Source: Ziegler et al. 2019, section 2.2; the error is clipped to ±0.2.
    """

    def __init__(self, coef: float, *, target: float, horizon: int) -> None:
        super().__init__(coef)
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, rollouts: int) -> None:
        """Move after so many rollouts whose mean KL was `kl` (nats a sequence)."""
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * rollouts / self.horizon


def kl_controller(config: PpoConfig) -> FixedKl | AdaptiveKl:
    """The controller that `ppo.kl_controller` asks for."""
    if config.kl_controller == "fixed":
        return FixedKl(config.init_kl_coef)
    return AdaptiveKl(config.init_kl_coef, target=config.kl_target, horizon=config.kl_horizon)


class RunningMoments:
    """Mean and standard deviation of all scores seen, batch after batch.

    Source: Chan et al. 1979, the merging of variances; n - 1 in the deviation as in
    trlx/utils/modeling.py, RunningMoments.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._squares = 0.0  # sum of squared deviations from the mean

    @property
    def std(self) -> float:
        """Sample deviation; 1.0 until two different values were seen, so that dividing by it is safe."""
        deviation = (self._squares / max(self.count - 1, 1)) ** 0.5
        return deviation if deviation > 1e-6 else 1.0

    def update(self, values_B: Tensor) -> tuple[float, float]:
        """Take in a batch; gives the mean and deviation of everything seen so far."""
        batch_count = values_B.numel()
        if batch_count == 0:
            return self.mean, self.std
        values_B = values_B.double()
        batch_mean = values_B.mean().item()
        batch_squares = (values_B - batch_mean).square().sum().item()
        delta = batch_mean - self.mean
        count = self.count + batch_count
        self._squares += batch_squares + delta**2 * self.count * batch_count / count
        self.mean += delta * batch_count / count
        self.count = count
        return self.mean, self.std

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"count": self.count, "mean": self.mean, "squares": self._squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint."""
        self.count, self.mean, self._squares = int(state["count"]), state["mean"], state["squares"]
