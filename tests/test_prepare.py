"""Prepare: each prompt cut and tokenised once, each reference scored once, nothing lost when killed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.checkpoint import StageDir
from rlhf.config import Config
from rlhf.data import Example, load_examples, write_jsonl
from rlhf.environment import EnvironmentRow, load_environment, write_environment
from rlhf.errors import ConfigError, DataError, PrerequisiteError, StopRequested
from rlhf.partial import PartialResults
from rlhf.prompt import Post, encode_prompt, encode_response
from rlhf.scoring import Scorer
from rlhf.stages import prepare
from rlhf.stopping import StopSignal
from tests.fakes import rewarded_run, tiny_reward_model
from tests.tiny_run import byte_tokenizer, tiny_config


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return rewarded_run(tmp_path)


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences each call of the scorer was given."""
    calls: list[int] = []
    score = Scorer.score

    def counting(self: Scorer, sequences: Any, **settings: Any) -> torch.Tensor:
        calls.append(len(sequences))
        return score(self, sequences, **settings)

    monkeypatch.setattr(Scorer, "score", counting)
    return calls


def settings(**prompt: int) -> Config:
    tree = tiny_config().model_dump()
    return Config.model_validate(tree | {"prompt": tree["prompt"] | prompt, "prepare": {"batch_tokens": 512}})


def run(config: Config, run_dir: Path, stop: StopSignal | None = None) -> None:
    prepare.run(config, StageDir(run_dir, "prepare"), stop or StopSignal())


def posts(run_dir: Path, split: str) -> list[Example]:
    return load_examples(StageDir(run_dir, "fetch").final() / "data", split)


def put_posts(run_dir: Path, split: str, examples: list[Example]) -> None:
    """Publish fetch again with other posts."""
    stage = StageDir(run_dir, "fetch")
    others = {name: posts(run_dir, name) for name in ("train", "valid") if name != split}
    with stage.publish(1, final=True) as directory:
        (directory / "data").mkdir()
        for name, rows in (others | {split: examples}).items():
            write_jsonl(directory / "data" / f"posts-{name}.jsonl", (row.to_row() for row in rows))


def environment(run_dir: Path, split: str = "train") -> list[EnvironmentRow]:
    return load_environment(StageDir(run_dir, "prepare").final(), split)


def summary(run_dir: Path) -> dict[str, Any]:
    path = StageDir(run_dir, "prepare").final() / "summary.json"
    tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return tree


class Killed(BaseException):
    """As SIGKILL: nothing catches it."""


def killed_before_publishing(config: Config, run_dir: Path) -> None:
    """Leave a run whose scores are all there, and nothing published."""
    with pytest.MonkeyPatch.context() as patched:

        def publish(*args: Any) -> None:
            raise Killed

        patched.setattr(prepare, "publish", publish)
        with pytest.raises(Killed):
            run(config, run_dir)


def test_rows_hold_the_prompt_and_its_references_score(run_dir: Path) -> None:
    run(settings(), run_dir)
    tokenizer, scorer = byte_tokenizer(), Scorer(tiny_reward_model(), batch_tokens=512)
    for split in ("train", "valid"):
        examples, rows = posts(run_dir, split), environment(run_dir, split)
        assert [row.id for row in rows] == [example.post.id for example in examples]
        prompts = [encode_prompt(tokenizer, example.post, max_tokens=96) for example in examples]
        assert [(row.prompt_ids, row.cut_tokens) for row in rows] == [(p.ids, p.cut_tokens) for p in prompts]
        references = [encode_response(tokenizer, example.summary, max_tokens=24) for example in examples]
        expected = [float(scorer.score([p.ids + r])) for p, r in zip(prompts, references, strict=True)]
        assert [row.reference_score for row in rows] == pytest.approx(expected, abs=1e-4)


