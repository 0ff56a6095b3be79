"""The report: one HTML file that opens from disk and needs nothing beside it.

`<run>/report/index.html` holds the table, learning curves, the reward model's reliability and the samples. It can be
written at any time: what a run does not have yet is named instead of shown.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from rlhf.checkpoint import StageDir
from rlhf.figures import (
    TRAININGS,
    Figure,
    length_against_reward,
    reliability,
    reward_against_kl,
    rouge_figures,
    training_figures,
)
from rlhf.findings import details, headline, subtitle, table, table_note, tiles
from rlhf.pipeline import saved_config
from rlhf.storage import write_text_atomically
from rlhf.telemetry import read_metrics

ORDERS = (
    ("gain", "down", "reward gained by PPO, most first"),
    ("gain", "up", "reward lost by PPO, most first"),
    ("gold_gain", "down", "gold score gained, most first"),
    ("gold_gain", "up", "gold score lost, most first"),
    ("longer", "down", "PPO longer than SFT, most first"),
    ("longer", "up", "PPO shorter than SFT, most first"),
    ("rouge1_ppo", "down", "ROUGE-1 of PPO, highest first"),
    ("index", "up", "order of the test split"),
)


def write_report(run_dir: Path, *, evaluation: Path | None = None) -> Path:
    """Write `<run>/report/index.html` from whatever the run has; returns its path.

    evaluation is a directory with the evaluation's files, where it is not `evaluate/final` yet.
    """
    path = run_dir / "report" / "index.html"
    write_text_atomically(path, render_report(run_dir, evaluation=evaluation))
    return path


def render_report(run_dir: Path, *, evaluation: Path | None = None) -> str:
    """The report's HTML; `evaluation` as in `write_report`."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    stage = StageDir(run_dir, "evaluate")
    folder = evaluation or (stage.final() if stage.is_final() else None)
    results, samples = None, []
    if folder is not None:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        samples = [_sample(index, row) for index, row in enumerate(_json_lines(folder / "samples.jsonl"))]
    sections = _figure_sections(run_dir, results, samples)
    return environment.from_string(_template("report.html.j2")).render(
        run=run_dir.name,
        subtitle=subtitle(results),
        headline=headline(results),
        details=details(results),
        sections=_anchors(sections),
        tiles=tiles(results) if results else [],
        table=table(results) if results else None,
        table_note=table_note(results) if results else "",
        posts=results["settings"]["posts"] if results else 0,
        figure_sections=sections,
        sample_count=len(samples),
        orders=_orders(samples),
        settings=_settings(run_dir),
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        data=embed_json(samples),
        css=Markup(_template("report.css")),
        script=Markup(_template("report.js")),
    )


def embed_json(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in, whatever the texts say."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _figure_sections(
    run_dir: Path, results: Mapping[str, Any] | None, samples: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    curves = []
    for training in TRAININGS:
        figures = training_figures(training, read_metrics(run_dir / training.stage / "metrics.jsonl"))
        missing = "" if figures else f"No metrics yet: {training.stage} has not run."
        curves.append({"title": training.title, "figures": figures, "missing": missing})
    trade = [*reward_against_kl(read_metrics(run_dir / "ppo" / "metrics.jsonl")), *length_against_reward(samples)]
    trust = list(reliability(_reward_metrics(run_dir)))
    rouge = list(rouge_figures(results["rows"])) if results else []
    return [
        _section("learning", "Learning curves", curves),
        _section("tradeoffs", "What the reward is made of", [_group(trade + trust, _missing(trade, trust))]),
        _section("rouge", "ROUGE", [_group(rouge, "" if rouge else "ROUGE comes with the evaluation.")]),
    ]


def _missing(trade: Sequence[Figure], trust: Sequence[Figure]) -> str:
    titles = {figure.title for figure in (*trade, *trust)}
    absent = [
        f"{title} {when}"
        for title, when in (
            ("Reward against KL", "needs two evaluations of PPO"),
            ("Length against reward", "comes with the evaluation"),
            ("Reliability of the reward model", "comes with the reward model"),
        )
        if title not in titles
    ]
    return "; ".join(absent) + "." if absent else ""


def _section(anchor: str, title: str, groups: list[dict[str, Any]]) -> dict[str, Any]:
    return {"anchor": anchor, "title": title, "groups": groups}


def _group(figures: Sequence[Figure], missing: str) -> dict[str, Any]:
    return {"title": "", "figures": figures, "missing": missing}


def _anchors(sections: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    middle = [(section["anchor"], section["title"]) for section in sections]
    return [("results", "Results"), *middle, ("samples", "Samples")]


def _reward_metrics(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "reward" / "final" / "metrics.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _settings(run_dir: Path) -> str:
    path = saved_config(run_dir)
    return path.read_text(encoding="utf-8") if path else ""


def _sample(index: int, row: dict[str, Any]) -> dict[str, Any]:
    derived = {
        "index": index,
        "gain": row["score_ppo"] - row["score_sft"],
        "longer": row["tokens_ppo"] - row["tokens_sft"],
    }
    if row.get("gold_ppo") is not None:
        derived["gold_gain"] = row["gold_ppo"] - row["gold_sft"]
    return {key: round(v, 4) if isinstance(v, float) else v for key, v in (row | derived).items()}


def _orders(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    known = samples[0] if samples else {}
    return [{"key": key, "direction": way, "name": name} for key, way, name in ORDERS if key in known]


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _template(name: str) -> str:
    return (resources.files("rlhf") / "templates" / name).read_text(encoding="utf-8")
