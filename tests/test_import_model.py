"""Published checkpoints become stages: the same weights, trlX's own scores, and one line for whatever is wrong.

`trlx_reward_golden.json` holds what trlX's GPTRewardModel gave for the same weights; see record_trlx_reward.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPTJConfig, GPTJForCausalLM

from rlhf.checkpoint import StageDir, verify
from rlhf.config import Config
from rlhf.console import Parser
from rlhf.data import write_jsonl
from rlhf.errors import ConfigError, ConflictError, PrerequisiteError, RlhfError, StorageError, UsageError
from rlhf.import_command import add_import_model
from rlhf.import_model import Source, import_model, write_weights
from rlhf.lease import LeaseHeld, take_lease
from rlhf.models import load_policy, load_reward_model
from rlhf.pipeline import STAGES
from rlhf.prompt import encode_prompt, encode_response, parse_prompt
from rlhf.published_checkpoint import checkpoint_config, read_checkpoint
from rlhf.running import run_stage
from rlhf.scoring import Scorer
from rlhf.stopping import StopSignal
from tests.fakes import EOS_ID, PAD_ID
from tests.serving import serving_run
from tests.tiny_run import byte_tokenizer, examples, fetched_run, tiny_config
from tests.trlx_checkpoints import CONFIG, policy_checkpoint, reward_checkpoint, save, trlx_policy_checkpoint

GOLDEN = json.loads(Path(__file__).with_name("trlx_reward_golden.json").read_text(encoding="utf-8"))
BUFFERS = ("attn.bias", "attn.masked_bias")


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """A directory with the config and the tokenizer that the checkpoints go with."""
    directory = tmp_path / "origin"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def reward_file(tmp_path: Path) -> Path:
    """The reward model as it is published: one pickle and nothing beside it."""
    return save(reward_checkpoint(seed=GOLDEN["seed"]), tmp_path / "rm" / "pytorch_model.bin")


def bring(source: Source, run_dir: Path, *, stage: str = "", config: Config | None = None) -> Path:
    stage = stage or ("ppo" if source.kind == "policy" else "reward")
    return import_model(source, stage, config or tiny_config(), run_dir)


def bring_reward(path: Path, origin: Path, run_dir: Path, **options: Any) -> Path:
    return bring(Source(kind="reward", path=str(path), config_from=origin, tokenizer=str(origin), **options), run_dir)


def bring_policy(path: Path, run_dir: Path, stage: str = "ppo", **options: Any) -> Path:
    return bring(Source(kind="policy", path=str(path), **options), run_dir, stage=stage)


def policy_directory(origin: Path, tensors: dict[str, Tensor]) -> Path:
    """A policy as it is published: config, tokenizer and a pickle."""
    save(tensors, origin / "pytorch_model.bin")
    return origin


def complaint(call: Callable[[], Any], kind: type[RlhfError] = PrerequisiteError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def golden_sequences(*, ended: bool = True) -> list[list[int]]:
    tokenizer = byte_tokenizer()
    sequences = []
    for row in GOLDEN["rows"]:
        response = encode_response(tokenizer, row["summary"])
        prompt = encode_prompt(tokenizer, parse_prompt(row["prompt"]), max_tokens=200).ids
        sequences.append([*prompt, *(response if ended else response[:-1])])
    return sequences


@pytest.mark.parametrize("ended", [True, False], ids=["ended", "never ended"])
@pytest.mark.parametrize("batch_tokens", [1, 4000])
def test_scores_are_those_of_trlx(
    reward_file: Path, origin: Path, tmp_path: Path, ended: bool, batch_tokens: int
) -> None:
    """trlX ends every summary's text itself, so that its score is the same whether the policy ended it or not."""
    model = load_reward_model(bring_reward(reward_file, origin, tmp_path / "runs" / "published"))
    scores_B = Scorer(model, batch_tokens=batch_tokens).score(golden_sequences(ended=ended))
    expected = [row["score"] for row in GOLDEN["rows"]]
    assert max(expected) - min(expected) > 2
    assert scores_B.tolist() == pytest.approx(expected, abs=1e-5)