def test_summary_counts_what_was_cut(run_dir: Path) -> None:
    # One token a byte: "SUBREDDIT: r/pets\nTITLE: my cat\nPOST: I lost my cat\nTL;DR:" has 58 of them, so that
    # 60 hold the posts of "today" 0 times and a thing of up to four letters: numbers 0, 5, 10, 15, 20, 25.
    # " lost boss" with EOS has 11; longer are house and phone, numbers 3, 6, 11, 14, 19, 22.
    run(settings(max_prompt_tokens=60, max_response_tokens=11), run_dir)
    train, rows = summary(run_dir)["train"], environment(run_dir)
    assert (train["posts"], train["prompts"], train["cut_prompts"], train["cut_references"]) == (26, 26, 20, 6)
    assert [number for number, row in enumerate(rows) if row.cut_tokens == 0] == [0, 5, 10, 15, 20, 25]
    assert max(len(row.prompt_ids) for row in rows) <= 60
    mean = sum(row.reference_score for row in rows) / 26
    assert train["mean_reference_score"] == pytest.approx(mean)


def test_a_post_that_comes_twice_counts_once(run_dir: Path) -> None:
    examples = posts(run_dir, "train")[:4]
    put_posts(run_dir, "train", [*examples, replace(examples[1], summary="another reference")])
    run(settings(), run_dir)
    assert [row.id for row in environment(run_dir)] == [example.post.id for example in examples]
    assert summary(run_dir)["train"]["duplicates"] == 1


