"""The report: safe against what strangers write, complete in itself, and honest about what is missing."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from rlhf.charts import Bar, Series, bar_chart, line_chart, number, reliability_chart, scale, scatter_chart
from rlhf.checkpoint import StageDir
from rlhf.findings import details, headline, table
from rlhf.report import embed_json, render_report, write_report

HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> & \u2028 'quoted' \"twice\""


def interval(mean: float, spread: float = 0.1) -> dict[str, float]:
    return {"mean": mean, "low": mean - spread, "high": mean + spread}


def row(**changes: Any) -> dict[str, Any]:
    nothing = dict.fromkeys(("gold", "kl", "ended", "win_rate_vs_sft", "lc_win_rate_vs_sft"))
    others = dict.fromkeys(("win_rate_vs_reference", "lc_win_rate_vs_reference", "delta_reward"))
    rouge = {kind: interval(0.3) for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum")}
    return nothing | others | rouge | {"reward": interval(1.0), "length_tokens": interval(25.0, 1.0)} | changes


def results(win: float = 0.8) -> dict[str, Any]:
    rivals = {"win_rate_vs_sft": interval(win), "lc_win_rate_vs_sft": interval(win - 0.05)}
    return {
        "rows": {
            "sft": row(kl=interval(0.0, 0.0), ended=0.97),
            "ppo": row(kl=interval(8.6), ended=1.0, **rivals),
            "reference": row(rouge1=None, rouge2=None, rougeL=None, rougeLsum=None),
            "lead": row(reward=interval(-1.25)),
        },
        "comparisons": {
            "reward_gain": interval(1.5),
            "gold_gain": None,
            "rougeL_gain": interval(-0.02, 0.01),
            "length_gain": interval(4.0),
        },
        "reward_model": {"reward/accuracy": 0.7, "reward/longer_wins": 0.6},
        "settings": {"posts": 2, "temperature": 0.0, "seed": 1, "lead_sentences": 2},
    }


def sample(**changes: Any) -> dict[str, Any]:
    texts = {"id": "a", "subreddit": "pets", "title": "my cat", "post": "I lost it.", "reference": "cat lost"}
    scores = {"score_sft": 0.5, "score_ppo": 2.0, "score_reference": 0.0, "score_lead": -1.0}
    lengths = {"tokens_sft": 5, "tokens_ppo": 7, "tokens_reference": 2, "tokens_lead": 9}
    rouge = {"rouge1_sft": 0.25, "rouge1_ppo": 0.5}
    return texts | {"sft": "lost", "ppo": "a lost cat", "lead": "I lost it."} | scores | lengths | rouge | changes


def write_metrics(run_dir: Path, stage: str, rows: list[dict[str, float]]) -> None:
    (run_dir / stage).mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"time": 0.0, **one}) + "\n" for one in rows)
    (run_dir / stage / "metrics.jsonl").write_text(text)


def finished_run(run_dir: Path, samples: list[dict[str, Any]]) -> Path:
    write_metrics(run_dir, "sft", [{"step": s, "sft/loss": 3 / s} for s in range(1, 60)])
    write_metrics(run_dir, "reward", [{"step": s, "reward/loss": 0.7 / s} for s in range(1, 4)])
    write_metrics(run_dir, "ppo", [{"step": s, "ppo/eval_reward": s, "ppo/eval_kl": 2 * s} for s in range(3)])
    bins = [{"confidence": 0.6, "accuracy": 0.5, "count": 30}, {"confidence": 0.0, "accuracy": 0.0, "count": 0}]
    scalars = {"accuracy": 0.7, "accuracy_low": 0.6, "accuracy_high": 0.8, "longer_wins": 0.6, "pairs": 30, "ece": 0.1}
    metrics = {f"reward/{key}": value for key, value in scalars.items()} | {"reliability": bins}
    with StageDir(run_dir, "reward").publish(1, final=True) as folder:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    with StageDir(run_dir, "evaluate").publish(1, final=True) as folder:
        (folder / "results.json").write_text(json.dumps(results()))
        lines = (json.dumps(one, ensure_ascii=False) + "\n" for one in samples)
        (folder / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    return run_dir


class Page(HTMLParser):
    """Collects elements, attributes and the contents of scripts as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.scripts: list[str] = []
        self.ids: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script":
            self.scripts[-1] += data


