"""The evaluation's numbers as text: the table a run ends with, and the comparison of several runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.checkpoint import StageDir

ROW_NAMES = {"sft": "SFT", "ppo": "PPO", "reference": "reference", "lead": "lead"}
Results = Mapping[str, Any]


def read_results(run_dir: Path) -> dict[str, Any]:
    """results.json of a run; PrerequisiteError when its evaluation has not finished."""
    text = (StageDir(run_dir, "evaluate").final() / "results.json").read_text(encoding="utf-8")
    results: dict[str, Any] = json.loads(text)
    return results


def results_table(results: Results) -> str:
    """SFT, PPO, reference and lead against ROUGE, reward, win rate, KL, length and, if known, gold score.

    A figure in brackets is half the width of the 95 % interval. Two lines below say what PPO gained.
    """
    columns = [
        ("ROUGE-1", "rouge1", 1, 3),
        ("ROUGE-2", "rouge2", 1, 3),
        ("ROUGE-L", "rougeL", 1, 3),
        ("reward", "reward", 1, 2),
        ("wins vs SFT %", "win_rate_vs_sft", 100, 0),
        ("at equal length", "lc_win_rate_vs_sft", 100, 0),
        ("wins vs ref. %", "win_rate_vs_reference", 100, 0),
        ("KL, nats", "kl", 1, 1),
        ("tokens", "length_tokens", 1, 1),
    ]
    rows = results["rows"]
    if any(row["gold"] for row in rows.values()):
        columns.append(("gold", "gold", 1, 1))
    cells = [["summaries by", *(title for title, *_ in columns)]]
    for key, name in ROW_NAMES.items():
        cells.append([name, *(_cell(rows[key][column], factor, digits) for _, column, factor, digits in columns)])
    lines = _aligned(cells)
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([*lines, "", *_gain_lines(results["comparisons"]), _posts_line(results)])


def comparison_table(run_dirs: Sequence[Path]) -> str:
    """A line a run: what PPO gained over SFT, at what KL, and how good the reward model is."""
    cells = [
        ["run", "gold gain", "reward gain", "wins vs SFT %", "KL, nats", "tokens", "reward model right % (longer wins)"]
    ]
    gold_gains = []
    for run_dir in run_dirs:
        results = read_results(run_dir)
        gain, ppo = results["comparisons"], results["rows"]["ppo"]
        if gain["gold_gain"]:
            gold_gains.append(gain["gold_gain"]["mean"])
        cells.append(
            [
                run_dir.name,
                _range(gain["gold_gain"], 1),
                _range(gain["reward_gain"], 2),
                _cell(ppo["win_rate_vs_sft"], 100, 0),
                _cell(ppo["kl"], 1, 1),
                _cell(ppo["length_tokens"], 1, 1),
                _reward_model_cell(results["reward_model"]),
            ]
        )
    lines = _aligned(cells)
    lines.insert(1, "-" * len(lines[0]))
    if len(gold_gains) > 1:
        lines.append(f"\ngold gain, average of {len(gold_gains)} runs: {sum(gold_gains) / len(gold_gains):+.1f}")
    return "\n".join(lines)


def _gain_lines(comparisons: Mapping[str, Any]) -> list[str]:
    lines = [f"PPO minus SFT, same posts: reward {_range(comparisons['reward_gain'], 2)}"]
    if comparisons["gold_gain"]:
        lines[0] += f", gold {_range(comparisons['gold_gain'], 1)}"
    return lines


def _posts_line(results: Results) -> str:
    return f"{results['settings']['posts']} test posts; ± and brackets: 95 % bootstrap intervals"


def _reward_model_cell(metrics: Mapping[str, Any]) -> str:
    prefix = "reward/noise_free_" if "reward/noise_free_accuracy" in metrics else "reward/"
    if f"{prefix}accuracy" not in metrics:
        return "–"  # imported: nobody has measured it here
    return f"{100 * metrics[f'{prefix}accuracy']:.1f} ({100 * metrics[f'{prefix}longer_wins']:.1f})"


def _cell(interval: Mapping[str, float] | None, factor: float, digits: int) -> str:
    if interval is None:
        return "–"
    half = (interval["high"] - interval["low"]) / 2
    return f"{factor * interval['mean']:.{digits}f} ±{factor * half:.{digits}f}"


def _range(interval: Mapping[str, float] | None, digits: int) -> str:
    if interval is None:
        return "–"
    return f"{interval['mean']:+.{digits}f} [{interval['low']:+.{digits}f}, {interval['high']:+.{digits}f}]"


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    ]