def layouts(directory: Path, layout: str) -> Path:
    """A policy's files in one of the ways in which they are published; the config and the tokenizer are there."""
    tensors = policy_checkpoint(seed=5)
    names = sorted(tensors)
    if layout == "trlX's export":
        save(trlx_policy_checkpoint(seed=5), directory / "pytorch_model.bin")
    elif layout == "safetensors":
        save_file(tensors, directory / "model.safetensors")
    elif layout == "shards":
        placed = {}
        for number, part in enumerate((names[:9], names[9:]), start=1):
            file = f"pytorch_model-{number:05d}-of-00002.bin"
            save({name: tensors[name] for name in part}, directory / file)
            placed |= dict.fromkeys(part, file)
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))
    else:
        save(tensors, directory / "pytorch_model.bin")
    return directory


@pytest.mark.parametrize("layout", ["one pickle", "shards", "safetensors", "trlX's export"])
def test_a_policy_keeps_its_weights(origin: Path, tmp_path: Path, layout: str) -> None:
    final = bring_policy(layouts(origin, layout), tmp_path / "published", stage="sft")
    verify(final)
    expected = {name: weight for name, weight in policy_checkpoint(seed=5).items() if not name.endswith(BUFFERS)}
    stored = load_file(final / "model.safetensors")
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    ours = load_policy(final)
    theirs = GPTJForCausalLM(GPTJConfig(**{key: CONFIG[key] for key in CONFIG if "dtype" not in key})).eval()
    theirs.load_state_dict({name: weight.float() for name, weight in expected.items()})
    ids_BT = torch.tensor([list(b"TL;DR: a cat")])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids_BT).logits, theirs(ids_BT).logits)
    assert ours.config.prompt_version == "tldr-1"
    assert (ours.config.eos_token_id, ours.config.pad_token_id) == (EOS_ID, PAD_ID)


def test_a_stage_is_like_any_other(origin: Path, reward_file: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "published"
    final = bring_reward(reward_file, origin, run_dir)
    assert StageDir(run_dir, "reward").final() == final
    assert final.resolve().name == "step-00000000"
    assert (final / "config.yaml").read_text() == (run_dir / "reward" / "config.yaml").read_text()
    metrics = json.loads((final / "metrics.json").read_text())
    assert metrics["imported"]["path"] == str(reward_file)
    assert "reward/accuracy" not in metrics
    assert metrics["note"].startswith("trained elsewhere: its accuracy was not measured")
    config = json.loads((final / "config.json").read_text())
    assert (config["prompt_version"], config["score_shift"]) == ("trlx-tldr-1", 0.0)
    assert byte_tokenizer().decode(config["score_prefix_ids"]) == "<|startoftext|>"
    assert len(config["score_prefix_ids"]) == 15  # plain text: a byte is a token here
    assert not list((run_dir / "reward").glob(".unfinished*"))


def test_weights_in_another_precision(origin: Path, reward_file: Path, tmp_path: Path) -> None:
    final = bring_reward(reward_file, origin, tmp_path / "published", dtype="bfloat16")
    stored = load_file(final / "model.safetensors")["score.weight"]
    assert torch.equal(stored, reward_checkpoint(seed=GOLDEN["seed"])["v_head.weight"].to(torch.bfloat16))
    assert json.loads((final / "config.json").read_text())["dtype"] == "bfloat16"
    large = policy_checkpoint(seed=5) | {"lm_head.bias": torch.full((260,), 1e5)}
    line = complaint(lambda: bring_policy(policy_directory(origin, large), tmp_path / "other", dtype="float16"))
    assert line.endswith("lm_head.bias does not fit into torch.float16; give --dtype bfloat16 or float32")


def test_large_weights_become_shards(tmp_path: Path) -> None:
    weights = {name: torch.full((10,), float(number)) for number, name in enumerate("abcde")}
    weights["c"] = weights["b"]  # one memory, two names
    write_weights(weights, tmp_path, dtype=torch.float16, shard_bytes=40)
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert [sorted(load_file(tmp_path / name)) for name in names] == [["a", "b"], ["c", "d"], ["e"]]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["d"] == names[1]
    assert index["metadata"]["total_size"] == 5 * 10 * 2
    assert load_file(tmp_path / names[1])["c"].tolist() == [1.0] * 10


def test_the_shape_of_gpt_j_6b_needs_no_config(tmp_path: Path) -> None:
    weights = {"transformer.wte.weight": torch.empty(50400, 4096, device="meta")}
    weights |= {f"transformer.h.{layer}.ln_1.weight": torch.empty(4096, device="meta") for layer in range(28)}
    config = checkpoint_config("policy", weights, tmp_path, None)
    assert (config.n_layer, config.n_head, config.rotary_dim, config.n_positions) == (28, 16, 64, 2048)
    assert (config.vocab_size, config.n_embd, config.resid_pdrop) == (50400, 4096, 0.0)


def test_the_heads_of_another_size_must_be_told(origin: Path, reward_file: Path, tmp_path: Path) -> None:
    source = Source(kind="reward", path=str(reward_file), tokenizer=str(origin))
    line = complaint(lambda: bring(source, tmp_path / "published"))
    assert "with a hidden size of 32 it is not GPT-J-6B (4096)" in line
    assert "give --config-from DIR" in line


def changed(change: Callable[[dict[str, Tensor]], object]) -> dict[str, Tensor]:
    tensors = policy_checkpoint(seed=5)
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            changed(lambda w: w.pop("transformer.h.1.mlp.fc_in.bias")),
            "lacks 1 weights of a GPT-J policy of 2 blocks: 'transformer.h.1.mlp.fc_in.bias'",
        ),
        (
            changed(lambda w: w.update({f"transformer.new.{number}": torch.ones(2) for number in range(7)})),
            "holds 7 tensors that a GPT-J policy of 2 blocks does not have: 'transformer.new.0', ",
        ),
        (
            changed(lambda w: w.update({"transformer.h.0.attn.bias": torch.ones(32)})),
            "does not have: 'transformer.h.0.attn.bias'; import-model reads",
        ),
        (
            changed(lambda w: w.update({"lm_head.weight": torch.ones(32, 260)})),
            "lm_head.weight is (32, 260), and (260, 32) in a GPT-J policy of 2 blocks",
        ),
        (
            changed(lambda w: w["transformer.wte.weight"].view(-1)[3:4].fill_(math.nan)),
            "transformer.wte.weight holds numbers that are not finite; download the model again",
        ),
        (changed(lambda w: w.update({"base_model.lm_head.bias": torch.ones(260)})), "both with and without"),
        (reward_checkpoint(seed=5), "is a reward model, it has no lm_head; give --kind reward"),
        ({}, "holds no weights"),
    ],
    ids=["missing", "unknown", "no mask", "shape", "nan", "prefix", "kind", "empty"],
)
def test_a_policy_that_is_none(origin: Path, tmp_path: Path, tensors: dict[str, Tensor], words: str) -> None:
    run_dir = tmp_path / "published"
    assert words in complaint(lambda: bring_policy(policy_directory(origin, tensors), run_dir))
    assert not run_dir.exists()


