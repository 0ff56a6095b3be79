"""The report's figures: which numbers stand in which chart.

A chart without data is left out; a training without any metrics yields one line that says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from rlhf.charts import Bar, Point, Series, bar_chart, line_chart, number, reliability_chart, scatter_chart

Rows = Sequence[Mapping[str, Any]]

_MOST_DOTS = 400
_NAMES = {"sft": "SFT", "ppo": "PPO", "reference": "Reference", "lead": "Lead"}


@dataclass(frozen=True)
class Figure:
    """A chart with its caption."""

    title: str
    svg: Markup
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """A chart of one or two metrics over a training's steps."""

    title: str
    y_label: str
    metrics: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Training:
    """A stage with its curves."""

    stage: str
    title: str
    colour: str
    steps: str
    curves: tuple[Curve, ...]


TRAININGS = (
    Training(
        "sft",
        "Supervised fine-tuning",
        "sft",
        "optimiser steps",
        (
            Curve("Loss", "nats a token", (("sft/loss", "training"), ("sft/eval_loss", "held out"))),
            Curve("ROUGE-L of generated summaries", "F-measure, held out", (("sft/eval_rougeL", ""),)),
        ),
    ),
    Training(
        "reward",
        "Reward model",
        "reward",
        "optimiser steps",
        (
            Curve("Loss", "nats a pair", (("reward/loss", "training"), ("reward/eval_loss", "held out"))),
            Curve(
                "Accuracy",
                "share of held-out pairs",
                (("reward/accuracy", "judges’ choice"), ("reward/noise_free_accuracy", "true order")),
            ),
        ),
    ),
    Training(
        "ppo",
        "PPO",
        "ppo",
        "iterations",
        (
            Curve("Reward", "score minus reference's", (("ppo/reward", "rollouts"), ("ppo/eval_reward", "held out"))),
            Curve("KL to SFT", "nats a summary", (("ppo/kl", "rollouts"), ("ppo/eval_kl", "held out"))),
            Curve(
                "Length",
                "tokens a summary",
                (("ppo/response_tokens", "rollouts"), ("ppo/eval_response_tokens", "held out")),
            ),
            Curve("Entropy", "nats a token", (("ppo/entropy", ""),)),
            Curve("Ended by EOS", "share of summaries", (("ppo/ended", "rollouts"), ("ppo/eval_ended", "held out"))),
            Curve("Value function", "explained variance", (("ppo/explained_variance", ""),)),
        ),
    ),
)


def training_figures(training: Training, metrics: Rows) -> list[Figure]:
    """The learning curves that a stage's metrics allow."""
    figures = []
    for curve in training.curves:
        found = [(label, points) for key, label in curve.metrics if (points := _curve(metrics, key))]
        if not found:
            continue
        # The first of two is dense and noisy, the second is looked at now and then.
        series = [
            Series(name=label, colour=training.colour, points=points, dashed=index > 0)
            for index, (label, points) in enumerate(found)
        ]
        svg = line_chart(f"{training.title}: {curve.title}", series, x_label=training.steps, y_label=curve.y_label)
        figures.append(Figure(curve.title, Markup(svg)))
    return figures


def reward_against_kl(metrics: Rows) -> Iterator[Figure]:
    """Each evaluation of PPO as a point: what reward costs in distance from SFT."""
    evaluations = [
        row for row in metrics if row.get("ppo/eval_reward") is not None and row.get("ppo/eval_kl") is not None
    ]
    if len(evaluations) < 2:
        return
    series = Series(
        name="",
        colour="ppo",
        points=[(row["ppo/eval_kl"], row["ppo/eval_reward"]) for row in evaluations],
        hints=[
            f"iteration {row['step']}: KL {number(row['ppo/eval_kl'])}, reward {number(row['ppo/eval_reward'])}"
            for row in evaluations
        ],
    )
    title = "Reward against KL"
    svg = scatter_chart(
        title,
        [series],
        x_label="KL to SFT, nats a summary",
        y_label="reward, held out",
        joined=True,
        radius=4,
    )
    yield Figure(title, Markup(svg), "An evaluation of PPO a dot, in the order of training.")


def length_against_reward(samples: Rows) -> Iterator[Figure]:
    """Does the reward model pay for length?"""
    if not samples:
        return
    every = -(-len(samples) // _MOST_DOTS)
    chosen = samples[::every]
    series = [
        Series(
            name=_NAMES[key],
            colour=key,
            points=[(s[f"tokens_{key}"], s[f"score_{key}"]) for s in chosen],
            hints=[f"{_NAMES[key]}: {s[f'tokens_{key}']} tokens, score {s[f'score_{key}']:.2f}" for s in chosen],
        )
        for key in ("sft", "ppo")
    ]
    title = "Length against reward"
    svg = scatter_chart(title, series, x_label="length, tokens", y_label="score")
    shown = f"{len(chosen)} of {len(samples)} posts." if every > 1 else "Every test post."
    yield Figure(title, Markup(svg), f"One dot a summary. {shown}")


def reliability(metrics: Mapping[str, Any]) -> Iterator[Figure]:
    """Does the reward model's confidence match how often it is right?"""
    bins = [(b["confidence"], b["accuracy"], int(b["count"])) for b in metrics.get("reliability", []) if b["count"]]
    if not bins:
        return
    title = "Reliability of the reward model"
    yield Figure(title, Markup(reliability_chart(title, bins)), _accuracy_note(metrics))


def rouge_figures(rows: Mapping[str, Any]) -> Iterator[Figure]:
    """ROUGE of SFT, PPO and lead, with intervals."""
    for kind, name in (("rouge1", "ROUGE-1"), ("rouge2", "ROUGE-2"), ("rougeL", "ROUGE-L")):
        bars = [
            Bar(name=_NAMES[key], colour=key, value=found["mean"], low=found["low"], high=found["high"])
            for key in ("sft", "ppo", "lead")
            if (found := rows[key][kind])
        ]
        if bars:
            title = f"{name} against the reference"
            yield Figure(name, Markup(bar_chart(title, bars)))


def _curve(metrics: Rows, key: str) -> list[Point]:
    return [(row["step"], row[key]) for row in metrics if row.get(key) is not None]


def _accuracy_note(metrics: Mapping[str, Any]) -> str:
    percent = {key: f"{100 * value:.1f}\u00a0%" for key, value in metrics.items() if isinstance(value, float)}
    parts = [
        f"On the dashed line, confidence is earned; expected calibration error {metrics['reward/ece']:.3f}.",
        f"Right on {percent['reward/accuracy']} of {metrics['reward/pairs']} held-out pairs "
        f"({percent['reward/accuracy_low']} to {percent['reward/accuracy_high']}); "
        f"“the longer one wins” is right on {percent['reward/longer_wins']}.",
    ]
    if "reward/noise_free_accuracy" in metrics:
        parts.append(
            f"Against the true order, without the judges’ errors: {percent['reward/noise_free_accuracy']} and "
            f"{percent['reward/noise_free_longer_wins']}."
        )
    return " ".join(parts)
