"""The evaluation: its arithmetic by hand, and the whole stage on a tiny run."""

import csv
import io
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from rlhf import passes
from rlhf.checkpoint import StageDir
from rlhf.config import Config, TinyModelConfig
from rlhf.data import write_jsonl
from rlhf.errors import DataError, PrerequisiteError, StopRequested, StorageError
from rlhf.evaluation import (
    ROWS,
    Measured,
    Resampling,
    as_csv,
    fit_logistic,
    gains,
    lead_summary,
    length_feature,
    row_results,
    sample_rows,
    win_rates,
    wins,
)
from rlhf.generation import BuiltinEngine, Sampling, summarize
from rlhf.likelihood import response_logprobs
from rlhf.models import create_tiny_gptj, load_policy, reward_model_from_policy
from rlhf.partial import PartialResults
from rlhf.presets import load_config
from rlhf.prompt import Post
from rlhf.results import comparison_table, read_results, results_table
from rlhf.runtime import generator
from rlhf.stages import evaluate
from rlhf.stopping import StopSignal
from tests.tiny_run import byte_tokenizer, examples

RESAMPLING = Resampling(samples=200, seed=1)


def measured(scores: list[float], tokens: list[float] | None = None, **changes: Any) -> Measured:
    tokens_N = np.array(tokens or [10.0] * len(scores))
    rouge = {kind: np.full(len(scores), 0.5) for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum")}
    return Measured(score_N=np.array(scores), tokens_N=tokens_N, words_N=tokens_N, **({"rouge": rouge} | changes))


@pytest.mark.parametrize(
    ("body", "sentences", "lead"),
    [
        ("One. Two! Three?", 2, "One. Two!"),
        ("One\n\nTwo. Three.", 2, "One Two."),
        ("He said “no.” Then left. End.", 1, "He said “no.”"),
        ("It cost 3.50 dollars. Really.", 1, "It cost 3.50 dollars."),
        ("no end at all", 3, "no end at all"),
    ],
)
def test_lead_is_the_first_sentences(body: str, sentences: int, lead: str) -> None:
    assert lead_summary(body, sentences) == lead


def test_a_tie_is_half_a_win() -> None:
    assert wins(np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 2.0])).tolist() == [0.0, 0.5, 1.0]


def test_logistic_fit_equals_the_closed_form() -> None:
    # With a feature of ±1 the fit passes through both shares, 0.9 and 0.2: logits 2.19722 and −1.38629.
    outcomes = np.array([1.0] * 900 + [0.0] * 100 + [1.0] * 200 + [0.0] * 800)
    intercept, slope = fit_logistic(outcomes, np.array([1.0] * 1000 + [-1.0] * 1000))
    assert intercept == pytest.approx((2.19722 - 1.38629) / 2, abs=1e-3)
    assert slope == pytest.approx((2.19722 + 1.38629) / 2, abs=1e-3)


def test_logistic_fit_stays_finite_when_one_side_always_wins() -> None:
    weights = fit_logistic(np.ones(50), np.linspace(-1, 1, 50))
    assert np.isfinite(weights).all()
    assert weights[0] > 4


def test_wins_by_length_alone_vanish_at_equal_length() -> None:
    # 60 posts where ours is 8 tokens longer and wins 9 times in 10; 20 where it is 8 shorter and loses as often.
    ours = measured([1.0] * 54 + [-1.0] * 6 + [1.0] * 2 + [-1.0] * 18, [18.0] * 60 + [2.0] * 20)
    theirs = measured([0.0] * 80)
    plain, controlled = win_rates(ours, theirs, RESAMPLING)
    assert plain["mean"] == pytest.approx(56 / 80)
    assert controlled["mean"] == pytest.approx(0.5, abs=0.08)
    assert controlled["low"] < 0.5 < controlled["high"]


def test_at_one_and_the_same_length_difference_both_win_rates_agree() -> None:
    ours = measured([1.0] * 30 + [-1.0] * 10, [15.0] * 40)
    plain, controlled = win_rates(ours, measured([0.0] * 40), RESAMPLING)
    assert plain["mean"] == 0.75
    assert controlled["mean"] == pytest.approx(0.75, abs=1e-3)


