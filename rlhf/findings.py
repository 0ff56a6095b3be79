"""What the report says in words, in its tiles and in its table.

All take the contents of results.json (see `rlhf.stages.evaluate`), or None where the evaluation has not finished.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROW_NAMES = {"sft": "SFT", "ppo": "PPO", "reference": "Reference", "lead": "Lead"}


@dataclass(frozen=True)
class Column:
    """A column of the table: results key, heading, unit, what it means, factor and digits."""

    key: str
    name: str
    unit: str
    meaning: str
    factor: float = 1
    digits: int = 2


COLUMNS = (
    Column("rouge1", "ROUGE‑1", "F", "overlap of words with the reference", digits=3),
    Column("rouge2", "ROUGE‑2", "F", "overlap of word pairs with the reference", digits=3),
    Column("rougeL", "ROUGE‑L", "F", "longest common subsequence with the reference", digits=3),
    Column("reward", "Reward", "score", "the reward model's score; references average 0 on held-out posts"),
    Column("delta_reward", "Over reference", "score", "score minus the score of the post's reference"),
    Column("gold", "Gold", "points", "correct less wrong facts less a cost of length; not seen in training", digits=1),
    Column("win_rate_vs_sft", "Wins vs SFT", "%", "share of posts that score above SFT’s summary", 100, 1),
    Column("lc_win_rate_vs_sft", "at equal length", "%", "the same, read at equal length", 100, 1),
    Column("win_rate_vs_reference", "Wins vs ref.", "%", "share of posts that score above the reference", 100, 1),
    Column("lc_win_rate_vs_reference", "at equal length", "%", "the same, read at equal length", 100, 1),
    Column("kl", "KL to SFT", "nats a summary", "on summaries sampled from the policy", digits=1),
    Column("length_tokens", "Length", "tokens", "without EOS", digits=1),
)  # fmt: skip


def headline(results: Mapping[str, Any] | None) -> str:
    """What changed, in one sentence."""
    if results is None:
        return "This run is not finished: what there is so far"
    win = results["rows"]["ppo"]["win_rate_vs_sft"]
    verdict = "not clearly different from"
    if win["low"] > 0.5:
        verdict = "better than"
    elif win["high"] < 0.5:
        verdict = "worse than"
    return (
        f"To the reward model, PPO’s summaries are {verdict} SFT’s: "
        f"they win {_percent(win)} of the time (95\u00a0% interval {_percent_range(win)})"
    )


def details(results: Mapping[str, Any] | None) -> str:
    """The sentence below the headline: what the gain rests on and what it cost."""
    if results is None:
        return ""
    sft, ppo, comparisons = results["rows"]["sft"], results["rows"]["ppo"], results["comparisons"]
    parts = []
    if gold := comparisons["gold_gain"]:
        parts.append(f"On the gold score, which training never saw, they gain {_signed(gold, 1)} points.")
    parts.append(
        f"At equal length they win {_percent(ppo['lc_win_rate_vs_sft'])}; the mean length went from "
        f"{sft['length_tokens']['mean']:.0f} to {ppo['length_tokens']['mean']:.0f} tokens, ROUGE-L from "
        f"{sft['rougeL']['mean']:.3f} to {ppo['rougeL']['mean']:.3f}, at {ppo['kl']['mean']:.1f} nats of KL to SFT."
    )
    return " ".join(parts)


def subtitle(results: Mapping[str, Any] | None) -> str:
    """What was evaluated, in a few words."""
    if results is None:
        return "learning to summarise from human feedback"
    settings = results["settings"]
    decoding = "greedy decoding" if settings["temperature"] == 0 else f"sampled at {settings['temperature']}"
    return f"{settings['posts']} test posts, {decoding}, seed {settings['seed']}"


def tiles(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """The handful of numbers that a reader looks for first: name, value, note."""
    ppo, gains = results["rows"]["ppo"], results["comparisons"]
    shown = []
    if gold := gains["gold_gain"]:
        shown.append({"name": "Gold score gained", "value": _signed(gold, 1), "note": _signed_range(gold, 1)})
    reward, win, rouge, length = (
        gains["reward_gain"],
        ppo["win_rate_vs_sft"],
        gains["rougeL_gain"],
        gains["length_gain"],
    )
    shown += [
        {"name": "Reward gained", "value": _signed(reward, 2), "note": _signed_range(reward, 2)},
        {"name": "Wins against SFT", "value": _percent(win), "note": _percent_range(win)},
        {"name": "Change in ROUGE-L", "value": _signed(rouge, 3), "note": _signed_range(rouge, 3)},
        {"name": "KL to SFT", "value": f"{ppo['kl']['mean']:.1f}", "note": "nats a summary"},
        {"name": "Change in length", "value": _signed(length, 1), "note": "tokens a summary"},
    ]
    return shown


def table(results: Mapping[str, Any]) -> dict[str, Any]:
    """Columns and rows of the table; a column without any value is left out."""
    rows = results["rows"]
    columns = [column for column in COLUMNS if any(row.get(column.key) for row in rows.values())]
    lines = []
    for key, name in ROW_NAMES.items():
        cells = [_cell(rows[key].get(column.key), column) for column in columns]
        ended = rows[key]["ended"]
        cells.append({"value": "–" if ended is None else f"{100 * ended:.1f}", "interval": "", "half": ""})
        lines.append({"key": key, "name": name, "cells": cells})
    columns.append(Column("ended", "Ended", "% by EOS", "summaries that ended before the limit of tokens"))
    return {"columns": columns, "rows": lines}


def _cell(interval: Mapping[str, float] | None, column: Column) -> dict[str, str]:
    if interval is None:
        return {"value": "–", "interval": "", "half": ""}
    mean, low, high = (_minus(f"{column.factor * interval[end]:.{column.digits}f}") for end in ("mean", "low", "high"))
    if interval["low"] == interval["high"]:
        return {"value": mean, "interval": "", "half": ""}
    half = column.factor * (interval["high"] - interval["low"]) / 2
    return {"value": mean, "interval": f"{low} to {high}", "half": f"{half:.{column.digits}f}"}


def table_note(results: Mapping[str, Any]) -> str:
    """What the table's rows and columns mean."""
    sentences = results["settings"]["lead_sentences"]
    lead = "the post’s first sentence" if sentences == 1 else f"the post’s first {sentences} sentences"
    return (
        f"Lead is {lead}. Rewards, wins and gains are the learned reward model’s opinion. "
        "Wins at equal length come from a logistic regression on the difference in length."
    )


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _percent(interval: Mapping[str, float]) -> str:
    return f"{100 * interval['mean']:.0f}\u00a0%"


def _percent_range(interval: Mapping[str, float]) -> str:
    return f"{100 * interval['low']:.0f} to {100 * interval['high']:.0f}\u00a0%"


def _signed(interval: Mapping[str, float], digits: int) -> str:
    return _minus(f"{interval['mean']:+.{digits}f}")


def _signed_range(interval: Mapping[str, float], digits: int) -> str:
    return _minus(f"{interval['low']:+.{digits}f} to {interval['high']:+.{digits}f}")