def test_a_reward_model_that_is_none(origin: Path, tmp_path: Path) -> None:
    path = save(policy_checkpoint(seed=5), tmp_path / "policy.bin")
    line = complaint(lambda: bring_reward(path, origin, tmp_path / "published"))
    assert line == f"{path} is a language model, it has lm_head; give --kind policy"
    headless = {name: weight for name, weight in reward_checkpoint(seed=5).items() if "v_head" not in name}
    path = save(headless, tmp_path / "headless.bin")
    assert "has no v_head.weight, so it is no reward model" in complaint(
        lambda: bring_reward(path, origin, tmp_path / "published")
    )


class Evil:
    """Makes a directory when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("owned",)


def test_a_pickle_that_would_run_something_runs_nothing(
    origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(reward_checkpoint(seed=5) | {"evil": Evil()}, tmp_path / "evil.bin")
    line = complaint(lambda: bring_reward(tmp_path / "evil.bin", origin, tmp_path / "published"))
    assert "evil.bin does not hold tensors alone" in line
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2', and import-model reads 'gptj' alone"),
        ({"n_head": None}, "n_head is None, not a number"),
        ({"n_head": 5, "rotary_dim": 4}, "embed_dim must be divisible by num_attention_heads"),
        ({"n_head": 32}, "n_embd=32, n_head=32 and rotary_dim=8 do not go together"),
        ({"n_layer": 10**9}, "n_layer=1000000000, and the files beside it hold"),
        ({"n_embd": 64}, "transformer.wte.weight is (260, 32) in the file, (260, 64) in config.json"),
        ({"activation_function": "surprise"}, "describes no model that can be built"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_config_that_does_not_go_with_the_weights(
    origin: Path, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    (origin / "config.json").write_text(json.dumps(CONFIG | settings))
    directory = policy_directory(origin, policy_checkpoint(seed=5))
    assert words in complaint(lambda: bring_policy(directory, tmp_path / "published"))


def test_a_shard_that_is_missing(origin: Path) -> None:
    layouts(origin, "shards")
    (origin / "pytorch_model-00002-of-00002.bin").unlink()
    line = complaint(lambda: read_checkpoint(origin))
    assert "has no 'pytorch_model-00002-of-00002.bin', which pytorch_model.bin.index.json names" in line
    (origin / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.bin"}}))
    (origin.parent / "secret.bin").touch()
    assert "has no '../secret.bin'" in complaint(lambda: read_checkpoint(origin))


def test_the_tokenizer_of_the_run_is_the_default(origin: Path, reward_file: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "published"
    source = Source(kind="reward", path=str(reward_file), config_from=origin)
    line = complaint(lambda: bring(source, run_dir))
    assert line == f"{reward_file} holds no tokenizer, and neither does {run_dir}; give GPT-J's by --tokenizer DIR|NAME"
    bring_policy(policy_directory(origin, policy_checkpoint(seed=5)), run_dir)
    final = bring(source, run_dir)
    assert (final / "tokenizer.json").read_bytes() == (run_dir / "ppo" / "final" / "tokenizer.json").read_bytes()


def test_tokenizers_that_do_not_fit(origin: Path, reward_file: Path, tmp_path: Path) -> None:
    run_dir, other = tmp_path / "published", tmp_path / "other"
    bring_policy(policy_directory(origin, policy_checkpoint(seed=5)), run_dir)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["TL;DR:"])
    tokenizer.save_pretrained(other)
    source = Source(kind="reward", path=str(reward_file), config_from=origin, tokenizer=str(other))
    line = complaint(lambda: bring(source, run_dir))
    assert f"give --tokenizer {run_dir / 'ppo' / 'final'}, or another --run" in line
    tokenizer.add_tokens(["one", "two", "three"])
    tokenizer.save_pretrained(other)
    line = complaint(lambda: bring(source, run_dir))
    assert "token 'three' has id 261, and the model has 260 rows" in line


def test_a_name_on_the_hub_is_downloaded_with_its_pickle(
    origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def model_directory(key: str, name: str, *, with_weights: bool, pickled: bool = False) -> Path:
        asked.append((key, name, with_weights, pickled))
        return origin

    monkeypatch.setattr("rlhf.import_model.model_directory", model_directory)
    policy_directory(origin, policy_checkpoint(seed=5))
    bring_policy(Path("CarperAI/openai_summarize_tldr_sft"), tmp_path / "published", tokenizer="EleutherAI/gpt-j-6b")
    assert asked == [
        ("PATH", "CarperAI/openai_summarize_tldr_sft", True, True),
        ("--tokenizer", "EleutherAI/gpt-j-6b", False, False),
    ]


def test_a_stage_that_is_there_is_not_replaced(origin: Path, reward_file: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "published"
    before = bring_reward(reward_file, origin, run_dir).resolve()
    line = complaint(lambda: bring_reward(reward_file, origin, run_dir), ConflictError)
    assert line.startswith(f"{run_dir / 'reward'} holds a model already; import into another --run, or move")
    assert (run_dir / "reward" / "final").resolve() == before


def test_a_stage_at_work_is_left_alone(origin: Path, reward_file: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "published"
    with take_lease(run_dir / "reward", seconds=1):
        complaint(lambda: bring_reward(reward_file, origin, run_dir), LeaseHeld)
    assert not StageDir(run_dir, "reward").is_final()


def test_no_room(origin: Path, reward_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    line = complaint(lambda: bring_reward(reward_file, origin, tmp_path / "published"), StorageError)
    assert "has room for 0.0 GB, and the weights take 0.0 GB; free some" in line


def test_settings_that_do_not_fit_the_model(origin: Path, reward_file: Path, tmp_path: Path) -> None:
    """A reward model of trlX's reads 15 tokens of its own before the prompt; 220 + 24 + 15 = 259 of 256 positions."""
    config = tiny_config(prompt={"max_prompt_tokens": 220})
    source = Source(kind="reward", path=str(reward_file), config_from=origin, tokenizer=str(origin))
    line = complaint(lambda: bring(source, tmp_path / "published", config=config), ConfigError)
    assert line.endswith("need 259 positions, and the model has 256; set prompt.max_prompt_tokens=217 or less")