def test_length_feature_is_zero_at_equal_length() -> None:
    feature = length_feature(np.array([10.0, 12.0, 8.0]), np.array([10.0, 10.0, 10.0]))
    # Differences 0, 2, −2 have deviation 1.63299; tanh(1.22474) = 0.84105.
    assert feature == pytest.approx([0.0, 0.84105, -0.84105], abs=1e-5)


def test_gains_are_taken_post_by_post() -> None:
    sft = measured([0.0, 5.0, -3.0, 8.0], gold_N=np.array([10.0, 20.0, 30.0, 40.0]))
    ppo = measured([1.5, 6.5, -1.5, 9.5], [12.0] * 4, gold_N=np.array([20.0, 20.0, 40.0, 40.0]))
    found = gains(ppo, sft, RESAMPLING)
    assert found["reward_gain"] == {"mean": 1.5, "low": 1.5, "high": 1.5}
    assert found["gold_gain"]["mean"] == 5.0
    assert found["length_gain"]["mean"] == 2.0
    assert gains(measured([1.0]), measured([0.0]), RESAMPLING)["gold_gain"] is None


def test_a_row_is_null_where_a_number_has_no_meaning() -> None:
    rows = {"sft": measured([1.0, 2.0]), "reference": measured([0.0, 4.0], rouge={})}
    reference = row_results(rows, "reference", RESAMPLING)
    assert reference["rouge1"] is reference["delta_reward"] is reference["win_rate_vs_reference"] is None
    assert reference["gold"] is reference["kl"] is reference["ended"] is None
    assert reference["win_rate_vs_sft"]["mean"] == 0.5
    sft = row_results(rows, "sft", RESAMPLING)
    assert sft["win_rate_vs_sft"] is None
    assert sft["delta_reward"]["mean"] == -0.5
    assert sft["rouge1"] == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_csv_keeps_commas_quotes_and_line_breaks() -> None:
    post = Post(subreddit="a,b", title='say "x"', body="one\ntwo")
    texts = {name: ["x, y\nz"] for name in ROWS}
    rows = sample_rows([post], texts, dict.fromkeys(ROWS, measured([1.25])))
    read = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert read[0]["post"] == "one\ntwo"
    assert read[0]["ppo"] == "x, y\nz"
    assert read[0]["score_lead"] == "1.25"


def write_policy(run_dir: Path, stage: str, seed: int) -> None:
    tokenizer = byte_tokenizer()
    shape = TinyModelConfig(layers=2, hidden=32, heads=2, rotary_dim=8, vocab_size=260)
    ids = {"eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id}
    with StageDir(run_dir, stage).publish(1, final=True) as folder:
        create_tiny_gptj(shape, positions=160, vocab_size=260, seed=seed, **ids).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def finished_training(run_dir: Path, *, ppo_seed: int = 2, facts: bool = True) -> Path:
    """A run up to PPO, with random weights."""
    rows = [example.to_row() for example in examples(0, 12)]
    for number, row in enumerate(rows):
        row["extra"] = {"facts": [number]} if facts else {}
    with StageDir(run_dir, "fetch").publish(0, final=True) as folder:
        (folder / "data").mkdir()
        write_jsonl(folder / "data" / "posts-test.jsonl", rows)
    write_policy(run_dir, "sft", 1)
    write_policy(run_dir, "ppo", ppo_seed)
    with StageDir(run_dir, "reward").publish(1, final=True) as folder:
        reward_model_from_policy(run_dir / "sft" / "final", seed=3).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        (folder / "metrics.json").write_text('{"reward/accuracy": 0.75, "reward/longer_wins": 0.5}')
    return run_dir


def config(*overrides: str) -> Config:
    settings = [
        "prompt.max_prompt_tokens=96",
        "prompt.max_response_tokens=24",
        "runtime.device=cpu",
        "runtime.precision=float32",
        "evaluate.bootstrap_samples=100",
        "evaluate.batch_size=5",
        "evaluate.max_posts=11",
    ]
    return load_config("gptj-6b", [*settings, *overrides])


def run(settings: Config, run_dir: Path, stop: StopSignal | None = None) -> None:
    evaluate.run(settings, StageDir(run_dir, "evaluate"), stop or StopSignal())


@pytest.fixture(autouse=True)
def _gold_by_first_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "gold_score", lambda facts, summary: float(facts[0]))