def test_what_strangers_write_stays_text(tmp_path: Path) -> None:
    samples = [sample(title=HOSTILE, post=HOSTILE, ppo=HOSTILE, subreddit=HOSTILE), sample()]
    page = Page(render_report(finished_run(tmp_path / "demo", samples)))
    assert page.tags.count("script") == 2
    assert "img" not in page.tags
    shown = json.loads(page.scripts[0])
    assert [shown[0][key] for key in ("title", "post", "ppo", "subreddit")] == [HOSTILE] * 4
    assert shown[0]["gain"] == 1.5
    assert shown[0]["longer"] == 2
    assert "innerHTML" not in page.scripts[1]


def test_embedded_json_has_no_character_that_html_reads() -> None:
    assert re.search(r"[<>&\u2028\u2029]", embed_json([HOSTILE])) is None
    assert json.loads(embed_json([HOSTILE])) == [HOSTILE]


def test_needs_nothing_from_anywhere(tmp_path: Path) -> None:
    html = render_report(finished_run(tmp_path / "demo", [sample()]))
    page = Page(html)
    assert page.addresses
    assert all(address.startswith("#") for address in page.addresses)
    assert "link" not in page.tags
    assert not re.search(r"url\(|@import|https?://|fetch\(|XMLHttpRequest|import\(", html)


def test_every_link_leads_somewhere_and_ids_are_unique(tmp_path: Path) -> None:
    page = Page(render_report(finished_run(tmp_path / "demo", [sample()])))
    assert {address[1:] for address in page.addresses} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_all_figures_are_there_and_well_formed(tmp_path: Path) -> None:
    html = render_report(finished_run(tmp_path / "demo", [sample()]))
    figures = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]
    assert [figure.get("aria-label") for figure in figures] == [
        "Supervised fine-tuning: Loss",
        "Reward model: Loss",
        "PPO: Reward",
        "PPO: KL to SFT",
        "Reward against KL",
        "Length against reward",
        "Reliability of the reward model",
        "ROUGE-1 against the reference",
        "ROUGE-2 against the reference",
        "ROUGE-L against the reference",
    ]


def test_reward_model_is_held_against_the_longer_one(tmp_path: Path) -> None:
    html = render_report(finished_run(tmp_path / "demo", [sample()])).replace("\u00a0", " ")
    assert "Right on 70.0 % of 30 held-out pairs (60.0 % to 80.0 %); “the longer one wins” is right on 60.0 %." in html
    assert "expected calibration error 0.100" in html


def test_unfinished_run_names_what_is_missing(tmp_path: Path) -> None:
    write_metrics(tmp_path / "demo", "sft", [{"step": 1, "sft/loss": 3.0}])
    html = write_report(tmp_path / "demo").read_text(encoding="utf-8")
    assert "This run is not finished" in html
    assert "Supervised fine-tuning: Loss" in html
    for missing in ("reward has not run", "ppo has not run", "evaluation has not finished", "No samples yet"):
        assert missing in html
    assert Page(html).tags.count("script") == 0


def test_run_without_anything_still_renders(tmp_path: Path) -> None:
    assert "sft has not run" in render_report(tmp_path)


def test_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    run_dir = tmp_path / "demo"
    write_report(run_dir)
    path = write_report(finished_run(run_dir, [sample()]))
    assert path == run_dir / "report" / "index.html"
    assert "not finished" not in path.read_text(encoding="utf-8")
    assert list(path.parent.iterdir()) == [path]


def test_an_evaluation_that_is_not_final_yet_is_shown(tmp_path: Path) -> None:
    run_dir = finished_run(tmp_path / "demo", [sample()])
    folder = run_dir / "evaluate" / ".work"
    (run_dir / "evaluate" / "final").resolve().rename(folder)
    assert "not finished" in write_report(run_dir).read_text(encoding="utf-8")
    assert "not finished" not in write_report(run_dir, evaluation=folder).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("win", "verdict"), [(0.8, "better than"), (0.2, "worse than"), (0.55, "not clearly different from")]
)
def test_headline_goes_by_the_interval(win: float, verdict: str) -> None:
    assert verdict in headline(results(win))