def test_references_that_cannot_be_scored_are_reported(
    run_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, empty, nan = posts(run_dir, "train")[:3]
    empty = replace(empty, summary=" \n")
    nan = replace(nan, summary="zzz")
    long = Example(Post("pets", "a title " * 20, "body"), "a summary", "writer")
    put_posts(run_dir, "train", [empty, nan, long, good])
    score = Scorer.score

    def broken(self: Scorer, sequences: list[list[int]], **options: Any) -> torch.Tensor:
        wrong = encode_response(byte_tokenizer(), "zzz")
        found = torch.tensor([sequence[-len(wrong) :] == wrong for sequence in sequences])
        return score(self, sequences, **options).masked_fill(found, math.nan)

    monkeypatch.setattr(Scorer, "score", broken)
    run(settings(), run_dir)
    assert [row.id for row in environment(run_dir)] == [good.post.id]
    left_out = {entry["id"]: entry["reason"] for entry in summary(run_dir)["train"]["left_out"]}
    assert left_out == {
        empty.post.id: "the reference summary is empty",
        nan.post.id: "the reference's score is not finite",
        long.post.id: "the header leaves no room for the post in 96 tokens",
    }
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert all(any(post_id in line for line in warnings) for post_id in left_out)
    assert not any("zzz" in line or "title" in line for line in warnings)


def test_scores_that_were_kept_know_which_is_not_finite(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = posts(run_dir, "train")[3].post.id

    def broken(self: Scorer, sequences: list[list[int]], **options: Any) -> torch.Tensor:
        first = encode_prompt(byte_tokenizer(), posts(run_dir, "train")[3].post, max_tokens=96).ids
        return torch.tensor([math.nan if tuple(ids[: len(first)]) == tuple(first) else 1.0 for ids in sequences])

    monkeypatch.setattr(Scorer, "score", broken)
    killed_before_publishing(settings(), run_dir)
    monkeypatch.setattr(Scorer, "score", None)
    run(settings(), run_dir)
    assert lost not in [row.id for row in environment(run_dir)]
    assert len(environment(run_dir)) == 25


@pytest.mark.parametrize("split", ["train", "valid"])
def test_no_usable_post_is_bad_data(run_dir: Path, split: str) -> None:
    put_posts(run_dir, split, [replace(example, summary="") for example in posts(run_dir, split)])
    with pytest.raises(DataError, match=f"no post of the {split} split can be used .* reference summary is empty"):
        run(settings(), run_dir)
    assert not StageDir(run_dir, "prepare").is_final()


def test_a_run_without_validation_posts_has_an_empty_environment_for_them(run_dir: Path) -> None:
    put_posts(run_dir, "valid", [])
    run(settings(), run_dir)
    assert environment(run_dir, "valid") == []
    assert summary(run_dir)["valid"]["mean_reference_score"] is None


@pytest.mark.parametrize("stage", ["fetch", "reward"])
def test_a_missing_stage_names_its_command(run_dir: Path, stage: str) -> None:
    (run_dir / stage / "final").unlink()
    with pytest.raises(PrerequisiteError, match=f"rlhf {stage} --run tiny"):
        run(settings(), run_dir)


def test_prompts_longer_than_the_reward_model_are_a_bad_setting(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompt\.max_prompt_tokens=120 .* 128 positions; lower them by 16"):
        run(settings(max_prompt_tokens=120), run_dir)


def test_what_is_scored_is_not_scored_again_and_gone_once_final(
    run_dir: Path, scored: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_before_publishing(settings(), run_dir)
    assert scored == [36]
    monkeypatch.setattr(prepare, "load_reward_model", None)
    run(settings(), run_dir)
    assert scored == [36]
    assert len(environment(run_dir)) == 26
    assert not (run_dir / "prepare" / prepare.PARTIAL).exists()


def test_another_reward_model_scores_anew(run_dir: Path, scored: list[int]) -> None:
    run(settings(), run_dir)
    before = environment(run_dir)
    (run_dir / "prepare").rename(run_dir / "before")
    killed_before_publishing(settings(), run_dir)
    with StageDir(run_dir, "reward").publish(2, final=True) as directory:
        tiny_reward_model(shift=1.25).save_pretrained(directory)
        byte_tokenizer().save_pretrained(directory)
    run(settings(), run_dir)
    assert scored == [36, 36, 36]
    expected = [row.reference_score - 1 for row in before]
    assert [row.reference_score for row in environment(run_dir)] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("how", ["kill", "stop", "torn line"])
def test_ended_after_every_chunk_it_gives_the_same_bits(
    run_dir: Path, scored: list[int], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(prepare, "CHUNK", 10)
    run(settings(), run_dir)
    undisturbed = published(run_dir)
    assert scored == [10, 10, 10, 6]
    (run_dir / "prepare").rename(run_dir / "undisturbed")
    scored.clear()

    stop, add, torn = StopSignal(), PartialResults.add, []

    def adding(self: PartialResults, key: str, value: Any) -> None:
        add(self, key, value)
        if how == "stop":
            stop.requested = True
            return
        path = run_dir / "prepare" / prepare.PARTIAL
        if how == "torn line" and not torn:
            torn.append(path.write_bytes(path.read_bytes()[:-30]))
        raise Killed

    for _ in range(5 if how == "torn line" else 4):
        stop.requested = False
        with monkeypatch.context() as patched, pytest.raises((Killed, StopRequested)):
            patched.setattr(PartialResults, "add", adding)
            run(settings(), run_dir, stop)
        assert not StageDir(run_dir, "prepare").is_final()
    run(settings(), run_dir)
    assert scored == ([10] if how == "torn line" else []) + [10, 10, 10, 6]
    assert published(run_dir) == undisturbed


def published(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in StageDir(run_dir, "prepare").final().iterdir()}


def test_progress_is_left_for_status(run_dir: Path) -> None:
    run(settings(), run_dir)
    state = json.loads((run_dir / "prepare" / "progress.json").read_text(encoding="utf-8"))
    assert (state["stage"], state["done"], state["total"], state["unit"]) == ("prepare", 36, 36, "posts")


def test_a_damaged_environment_names_its_file(tmp_path: Path) -> None:
    rows = [EnvironmentRow(id="a", prompt_ids=[1, 2], cut_tokens=0, reference_score=0.5)]
    write_environment(tmp_path, "train", rows)
    assert load_environment(tmp_path, "train") == rows
    write_jsonl(tmp_path / "environment-train.jsonl", [{"id": "a", "prompt": [1, 2]}])
    with pytest.raises(DataError, match=r"environment-train\.jsonl: row 1 has other keys"):
        load_environment(tmp_path, "train")
    with pytest.raises(DataError, match=r"environment-valid\.jsonl"):
        load_environment(tmp_path, "valid")
