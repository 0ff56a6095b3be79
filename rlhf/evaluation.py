"""What the evaluation says about four kinds of summaries: means with intervals, win rates, gains.

N posts of the test split. Pure functions over numbers; `rlhf.stages.evaluate` makes the summaries.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.bootstrap import Interval, bootstrap_mean, bootstrap_statistic
from rlhf.prompt import Post

Floats = NDArray[np.float64]

ROWS = ("sft", "ppo", "reference", "lead")
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|\n+")
_RIDGE = 0.01
_NEWTON_STEPS = 50


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One kind of summary, a value a post.

    score_N is the reward model's published score; tokens_N counts without EOS; rouge maps a ROUGE type to its
    F-measures and is empty for the references; gold_N is None where the posts' facts are not known; kl_N and
    kl_k3_N are two estimates of the KL to SFT in nats a summary.
    """

    score_N: Floats
    tokens_N: Floats
    words_N: Floats
    rouge: Mapping[str, Floats]
    ended_N: Floats | None = None
    gold_N: Floats | None = None
    kl_N: Floats | None = None
    kl_k3_N: Floats | None = None


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """How intervals are taken."""

    samples: int
    seed: int

    def mean(self, values_N: Floats | None) -> dict[str, float] | None:
        """Mean and interval as they stand in results.json; None stays None."""
        if values_N is None:
            return None
        return bootstrap_mean(values_N, samples=self.samples, seed=self.seed).to_dict()


def lead_summary(body: str, sentences: int) -> str:
    """The first sentences of a post: the baseline that costs nothing."""
    pieces: list[str] = []
    start = 0
    for end in [*(match.end() for match in _SENTENCE_END.finditer(body)), len(body)]:
        if piece := body[start:end].strip():
            pieces.append(piece)
        start = end
    return " ".join(pieces[:sentences])


def row_results(measured: Mapping[str, Measured], name: str, resampling: Resampling) -> dict[str, Any]:
    """One row of the table; what has no meaning for it is None. See `rlhf.stages.evaluate` for the keys."""
    row = measured[name]
    reference_score_N = measured["reference"].score_N
    delta_N = None if name == "reference" else row.score_N - reference_score_N
    results: dict[str, Any] = {
        kind: resampling.mean(row.rouge.get(kind)) for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum")
    }
    results |= {"reward": resampling.mean(row.score_N), "delta_reward": resampling.mean(delta_N)}
    for other in ("sft", "reference"):
        plain, controlled = (None, None)
        if other != name:
            plain, controlled = win_rates(row, measured[other], resampling)
        results[f"win_rate_vs_{other}"] = plain
        results[f"lc_win_rate_vs_{other}"] = controlled
    results |= {
        "kl": resampling.mean(row.kl_N),
        "kl_k3": resampling.mean(row.kl_k3_N),
        "length_tokens": resampling.mean(row.tokens_N),
        "length_words": resampling.mean(row.words_N),
        "ended": None if row.ended_N is None else float(row.ended_N.mean()),
        "gold": resampling.mean(row.gold_N),
    }
    return results


def gains(ppo: Measured, sft: Measured, resampling: Resampling) -> dict[str, Any]:
    """PPO minus SFT on the same posts; pairing takes the posts' own difficulty out of the interval."""
    both_gold = ppo.gold_N is not None and sft.gold_N is not None
    return {
        "reward_gain": resampling.mean(ppo.score_N - sft.score_N),
        "gold_gain": resampling.mean(ppo.gold_N - sft.gold_N) if both_gold else None,  # type: ignore[operator]
        "rougeL_gain": resampling.mean(ppo.rouge["rougeL"] - sft.rouge["rougeL"]),
        "length_gain": resampling.mean(ppo.tokens_N - sft.tokens_N),
    }


def win_rates(ours: Measured, theirs: Measured, resampling: Resampling) -> tuple[dict[str, float], dict[str, float]]:
    """The share of posts on which ours scores higher, plain and at equal length, with intervals."""
    win_N = wins(ours.score_N, theirs.score_N)
    plain = bootstrap_mean(win_N, samples=resampling.samples, seed=resampling.seed)
    longer_N = length_feature(ours.tokens_N, theirs.tokens_N)
    fitted = fit_logistic(win_N, longer_N)

    def at_equal_length(index: NDArray[np.int64]) -> float:
        # Starting from the fit to all posts, a resample needs two or three steps.
        return float(_sigmoid(fit_logistic(win_N[index], longer_N[index], start=fitted)[0]))

    controlled: Interval = bootstrap_statistic(
        at_equal_length, len(win_N), samples=resampling.samples, seed=resampling.seed
    )
    return plain.to_dict(), controlled.to_dict()


def wins(ours_N: Floats, theirs_N: Floats) -> Floats:
    """1 where ours scores higher, 0 where theirs does, 0.5 for a tie."""
    return np.where(ours_N == theirs_N, 0.5, (ours_N > theirs_N).astype(np.float64))


def length_feature(ours_N: Floats, theirs_N: Floats) -> Floats:
    """tanh of the length difference in its own standard deviations; 0 at equal length."""
    difference_N = ours_N - theirs_N
    deviation = float(difference_N.std())
    if deviation == 0.0:
        # The same difference everywhere says nothing about the effect of length: leave it out.
        return np.zeros_like(difference_N)
    return np.tanh(difference_N / deviation)


def fit_logistic(outcome_N: Floats, feature_N: Floats, *, start: Floats | None = None) -> Floats:
    """Intercept and slope of P(win) = σ(intercept + slope · feature), by Newton's method.

    The intercept is the log-odds of a win at equal length. Outcomes may be 0.5. A faint ridge keeps the fit
    finite when one side wins every time.
    Source: AlpacaEval's length-controlled win rate, Dubois et al. 2024, equation 2, without its terms for the
    model's identity and the instruction's difficulty, which need several models to estimate.
    """
    design_N2 = np.stack([np.ones_like(feature_N), feature_N], axis=1)
    weights = np.zeros(2) if start is None else start
    for _ in range(_NEWTON_STEPS):
        chance_N = _sigmoid(design_N2 @ weights)
        gradient = design_N2.T @ (outcome_N - chance_N) - _RIDGE * weights
        curvature = (design_N2.T * (chance_N * (1 - chance_N))) @ design_N2 + _RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        # A full step from far away can overshoot where the curve is flat.
        weights = weights + step * min(1.0, 3.0 / max(float(np.abs(step).max()), 1e-12))
        if np.abs(step).max() < 1e-6:
            break
    return weights


def word_counts(texts: Sequence[str]) -> Floats:
    """Words of each text, split at white space."""
    return np.array([len(text.split()) for text in texts], dtype=np.float64)


def sample_rows(
    posts: Sequence[Post], texts: Mapping[str, Sequence[str]], measured: Mapping[str, Measured]
) -> list[dict[str, Any]]:
    """A row a post, for people to read."""
    rows = []
    for index, post in enumerate(posts):
        row: dict[str, Any] = {
            "id": post.id,
            "subreddit": post.subreddit,
            "title": post.title,
            "post": post.body,
        }
        row |= {name: texts[name][index] for name in ROWS}
        for name in ROWS:
            one = measured[name]
            row |= {f"score_{name}": float(one.score_N[index]), f"tokens_{name}": int(one.tokens_N[index])}
            if one.rouge:
                row[f"rouge1_{name}"] = float(one.rouge["rouge1"][index])
            if one.gold_N is not None:
                row[f"gold_{name}"] = float(one.gold_N[index])
        rows.append(row)
    return rows


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as CSV with a header."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _sigmoid(x: Any) -> Any:
    return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(x)))