def test_settings_of_the_run_are_kept(origin: Path, reward_file: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "published"
    bring_reward(reward_file, origin, run_dir)
    directory = policy_directory(origin, policy_checkpoint(seed=5))
    other = tiny_config(reward={"frozen_fraction": 0.25})
    line = complaint(lambda: bring(Source(kind="policy", path=str(directory)), run_dir, config=other), ConfigError)
    assert "reward.frozen_fraction was 0.5 and is 0.25 now" in line


def command(arguments: Sequence[str]) -> int:
    """`rlhf import-model`, as the command line takes it."""
    common = Parser(add_help=False)
    common.add_argument("--run", default="demo")
    common.add_argument("--runs-dir", type=Path)
    common.add_argument("--debug", action="store_true")
    common.add_argument("--config")
    common.add_argument("--set", action="append", default=[])
    parser = Parser(prog="rlhf")
    add_import_model(parser.add_subparsers(required=True), [common])
    options = parser.parse_args(["import-model", *arguments])
    chosen: Callable[[argparse.Namespace], int] = options.command
    return chosen(options)


def test_the_command(
    origin: Path, reward_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # the command sets it
    place = ["--run", "published", "--runs-dir", str(tmp_path / "runs"), "--set", "prompt.max_prompt_tokens=150"]
    policy_directory(origin, policy_checkpoint(seed=5))
    assert command([str(origin), "--kind", "policy", "--stage", "sft", *place]) == 0
    assert "runs/published/sft/final holds the policy" in capsys.readouterr().out
    assert command([str(reward_file), "--kind", "reward", "--config-from", str(origin), *place]) == 0
    assert (tmp_path / "runs" / "published" / "reward" / "final" / "model.safetensors").is_file()
    with pytest.raises(UsageError, match="--stage ppo is for policies"):
        command([str(reward_file), "--kind", "reward", "--stage", "ppo", *place])
    with pytest.raises(UsageError, match="invalid choice: 'value'"):
        command([str(reward_file), "--kind", "value", *place])
    with pytest.raises(SystemExit):
        command(["--help"])
    assert "--config-from DIR" in capsys.readouterr().out


def test_published_models_are_served_without_training(origin: Path, reward_file: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "published"
    config = tiny_config(prompt={"max_prompt_tokens": 160})
    directory = policy_directory(origin, policy_checkpoint(seed=5))
    bring(Source(kind="policy", path=str(directory)), run_dir, config=config)
    bring(Source(kind="reward", path=str(reward_file), config_from=origin), run_dir, config=config)
    with serving_run(run_dir, models="ppo", precision="float32") as serving:
        posts = [row["prompt"] for row in GOLDEN["rows"]]
        answer = serving.client.post("/summarize", json={"posts": posts[:1]}).json()
        assert answer["results"][0]["completion_tokens"] > 0
        items = [{"post": row["prompt"], "summary": row["summary"]} for row in GOLDEN["rows"]]
        scored = serving.client.post("/score", json={"items": items}).json()["results"]
        assert [result["score"] for result in scored] == pytest.approx([r["score"] for r in GOLDEN["rows"]], abs=1e-5)
        told = {model["id"]: model["prompt_version"] for model in serving.client.get("/v1/models").json()["models"]}
        assert told == {"ppo": "tldr-1", "reward": "trlx-tldr-1"}


def test_published_models_are_evaluated(origin: Path, reward_file: Path, tmp_path: Path) -> None:
    run_dir = fetched_run(tmp_path)
    with StageDir(run_dir, "fetch").publish(1, final=True) as directory:
        shutil.copytree(run_dir / "fetch" / "step-00000000", directory, dirs_exist_ok=True)
        write_jsonl(directory / "data" / "posts-test.jsonl", (row.to_row() for row in examples(40, 44)))
    few = {"evaluate": {"bootstrap_samples": 100}, "prompt": {"max_prompt_tokens": 96, "max_response_tokens": 8}}
    config = Config.model_validate(tiny_config().model_dump() | few)
    for stage, seed in (("sft", 5), ("ppo", 6)):
        source = Source(kind="policy", path=str(policy_directory(origin, policy_checkpoint(seed=seed))))
        bring(source, run_dir, stage=stage, config=config)
    bring(Source(kind="reward", path=str(reward_file), config_from=origin), run_dir, config=config)
    run_stage(next(stage for stage in STAGES if stage.name == "evaluate"), config, run_dir, StopSignal())
    results = json.loads((run_dir / "evaluate" / "final" / "results.json").read_text())
    assert results["rows"]["ppo"]["kl"]["mean"] > 0
    assert results["reward_model"]["imported"]["prompt_version"] == "trlx-tldr-1"
    assert (run_dir / "report" / "index.html").is_file()
