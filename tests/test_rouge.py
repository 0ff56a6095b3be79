"""ROUGE against the numbers that Google Research published and ROUGE-1.5.5 gave."""

import json
import socket
from pathlib import Path
from typing import Any

import evaluate
import pytest

from rlhf.rouge import ROUGE_TYPES, OfflineRouge, rouge_scores


def test_counts_worked_out_by_hand() -> None:
    # "the cat sat" and "the cat ate fish": 2 of 3 and 2 of 4 words, F = 2·(2/3)(1/2)/(7/6) = 4/7;
    # bigrams: "the cat" of 2 and of 3, F = 2·(1/2)(1/3)/(5/6) = 0.4.
    scores = rouge_scores(["the cat sat"], ["the cat ate fish"])
    assert scores["rouge1"] == pytest.approx([4 / 7])
    assert scores["rouge2"] == pytest.approx([0.4])
    assert scores["rougeL"] == pytest.approx([4 / 7])


def test_stemming_is_off_unless_asked_for() -> None:
    assert rouge_scores(["running dogs"], ["runs dog"])["rouge1"] == [0.0]
    assert rouge_scores(["running dogs"], ["runs dog"], use_stemmer=True)["rouge1"] == [1.0]


def test_lsum_reads_a_sentence_a_line() -> None:
    # As one sequence, only one of the two sentences can be in order; as lines, both match.
    scores = rouge_scores(["a b c\nd e f"], ["d e f\na b c"])
    assert scores["rougeL"] == [0.5]
    assert scores["rougeLsum"] == [1.0]
    flat = rouge_scores(["a b c d e f"], ["d e f a b c"])
    assert flat["rougeLsum"] == flat["rougeL"] == [0.5]


def test_empty_text_scores_nothing() -> None:
    assert all(values == [0.0, 0.0] for values in rouge_scores(["", "a"], ["a", ""]).values())


def test_numbers_of_texts_must_agree() -> None:
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        rouge_scores(["a", "b"], ["a"])


def test_equals_the_published_vectors(shared_data: Path) -> None:
    cases = json.loads((shared_data / "rouge" / "published_vectors.json").read_text())
    assert len(cases) == 17
    for case in cases:
        scores = rouge_scores([case["prediction"]], [case["target"]], use_stemmer=case["stemmer"])
        assert scores[case["type"]][0] == pytest.approx(case["f"], abs=6e-6), case["type"]


def _real_pairs(shared_data: Path) -> list[dict[str, Any]]:
    lines = (shared_data / "rouge" / "vectors.jsonl").read_text().splitlines()
    assert len(lines) == 300
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("stem", [False, True])
def test_equals_rouge_score_on_real_pairs(shared_data: Path, stem: bool) -> None:
    cases = _real_pairs(shared_data)
    scores = rouge_scores([c["hyp"] for c in cases], [c["ref"] for c in cases], use_stemmer=stem)
    for kind in ("rouge1", "rouge2", "rougeL"):
        expected = [c["rouge_score_stem" if stem else "rouge_score_nostem"][kind][2] for c in cases]
        assert scores[kind] == pytest.approx(expected, abs=1e-6), kind


def test_equals_rouge155_on_real_pairs(shared_data: Path) -> None:
    # Only without stemming: the Perl script's Porter stemmer is an older one and parts from nltk's on some words.
    cases = _real_pairs(shared_data)
    scores = rouge_scores([c["hyp"] for c in cases], [c["ref"] for c in cases])
    for kind in ("rouge1", "rouge2", "rougeL"):
        assert scores[kind] == pytest.approx([c["rouge155_nostem"][kind][2] for c in cases], abs=2e-5), kind


def test_metric_gives_means_or_lists() -> None:
    metric = OfflineRouge()
    pairs = {"predictions": ["the cat sat", "a"], "references": ["the cat ate fish", "b"]}
    assert metric.compute(**pairs)["rouge1"] == pytest.approx(2 / 7)
    assert metric.compute(**pairs, use_aggregator=False) == rouge_scores(pairs["predictions"], pairs["references"])
    assert tuple(metric.compute(**pairs)) == ROUGE_TYPES


def test_metric_needs_no_network_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("ROUGE reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    OfflineRouge().compute(predictions=["a"], references=["a"])
    assert list(tmp_path.iterdir()) == []
