"""The fetch stage: files onto the volume, facts about them, and one clear line for whatever is wrong."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTJForSequenceClassification,
    PreTrainedModel,
)

from rlhf import hub
from rlhf.checkpoint import StageDir, sha256
from rlhf.config import Config
from rlhf.data import Comparison, Example, load_comparisons, load_examples
from rlhf.errors import ConfigError, DataError, PrerequisiteError, RlhfError
from rlhf.prompt import Post, encode_prompt
from rlhf.stages import fetch
from rlhf.stopping import StopSignal
from rlhf.tokenizer import train_tokenizer

BODY = "My neighbour's cat comes by every evening and sings. Nobody in the house can sleep any more."


def prompt(number: int, body: str = BODY) -> str:
    return f"SUBREDDIT: r/cats\nTITLE: Night {number}\nPOST: {body}\nTL;DR:"


def post_row(number: int, split: str = "train", **changes: Any) -> dict[str, Any]:
    return {"prompt": prompt(number), "label": f"cat number {number} sings at night", "split": split, **changes}


def pair_row(number: int, split: str = "train", **changes: Any) -> dict[str, Any]:
    pair = {"chosen": "TL;DR: the cat sings every night", "rejected": "TL;DR: it is a story about things"}
    return {"prompt": prompt(number).removesuffix("\nTL;DR:"), **pair, "split": split, **changes}


def good_posts() -> list[dict[str, Any]]:
    return [post_row(n, "train" if n < 8 else "valid" if n < 10 else "test") for n in range(12)]


def good_pairs() -> list[dict[str, Any]]:
    return [pair_row(n, "train" if n < 6 else "valid", source="judges", margin=n / 2) for n in range(8)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def configured(folder: Path, *, base: str = "tiny", data: dict[str, Any] | None = None, **sections: Any) -> Config:
    files = {
        "posts": write(folder / "p.jsonl", good_posts()),
        "comparisons": write(folder / "c.jsonl", good_pairs()),
    }
    tiny = {"layers": 1, "hidden": 16, "heads": 2, "rotary_dim": 4, "vocab_size": 300}
    tree = {"data": {**files, **(data or {})}, "model": {"base": base, "tiny": tiny}, **sections}
    return Config.model_validate(tree)


def fetched(config: Config, folder: Path) -> Path:
    fetch.run(config, StageDir(folder / "run", "fetch"), StopSignal())
    return StageDir(folder / "run", "fetch").final()


def summary_of(final: Path) -> dict[str, Any]:
    return json.loads((final / "data/summary.json").read_text())


def test_records_are_published_in_canonical_form(tmp_path: Path) -> None:
    final = fetched(configured(tmp_path), tmp_path)
    train = load_examples(final / "data", "train")
    assert train[3] == Example(Post("cats", "Night 3", BODY), "cat number 3 sings at night", "p.jsonl")
    assert [len(load_examples(final / "data", split)) for split in ("train", "valid", "test")] == [8, 2, 2]
    assert load_comparisons(final / "data", "valid")[0] == Comparison(
        *(Post("cats", "Night 6", BODY), "the cat sings every night", "it is a story about things", "judges"),
        margin=3.0,
    )
    assert len(load_comparisons(final / "data", "train")) == 6


def test_the_summary_tells_what_was_kept_and_dropped_and_how_long_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    posts = [*good_posts(), post_row(1), post_row(11, "train"), post_row(12, label="")]
    pairs = [*good_pairs(), pair_row(1, chosen="same five words are here", rejected="TL;DR: same five words are here")]
    config = configured(
        tmp_path,
        data={
            "posts": write(tmp_path / "p2.jsonl", posts),
            "comparisons": write(tmp_path / "c2.jsonl", pairs),
            "max_bad_fraction": 0.1,
        },
        prompt={"max_prompt_tokens": 60, "max_response_tokens": 8},
    )
    with caplog.at_level(logging.INFO, logger="rlhf"):
        final = fetched(config, tmp_path)
    facts = summary_of(final)
    assert (facts["posts"]["rows"], facts["posts"]["bad"], facts["posts"]["bad_reasons"]) == (
        15,
        1,
        {"the label is empty": 1},
    )
    train = facts["posts"]["splits"]["train"]
    assert (train["kept"], train["dropped"]) == (8, {"duplicate": 1, "leak: also in a held-out split": 1})
    assert train["sha256"] == sha256(final / "data/posts-train.jsonl")
    # 3 words for `SUBREDDIT: r/cats TITLE:`, 2 for the title, `POST:`, 17 of the body, `TL;DR:`.
    assert train["lengths"]["prompt"]["words"] == {"mean": 24.0, "p50": 24.0, "p95": 24.0, "max": 24.0}
    assert train["lengths"]["summary"]["words"]["max"] == 6.0
    assert train["lengths"]["prompt"]["tokens"]["max"] > 60
    assert (train["prompts_cut"], train["responses_cut"]) == (8, 8)
    assert facts["comparisons"]["splits"]["train"]["dropped"] == {"equal summaries": 1}
    assert set(facts["comparisons"]["splits"]["valid"]["lengths"]) == {"prompt", "chosen", "rejected"}
    assert "read key=data.posts rows=15 bad=1 reasons={'the label is empty': 1}" in caplog.messages
    assert not [message for message in caplog.messages if "sings" in message]


def test_token_lengths_are_those_of_the_published_tokenizer(tmp_path: Path) -> None:
    final = fetched(configured(tmp_path), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(final / "base")
    lengths = [len(encode_prompt(tokenizer, e.post, max_tokens=500).ids) for e in load_examples(final / "data", "test")]
    tokens = summary_of(final)["posts"]["splits"]["test"]["lengths"]["prompt"]["tokens"]
    assert tokens["max"] == max(lengths)
    assert tokens["mean"] == sum(lengths) / 2


def test_the_tiny_base_fits_its_tokenizer_and_prompts(tmp_path: Path) -> None:
    config = configured(tmp_path, prompt={"max_prompt_tokens": 100, "max_response_tokens": 20})
    final = fetched(config, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(final / "base")
    tokenizer = AutoTokenizer.from_pretrained(final / "base")
    assert (final / "base/model.safetensors").is_file()
    assert (model.config.model_type, model.config.n_positions, model.config.prompt_version) == ("gptj", 120, "tldr-1")
    assert len(tokenizer) <= model.config.vocab_size < len(tokenizer) + 8
    assert (model.config.eos_token_id, model.config.pad_token_id) == (0, 1)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)


def test_the_same_seed_gives_the_same_bits(tmp_path: Path) -> None:
    config = configured(tmp_path, data={"max_train_posts": 4})
    first, second = fetched(config, tmp_path), None
    fetch.run(config, StageDir(tmp_path / "again", "fetch"), StopSignal())
    second = StageDir(tmp_path / "again", "fetch").final()
    names = ["base/model.safetensors", "base/tokenizer.json", "data/posts-train.jsonl", "data/summary.json"]
    assert [(first / name).read_bytes() == (second / name).read_bytes() for name in names] == [True] * 4


def test_caps_hold(tmp_path: Path) -> None:
    caps = {"max_train_posts": 3, "max_valid_posts": 1, "max_test_posts": 1}
    caps |= {"max_train_comparisons": 2, "max_valid_comparisons": 1}
    splits = summary_of(fetched(configured(tmp_path, data=caps), tmp_path))
    assert [facts["kept"] for facts in splits["posts"]["splits"].values()] == [3, 1, 1]
    assert [facts["kept"] for facts in splits["comparisons"]["splits"].values()] == [2, 1]
    assert splits["posts"]["splits"]["train"]["dropped"] == {"over the cap": 5}


def test_the_demos_world_is_published_as_it_is_made(tmp_path: Path) -> None:
    sizes = {"train_posts": 30, "valid_posts": 5, "test_posts": 6, "train_comparisons": 12, "valid_comparisons": 7}
    config = configured(tmp_path, data={"posts": "synthetic", "comparisons": "synthetic"}, synthetic=sizes)
    final = fetched(config, tmp_path)
    assert [len(load_examples(final / "data", split)) for split in ("train", "valid", "test")] == [30, 5, 6]
    assert len(load_comparisons(final / "data", "valid")) > 0
    assert load_examples(final / "data", "test")[0].extra


def test_synthetic_posts_do_not_mix_with_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`synthetic` cannot be mixed with other sources"):
        fetched(configured(tmp_path, data={"posts": ["synthetic", "more.jsonl"]}), tmp_path)


def test_a_header_that_cannot_fit_is_a_bad_row_with_its_line(tmp_path: Path) -> None:
    long_title = prompt(20).replace("Night 20", "why " * 100)
    posts = write(tmp_path / "p2.jsonl", [*good_posts(), post_row(20, prompt=long_title)])
    config = configured(tmp_path, data={"posts": posts}, prompt={"max_prompt_tokens": 80})
    with pytest.raises(DataError, match=r"p2.jsonl:13: a prompt that cannot fit: .* in 80 tokens .*; 1 of 13 rows"):
        fetched(config, tmp_path)


def test_bad_rows_end_with_exit_code_65_and_leave_nothing(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps(good_posts()[0]) + '\n{"prompt": \n')
    with pytest.raises(
        DataError, match=r"broken.jsonl:2: invalid JSON: .*; 1 of 2 rows of data.posts are bad"
    ) as raised:
        fetched(configured(tmp_path, data={"posts": str(path)}), tmp_path)
    assert raised.value.exit_code == 65
    assert not (tmp_path / "run/fetch").exists()


@pytest.mark.parametrize(
    ("key", "rows", "message"),
    [
        ("posts", [], "no usable row for the train split (0 rows read"),
        ("posts", good_posts()[:10], "no usable row for the test split"),
        ("comparisons", good_pairs()[:2], "no usable row for the valid split"),
    ],
)
def test_an_empty_split_names_file_and_key(tmp_path: Path, key: str, rows: list[dict[str, Any]], message: str) -> None:
    data = {key: write(tmp_path / "few.jsonl", rows), "test_fraction": 0.0, "valid_fraction": 0.0}
    with pytest.raises(DataError) as raised:
        fetched(configured(tmp_path, data=data), tmp_path)
    assert str(raised.value).startswith(f"data.{key}={tmp_path}/few.jsonl: {message}")


def save_gptj(folder: Path, rows: int, **changes: Any) -> PreTrainedModel:
    config = GPTJConfig(
        vocab_size=rows, n_positions=600, n_embd=16, n_layer=1, n_head=2, rotary_dim=4,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=False, **changes,
    )  # fmt: skip
    model = GPTJForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer = train_tokenizer(["the cat sings at night"] * 3, vocab_size=270)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return model


def test_a_local_base_keeps_its_weights_and_spare_rows(tmp_path: Path) -> None:
    model = save_gptj(tmp_path / "base", rows=280)
    final = fetched(configured(tmp_path, base=str(tmp_path / "base")), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(final / "base")
    tokenizer = AutoTokenizer.from_pretrained(final / "base")
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert loaded.config.pad_token_id == tokenizer.pad_token_id < 280
    assert loaded.config.prompt_version == "tldr-1"
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_new_tokens_get_the_average_row(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    save_gptj(folder, rows=264)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    final = fetched(configured(tmp_path, base=str(folder)), tmp_path)
    weight = AutoModelForCausalLM.from_pretrained(final / "base").lm_head.weight
    assert weight.shape[0] % 8 == 0
    assert weight.shape[0] >= len(tokenizer) > 264
    torch.testing.assert_close(weight[264:], weight[:264].mean(0).expand(weight.shape[0] - 264, -1))


def test_a_pickled_base_is_refused_unless_its_tensors_are_asked_for(tmp_path: Path) -> None:
    model = save_gptj(tmp_path / "base", rows=280)
    (tmp_path / "base/model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "base/pytorch_model.bin")
    line = str(base_error(tmp_path, str(tmp_path / "base")))
    assert (
        "pytorch_model.bin is a pickle, which can run code; where it is to be the base model, set model.pickled="
        in line
    )
    config = configured(tmp_path, base=str(tmp_path / "base"))
    asked = config.model_copy(update={"model": config.model.model_copy(update={"pickled": "convert"})})
    final = fetched(asked, tmp_path)
    assert not list((final / "base").glob("*.bin"))
    loaded = AutoModelForCausalLM.from_pretrained(final / "base")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_gpt2s_vocabulary_files_are_enough_for_the_tiny_base(tmp_path: Path, shared_data: Path) -> None:
    config = configured(tmp_path)
    named = config.model.model_copy(update={"tokenizer": str(shared_data / "gpt2-bpe")})
    final = fetched(config.model_copy(update={"model": named}), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(final / "base")
    assert (len(tokenizer), tokenizer.pad_token_id) == (50258, 50257)
    assert summary_of(final)["base"]["vocabulary_rows"] == 50264


def base_error(tmp_path: Path, base: str, **sections: Any) -> RlhfError:
    with pytest.raises(RlhfError) as raised:
        fetched(configured(tmp_path, base=base, **sections), tmp_path)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run/fetch/final").exists()
    return raised.value


def test_a_missing_base_is_named(tmp_path: Path) -> None:
    error = base_error(tmp_path, str(tmp_path / "nowhere"))
    assert error.exit_code == 66
    assert str(error) == f"model.base={tmp_path}/nowhere: no such directory; give a local directory or a Hub name"


def test_a_base_without_config_is_named(tmp_path: Path) -> None:
    save_gptj(tmp_path / "base", rows=280)
    (tmp_path / "base/config.json").unlink()
    assert "holds no model: config.json is missing" in str(base_error(tmp_path, str(tmp_path / "base")))


def test_a_base_without_weights_is_named(tmp_path: Path) -> None:
    save_gptj(tmp_path / "base", rows=280)
    (tmp_path / "base/model.safetensors").unlink()
    assert "cannot be loaded as a causal LM" in str(base_error(tmp_path, str(tmp_path / "base")))


def test_a_base_with_cut_weights_is_named(tmp_path: Path) -> None:
    save_gptj(tmp_path / "base", rows=280)
    weights = (tmp_path / "base/model.safetensors").read_bytes()
    (tmp_path / "base/model.safetensors").write_bytes(weights[:1000])
    assert "cannot be loaded as a causal LM" in str(base_error(tmp_path, str(tmp_path / "base")))


def test_a_reward_model_is_no_base(tmp_path: Path) -> None:
    model = save_gptj(tmp_path / "base", rows=280)
    GPTJForSequenceClassification(model.config).save_pretrained(tmp_path / "base")
    error = base_error(tmp_path, str(tmp_path / "base"))
    assert error.exit_code == 66
    assert "is not a whole causal LM: 2 weights are missing, first lm_head.bias" in str(error)


def test_prompts_longer_than_the_base_allows_are_a_config_error(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=280, n_positions=128, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "base"
    )
    train_tokenizer(["cat"], vocab_size=260).save_pretrained(tmp_path / "base")
    error = base_error(tmp_path, str(tmp_path / "base"), prompt={"max_prompt_tokens": 100, "max_response_tokens": 30})
    assert error.exit_code == 78
    assert "exceed the 128 positions of model.base" in str(error)
    assert str(error).endswith("set prompt.max_prompt_tokens=98 or less")


def test_a_base_on_the_hub_is_brought_without_its_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    save_gptj(tmp_path / "base", rows=280)
    asked = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path / "base")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    final = fetched(configured(tmp_path, base="someone/gpt-j"), tmp_path)
    assert asked == [("someone/gpt-j", ["*.json", "*.txt", "*.model", "*.safetensors"])]
    assert (final / "base/model.safetensors").is_file()


@pytest.mark.parametrize("pickled", ["refuse", "convert"])
def test_a_base_on_the_hub_that_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pickled: str) -> None:
    import huggingface_hub

    model = save_gptj(tmp_path / "base", rows=280)
    (tmp_path / "base/model.safetensors").unlink()
    asked = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns[-1])
        if allow_patterns[-1] == "pytorch_model*.bin":
            torch.save(model.state_dict(), tmp_path / "base/pytorch_model.bin")
        return str(tmp_path / "base")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    if pickled == "refuse":
        line = str(base_error(tmp_path, "someone/gpt-j"))
        assert line.startswith(
            "model.base=someone/gpt-j has no safetensors on the Hub, and pickled weights can run code"
        )
        assert "set model.pickled=convert" in line
        assert asked == ["*.safetensors"]
        return
    config = configured(tmp_path, base="someone/gpt-j")
    chosen = config.model_copy(update={"model": config.model.model_copy(update={"pickled": pickled})})
    final = fetched(chosen, tmp_path)
    assert asked == ["*.safetensors", "pytorch_model*.bin"]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(final / "base").lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("name", ["../x", "/abs", "a/b/c", "a b", ""])
def test_what_cannot_be_a_repository_is_not_looked_up(name: str) -> None:
    with pytest.raises(PrerequisiteError, match="no such directory"):
        hub.model_directory("model.base", name, with_weights=True)


def test_without_network_the_hub_is_one_line(tmp_path: Path) -> None:
    """The real libraries, told to stay offline, in a process of their own: they read that when imported."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom rlhf import hub, sources\nfrom rlhf.errors import RlhfError\n"
        "for attempt in (\n"
        "    lambda: list(sources.read_rows('nobody/no-such-set', key='data.posts')),\n"
        "    lambda: hub.model_directory('model.base', 'nobody/no-such-model', with_weights=True),\n"
        "):\n"
        "    try:\n        attempt()\n"
        "    except RlhfError as error:\n        sys.stdout.write(f'{error.exit_code} {error}\\n')\n"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=offline, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("1 data.posts=nobody/no-such-set: no such local path, and the Hub cannot be reached (")
    assert lines[1].startswith("1 model.base=nobody/no-such-model: no such local path, and the Hub cannot be reached (")


def test_real_posts_and_comparisons_are_read_whole(tmp_path: Path, shared_data: Path) -> None:
    data = {
        "posts": str(shared_data / "text/tldr.jsonl.gz"),
        "comparisons": str(shared_data / "text/comparisons.jsonl.gz"),
        "max_train_posts": 50,
        "max_valid_posts": 10,
        "max_test_posts": 10,
        "max_train_comparisons": 40,
        "max_valid_comparisons": 10,
    }
    facts = summary_of(fetched(configured(tmp_path, data=data), tmp_path))
    posts, pairs = facts["posts"], facts["comparisons"]
    assert (posts["rows"], posts["bad"], pairs["rows"], pairs["bad"]) == (4168, 0, 5881, 0)
    # 2,842 train, 706 valid and 620 test rows, each a post of its own.
    assert posts["splits"]["train"]["dropped"] == {"over the cap": 2842 - 50}
    assert posts["splits"]["test"]["dropped"] == {"over the cap": 620 - 10}
    for facts_of_split, total in ((pairs["splits"]["train"], 4685), (pairs["splits"]["valid"], 1196)):
        assert facts_of_split["kept"] + sum(facts_of_split["dropped"].values()) == total
