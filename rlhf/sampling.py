"""How the next token is chosen from logits, and what is said of its probability.

Shapes: A rows, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_TEMPERATURE = 1e-6
"""Whatever is below samples as this does: the likeliest token. Divided by less, float32 logits would overflow."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    temperature 0 is greedy. top_k (0: off) and top_p (1: off) narrow what may be sampled, and
    min_new_tokens keeps EOS out of the first tokens; none of the three changes the log-probabilities.
    Raises ValueError for values that make no sense.
    """

    max_new_tokens: int
    temperature: float = 1.0
    min_new_tokens: int = 0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} leaves nothing to generate; give 1 or more")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} is not between 0 and max_new_tokens={self.max_new_tokens}"
            )
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature={self.temperature} is not a number from 0 (greedy) up")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} is negative; give 0 to switch it off")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is not above 0 and at most 1; give 1 to switch it off")


def choose_tokens(
    logits_AV: Tensor, sampling: Sampling, chances_A: Tensor, *, blocked: int | None = None
) -> tuple[Tensor, Tensor]:
    """The next token of each row, and its log-probability under the full softmax at the sampling temperature.

    The token is the likeliest, or the one at which the distribution function passes the row's chance; chances_A is
    uniform on [0, 1), float64. The token id `blocked` is never chosen. The log-probabilities (greedy: at
    temperature 1), float32, are the same whatever was excluded from sampling.
    """
    if sampling.temperature == 0:
        tokens_A1 = _without(logits_AV, blocked).argmax(dim=-1, keepdim=True)
        return tokens_A1.squeeze(1), logits_AV.log_softmax(dim=-1).gather(1, tokens_A1).squeeze(1)
    scaled_AV = logits_AV if sampling.temperature == 1 else logits_AV / max(sampling.temperature, LEAST_TEMPERATURE)
    allowed_AV = _narrow(_without(scaled_AV, blocked), sampling)
    greatest_A1 = allowed_AV.amax(dim=-1, keepdim=True).double()
    # In float64, so that rare tokens of a large vocabulary keep their share of the sum.
    cumulative_AV = allowed_AV.double().sub_(greatest_A1).exp_().cumsum_(dim=-1)
    total_A1 = cumulative_AV[:, -1:]
    # Below the total, since a chance is at most 1 - 2^-53; so no token of probability 0 is hit at either end.
    tokens_A1 = torch.searchsorted(cumulative_AV, chances_A[:, None] * total_A1, right=True)
    tokens_A1.clamp_(max=logits_AV.shape[-1] - 1)  # NaN logits are reported at the end, not by a crash here
    if allowed_AV is scaled_AV:
        normaliser_A1 = greatest_A1 + total_A1.log()
    else:
        normaliser_A1 = scaled_AV.logsumexp(dim=-1, keepdim=True)
    return tokens_A1.squeeze(1), (scaled_AV.gather(1, tokens_A1) - normaliser_A1).squeeze(1).float()


def _without(logits_AV: Tensor, blocked: int | None) -> Tensor:
    """A copy in which a token is impossible; the same where none is blocked."""
    if blocked is None:
        return logits_AV
    logits_AV = logits_AV.clone()
    logits_AV[:, blocked] = -torch.inf
    return logits_AV


def _narrow(logits_AV: Tensor, sampling: Sampling) -> Tensor:
    """Put what top_k and top_p exclude to -inf. Ties with the k-th likeliest token stay in."""
    if 0 < sampling.top_k < logits_AV.shape[-1]:
        least_A1 = logits_AV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_AV = logits_AV.masked_fill(logits_AV < least_A1, -torch.inf)
    if sampling.top_p < 1:
        sorted_AV, order_AV = logits_AV.sort(dim=-1, descending=True)
        probabilities_AV = sorted_AV.softmax(dim=-1)
        likelier_AV = probabilities_AV.cumsum(dim=-1) - probabilities_AV
        beyond_AV = likelier_AV >= sampling.top_p
        beyond_AV[:, 0] = False  # the likeliest stays, even with a top_p that is 0 in float32
        excluded_AV = beyond_AV.scatter(1, order_AV, beyond_AV)
        logits_AV = logits_AV.masked_fill(excluded_AV, -torch.inf)
    return logits_AV