def test_stage_writes_results_samples_table_and_report(tmp_path: Path) -> None:
    run_dir = finished_training(tmp_path / "tiny")
    run(config(), run_dir)
    folder = StageDir(run_dir, "evaluate").final()
    results = json.loads((folder / "results.json").read_text())
    rows = results["rows"]
    assert tuple(rows) == ROWS
    assert results["settings"]["posts"] == 11
    assert results["reward_model"]["reward/accuracy"] == 0.75
    assert rows["sft"]["kl"]["mean"] == 0.0
    assert rows["ppo"]["kl"]["mean"] > 0.1
    assert rows["ppo"]["kl_k3"]["mean"] > 0.1
    assert rows["ppo"]["gold"]["mean"] == 5.0
    assert results["comparisons"]["gold_gain"]["mean"] == 0.0
    # Every lead here is the whole post, "I lost my …", and the reference is "lost …".
    assert rows["lead"]["rouge1"]["mean"] > 0.3
    assert rows["reference"]["length_words"]["mean"] == 2.0
    difference = rows["ppo"]["reward"]["mean"] - rows["reference"]["reward"]["mean"]
    assert rows["ppo"]["delta_reward"]["mean"] == pytest.approx(difference)

    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    with (folder / "summaries.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["id"] for row in table] == [row["id"] for row in samples]
    assert len({row["id"] for row in samples}) == 11
    assert samples[0]["reference"] == "lost cat"
    gain = np.mean([row["score_ppo"] - row["score_sft"] for row in samples])
    assert results["comparisons"]["reward_gain"]["mean"] == pytest.approx(gain)

    assert "11 test posts" in (run_dir / "report" / "index.html").read_text(encoding="utf-8")
    text = results_table(read_results(run_dir))
    assert [line.split()[0] for line in text.splitlines()[2:6]] == ["SFT", "PPO", "reference", "lead"]
    assert "gold" in text
    assert comparison_table([run_dir]).splitlines()[2].split()[-2:] == ["75.0", "(50.0)"]
    progress = json.loads((run_dir / "evaluate" / "progress.json").read_text())
    assert progress["done"] == progress["total"]


def test_a_policy_that_is_sft_gains_nothing(tmp_path: Path) -> None:
    run_dir = finished_training(tmp_path / "tiny", ppo_seed=1, facts=False)
    run(config(), run_dir)
    results = read_results(run_dir)
    ppo = results["rows"]["ppo"]
    assert ppo["win_rate_vs_sft"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert ppo["kl"]["mean"] == pytest.approx(0.0, abs=1e-5)
    assert results["comparisons"]["reward_gain"]["mean"] == 0.0
    assert results["comparisons"]["gold_gain"] is None
    assert "gold" not in results_table(results)


def test_same_seed_same_results(tmp_path: Path) -> None:
    sampled = config("evaluate.temperature=1.0", "evaluate.max_posts=6")
    texts = []
    for name in ("one", "two"):
        run_dir = finished_training(tmp_path / name)
        run(sampled, run_dir)
        folder = StageDir(run_dir, "evaluate").final()
        texts.append((folder / "results.json").read_text() + (folder / "samples.jsonl").read_text())
    assert texts[0] == texts[1]


def test_missing_ppo_is_named(tmp_path: Path) -> None:
    run_dir = finished_training(tmp_path / "tiny")
    (run_dir / "ppo" / "final").unlink()
    with pytest.raises(PrerequisiteError, match="rlhf ppo --run tiny"):
        run(config(), run_dir)


def test_a_signal_stops_it_and_nothing_half_done_is_published(tmp_path: Path) -> None:
    run_dir, stop = finished_training(tmp_path / "tiny"), StopSignal()
    stop.requested = True
    with pytest.raises(StopRequested):
        run(config(), run_dir, stop)
    assert not StageDir(run_dir, "evaluate").is_final()
    assert not (run_dir / "report").exists()


class Killed(BaseException):
    """As SIGKILL: nothing catches it."""


def files(run_dir: Path) -> dict[str, bytes]:
    """What an evaluation has published, and its report without the time it was written."""
    folder = StageDir(run_dir, "evaluate").final()
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    html = (run_dir / "report" / "index.html").read_text(encoding="utf-8")
    return found | {"report": re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", html).encode()}


def interrupt_at_every_chunk(monkeypatch: pytest.MonkeyPatch, how: str) -> StopSignal:
    """Have every process end after the first chunk that it computes; returns the next process's signal."""
    stop, add = StopSignal(), PartialResults.add

    def adding(self: PartialResults, key: str, value: Any) -> None:
        add(self, key, value)
        if how == "torn line":
            path = self._path
            path.write_bytes(path.read_bytes()[:-9])
        if how == "stop":
            stop.request()
        else:
            raise Killed

    monkeypatch.setattr(PartialResults, "add", adding)
    return stop


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_ended_after_every_chunk_it_gives_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    sampled = config("evaluate.temperature=1.0", "evaluate.batch_size=6", "evaluate.batch_tokens=600")
    undisturbed = finished_training(tmp_path / "one" / "tiny")
    run(sampled, undisturbed)
    run_dir = finished_training(tmp_path / "two" / "tiny")
    kept: list[int] = []
    while not StageDir(run_dir, "evaluate").is_final():
        with monkeypatch.context() as patched, suppress(Killed, StopRequested):
            run(sampled, run_dir, interrupt_at_every_chunk(patched, how))
        partial = run_dir / "evaluate" / evaluate.PARTIAL
        kept.append(partial.read_bytes().count(b"\n") if partial.exists() else -1)
    # Each process added one chunk: 5 passes of 2, 4 of scores; the last one had only to count and publish.
    assert kept == [*range(1, len(kept)), -1]
    assert len(kept) > 5 * 2 + 4
    assert files(run_dir) == files(undisturbed)


def test_what_is_written_for_a_post_is_scored_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = finished_training(tmp_path / "tiny")
    asked: list[list[list[int]]] = []
    real = passes.Scorer.score

    def score(scorer: passes.Scorer, sequences: list[list[int]]) -> torch.Tensor:
        asked.append(sequences)
        return real(scorer, sequences)

    monkeypatch.setattr(passes.Scorer, "score", score)
    run(config("evaluate.batch_tokens=600"), run_dir)
    alone = passes.Scorer(passes.load_reward_model(run_dir / "reward" / "final"), batch_tokens=1)
    with (StageDir(run_dir, "evaluate").final() / "samples.jsonl").open() as lines:
        rows = [json.loads(line) for line in lines]
    told = sorted(tuple(row[f"score_{name}"] for name in ROWS) for row in rows)
    groups = [sequences[start : start + 4] for sequences in asked for start in range(0, len(sequences), 4)]
    assert len(asked) == 4
    assert [len(group) for group in groups] == [4] * 11
    found = sorted(tuple(float(real(alone, [ids])) for ids in group) for group in groups)
    assert np.array(told) == pytest.approx(np.array(found), abs=1e-5)


def test_a_line_torn_by_the_kill_is_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = finished_training(tmp_path / "one" / "tiny")
    run(config(), undisturbed)
    run_dir = finished_training(tmp_path / "two" / "tiny")
    with monkeypatch.context() as patched:
        stop = interrupt_at_every_chunk(patched, "torn line")
        with pytest.raises(Killed):
            run(config(), run_dir, stop)
    assert not (run_dir / "evaluate" / evaluate.PARTIAL).read_bytes().endswith(b"\n")
    run(config(), run_dir)
    assert files(run_dir) == files(undisturbed)


def test_a_model_is_loaded_only_when_its_results_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = finished_training(tmp_path / "tiny")
    loaded: list[str] = []
    for name in ("load_policy", "load_reward_model"):
        load = getattr(passes, name)

        def noting(path: Path, *, load: Any = load, **settings: Any) -> PreTrainedModel:
            loaded.append(path.parent.name)
            return load(path, **settings)

        monkeypatch.setattr(passes, name, noting)
    publish = evaluate.publish
    monkeypatch.setattr(evaluate, "publish", raising(Killed))
    with pytest.raises(Killed):
        run(config(), run_dir)
    assert loaded == ["ppo", "sft", "reward"]
    monkeypatch.setattr(evaluate, "publish", publish)
    run(config(), run_dir)
    assert loaded == ["ppo", "sft", "reward"]


def raising(error: type[BaseException]) -> Any:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    return fail


def test_what_is_final_has_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = finished_training(tmp_path / "tiny")
    point = StageDir.point

    def pointing(self: StageDir, name: str, target: str) -> None:
        if (self.stage, name) == ("evaluate", "final"):
            html = (run_dir / "report" / "index.html").read_text(encoding="utf-8")
            assert "11 test posts" in html
            raise Killed
        point(self, name, target)

    monkeypatch.setattr(StageDir, "point", pointing)
    with pytest.raises(Killed):
        run(config(), run_dir)
    monkeypatch.setattr(StageDir, "point", point)
    assert not StageDir(run_dir, "evaluate").is_final()
    run(config(), run_dir)
    assert read_results(run_dir)["settings"]["posts"] == 11


def test_a_report_that_cannot_be_written_leaves_nothing_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = finished_training(tmp_path / "tiny")
    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "write_report", raising(StorageError))
        with pytest.raises(StorageError):
            run(config(), run_dir)
    assert not StageDir(run_dir, "evaluate").is_final()
    (run_dir / "report").mkdir()
    (run_dir / "report" / ".unfinished-index.html-0").write_text("half")
    run(config(), run_dir)
    assert [path.name for path in (run_dir / "report").iterdir()] == ["index.html"]
    assert not (run_dir / "evaluate" / evaluate.PARTIAL).exists()


def test_posts_that_cannot_fit_are_data_errors(tmp_path: Path) -> None:
    run_dir = finished_training(tmp_path / "tiny")
    with pytest.raises(DataError, match=r"none of 11 test posts fits prompt\.max_prompt_tokens=20"):
        run(config("prompt.max_prompt_tokens=20"), run_dir)


def tiny_policy(run_dir: Path) -> tuple[PreTrainedModel, list[list[int]], int, int]:
    write_policy(run_dir, "sft", 1)
    path = run_dir / "sft" / "final"
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = [tokenizer(text)["input_ids"] for text in ("a", "a longer prompt", "three words here, or more")]
    return load_policy(path), prompts, tokenizer.eos_token_id, tokenizer.pad_token_id


def test_likelihood_equals_what_the_sampler_saw_and_ignores_padding(tmp_path: Path) -> None:
    policy, prompts, eos_id, pad_id = tiny_policy(tmp_path)
    engine = BuiltinEngine(policy, eos_id=eos_id, pad_id=pad_id)
    sampling = Sampling(max_new_tokens=9, temperature=0.7)
    generation = engine.generate(prompts, sampling, generator=generator(1, 0))
    responses = [
        row[mask].tolist() for row, mask in zip(generation.response_BR, generation.response_mask_BR, strict=True)
    ]
    together = response_logprobs(policy, prompts, responses, temperature=0.7, batch_size=3)
    alone = response_logprobs(policy, prompts, responses, temperature=0.7, batch_size=1)
    for row, response in enumerate(responses):
        assert len(together[row]) == len(response)
        torch.testing.assert_close(together[row], generation.logprobs_BR[row, : len(response)], atol=1e-4, rtol=0)
        torch.testing.assert_close(together[row], alone[row], atol=1e-4, rtol=0)


def test_likelihood_reports_progress_and_keeps_the_order(tmp_path: Path) -> None:
    policy, prompts, eos_id, pad_id = tiny_policy(tmp_path)
    engine = BuiltinEngine(policy, eos_id=eos_id, pad_id=pad_id)
    seen: list[int] = []
    responses = summarize(engine, prompts, Sampling(max_new_tokens=4, temperature=0.0), batch_size=3).responses
    logprobs = response_logprobs(policy, prompts, responses, temperature=1.0, batch_size=2, on_progress=seen.append)
    assert seen == [2, 3]
    ids = torch.tensor([prompts[1] + responses[1]])
    plain = policy(input_ids=ids).logits.log_softmax(-1)[0, len(prompts[1]) - 1 : -1]
    expected = plain.gather(-1, torch.tensor(responses[1]).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(logprobs[1], expected.detach(), atol=1e-4, rtol=0)