def test_details_give_length_and_cost() -> None:
    text = details(results())
    assert "At equal length they win 75\u00a0%" in text
    assert "from 25 to 25 tokens" in text
    assert "8.6 nats" in text
    assert "gold" not in text


def test_table_leaves_out_columns_without_a_value_and_marks_empty_cells() -> None:
    shown = table(results())
    names = [column.name for column in shown["columns"]]
    assert "Gold" not in names
    reference = shown["rows"][2]
    assert reference["name"] == "Reference"
    assert reference["cells"][0] == {"value": "–", "interval": "", "half": ""}
    lead_reward = shown["rows"][3]["cells"][names.index("Reward")]
    assert lead_reward == {"value": "−1.25", "interval": "−1.35 to −1.15", "half": "0.10"}
    wins = shown["rows"][1]["cells"][names.index("Wins vs SFT")]
    assert wins["value"] == "80.0"


def test_scale_ends_on_round_numbers() -> None:
    axis = scale([0.13, 0.87], 0.0, 100.0, count=4)
    assert axis.ticks == pytest.approx((0.0, 0.2, 0.4, 0.6, 0.8, 1.0))
    assert axis(0.5) == pytest.approx(50.0)
    assert scale([0.0, 430.0], 0.0, 1.0, count=5).ticks == (0, 100, 200, 300, 400, 500)


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0])
def test_a_curve_that_stays_the_same_has_an_axis(value: float) -> None:
    axis = scale([value], 0.0, 100.0)
    assert 0.0 < axis(value) < 100.0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (-0.0, "0"), (0.25, "0.25"), (-1.5, "−1.5"), (123.4, "123"), (25000, "25k"), (2.5e6, "2.5M")],
)
def test_numbers_read_easily(value: float, text: str) -> None:
    assert number(value) == text


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    points = [(float(step), float(step)) for step in range(5000)]
    svg = line_chart("t", [Series(name="", colour="sft", points=points)], x_label="steps", y_label="y")
    hints = re.findall(r"<title>(.*?)</title>", svg)
    assert len(hints) == 240
    assert (hints[0], hints[-1]) == ("steps 0: 0", "steps 4999: 4999")


def test_labels_of_two_curves_that_end_together_do_not_overlap() -> None:
    series = [Series(name=name, colour="sft", points=[(0.0, 0.0), (1.0, 1.0)]) for name in ("a", "b")]
    svg = ElementTree.fromstring(line_chart("t", series, x_label="x", y_label="y"))
    heights = [float(text.get("y", "")) for text in svg.iter("text") if "value" in text.get("class", "")]
    assert abs(heights[0] - heights[1]) >= 12


def test_names_in_charts_are_escaped() -> None:
    series = [Series(name="<b>", colour="sft", points=[(0.0, 1.0)], hints=["<i>&"])]
    bar = Bar(name="<b>", colour="sft", value=0.5, low=0.4, high=0.6)
    for svg in (scatter_chart("<t>", series, x_label="<x>", y_label="&"), bar_chart("<t>", [bar])):
        assert "&lt;b&gt;" in svg
        ElementTree.fromstring(svg)


def test_bar_has_the_length_of_its_value() -> None:
    bars = [Bar(name=n, colour="sft", value=v, low=v, high=v) for n, v in (("a", 0.2), ("b", 0.4))]
    svg = ElementTree.fromstring(bar_chart("t", bars))
    widths = [float(rect.get("width", "")) for rect in svg.iter("rect")]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)


def test_reliability_dots_grow_with_their_count() -> None:
    svg = ElementTree.fromstring(reliability_chart("t", [(0.6, 0.5, 10), (0.8, 0.8, 1000)]))
    radii = [float(dot.get("r", "")) for dot in svg.iter("circle")]
    assert radii == pytest.approx([2.5 + 7 * 0.1, 9.5])
