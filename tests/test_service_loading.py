"""Loading a run: what is served is what was verified, works, and belongs together; all else is refused in one line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedModel

from app.loading import LoadedRun, load_run
from app.memory import NoRoom
from app.published import published
from app.settings import Settings
from rlhf import cgroups
from rlhf.checkpoint import StageDir, fingerprint
from rlhf.errors import ConfigError, PrerequisiteError
from rlhf.generation import BuiltinEngine
from rlhf.models import load_policy, load_reward_model
from rlhf.prompt import encode_prompt, encode_response
from rlhf.sampling import Sampling
from rlhf.scoring import Scorer
from rlhf.slots import Request
from tests.fakes import EOS_ID, PAD_ID, tiny_llama, tiny_policy, tiny_reward_model
from tests.served_run import publish_model, publish_policy, publish_reward_model, served_run
from tests.tiny_run import byte_tokenizer, post, tiny_config


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return served_run(tmp_path)


def load(run_dir: Path, *, on_phase: Callable[[str], None] = lambda phase: None, **settings: Any) -> LoadedRun:
    return load_run(Settings(run_dir=run_dir, **settings), on_phase=on_phase)


def refusal(run_dir: Path, **settings: Any) -> str:
    """The one line with which a run is refused, exit code 66."""
    with pytest.raises(PrerequisiteError) as caught:
        load(run_dir, **settings)
    assert caught.value.exit_code == 66
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_config(directory: Path, **changes: Any) -> None:
    """Change config.json, None removing a key, under a manifest that confirms it."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    stage = StageDir(directory.parent.parent, directory.parent.name)
    stage.adopt(Path(shutil.copytree(directory, directory.parent / "edited")), 90, final=True)


def change_weights(run_dir: Path, stage: str, change: Callable[[PreTrainedModel], None]) -> None:
    """Publish the stage's tiny model anew with changed weights."""
    model = tiny_reward_model() if stage == "reward" else tiny_policy()
    with torch.no_grad():
        change(model)
    publish_model(run_dir, stage, model, step=80)


def greedy(engine: Any, prompt: list[int]) -> list[int]:
    batch = engine.open(1)
    news = batch.add({0: Request(prompt, Sampling(12, temperature=0), seed=(1,))})
    while not news[-1].finish:
        news += batch.step()
    return [new.token for new in news]


def test_two_policies_and_a_reward_model_are_loaded(run_dir: Path) -> None:
    phases: list[str] = []
    run = load(run_dir, on_phase=phases.append)
    assert list(run.policies) == ["ppo", "sft"]
    assert phases[0] == "looking at what is to be loaded"
    doing = ("verifying", "loading", "warming up")
    assert phases[1:] == [f"{what} {name}" for name in ("ppo", "sft", "reward") for what in doing]
    assert {name: path.name for name, path in run.directories.items()} == {
        "ppo": "step-00000005",
        "sft": "step-00000003",
        "reward": "step-00000007",
    }
    for name in ("ppo", "sft"):
        policy = run.policies[name]
        assert (policy.max_prompt_tokens, policy.max_new_tokens, policy.positions) == (96, 24, 128)
        reference = BuiltinEngine(load_policy(run.directories[name]), eos_id=EOS_ID, pad_id=PAD_ID)
        prompt = encode_prompt(policy.tokenizer, post(3), max_tokens=96).ids
        assert greedy(policy.engine, prompt) == greedy(reference, prompt)
    assert greedy(run.policies["ppo"].engine, prompt) != greedy(run.policies["sft"].engine, prompt)


def test_what_is_told_of_the_models(run_dir: Path) -> None:
    run = load(run_dir, precision="bfloat16")
    expected = {
        "id": "ppo",
        "run": "served",
        "stage": "ppo",
        "step": 5,
        "prompt_version": "tldr-1",
        "parameters": sum(weight.numel() for weight in tiny_policy().parameters()),
        "dtype": "bfloat16",
        "device": "cpu",
        "checksum": fingerprint(run_dir / "ppo" / "final"),
        "engine": "builtin",
        "max_prompt_tokens": 96,
        "max_new_tokens": 24,
    }
    assert run.policies["ppo"].info.model_dump() == expected
    reward = run.reward.info
    assert (reward.id, reward.step, reward.engine, reward.max_new_tokens) == ("reward", 7, None, None)
    assert reward.parameters == sum(weight.numel() for weight in tiny_reward_model().parameters())


def test_scores_are_those_of_rlhf(run_dir: Path) -> None:
    run = load(run_dir)
    tokenizer = run.reward.tokenizer
    sequences = [
        encode_prompt(tokenizer, post(index), max_tokens=96).ids + encode_response(tokenizer, "lost it" * (index % 3))
        for index in range(9)
    ]
    model = load_reward_model(run_dir / "reward" / "final")
    alone = Scorer(model, batch_tokens=1)
    torch.testing.assert_close(run.reward.scorer.score(sequences), alone.score(sequences), atol=1e-4, rtol=0)


def test_only_what_is_asked_for_is_needed(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "sft")
    assert list(load(run_dir, models="ppo").policies) == ["ppo"]
    line = refusal(run_dir)
    assert line.endswith(
        "sft/final does not exist; run `python -m rlhf sft --run served` first, or leave sft out of APP_MODELS"
    )
    shutil.rmtree(run_dir / "reward")
    assert refusal(run_dir, models="ppo").endswith("run `python -m rlhf reward --run served` first")


def test_a_link_to_nowhere_is_a_missing_stage(run_dir: Path) -> None:
    shutil.rmtree((run_dir / "ppo" / "final").resolve())
    assert "ppo/final does not exist; run `python -m rlhf ppo --run served` first" in refusal(run_dir)


@pytest.mark.parametrize("stage", ["ppo", "reward"])
def test_one_changed_byte_is_found(run_dir: Path, stage: str) -> None:
    path = run_dir / stage / "final" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    line = refusal(run_dir)
    assert "model.safetensors has changed since it was written (sha256 differs); move " in line
    assert line.endswith(f"aside, then run `python -m rlhf {stage} --run served`")


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "garbage"])
def test_every_damaged_file_is_named(run_dir: Path, name: str, damage: str) -> None:
    path = (run_dir / "ppo" / "final").resolve() / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:50])
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(os.urandom(path.stat().st_size))
    line = refusal(run_dir)
    assert str(path.parent) in line
    assert name in line or "python -m rlhf ppo" in line


def test_a_file_that_the_manifest_does_not_list_is_refused(run_dir: Path) -> None:
    directory = (run_dir / "sft" / "final").resolve()
    (directory / ".nfs0001").write_text("what a network volume leaves of a file that is still open")
    load(run_dir)
    (directory / "added_tokens.json").write_text("{}")
    assert refusal(run_dir).endswith(
        "added_tokens.json is not in manifest.json, so nothing says what it is; move it away"
    )


@pytest.mark.parametrize("stage", ["sft", "ppo", "reward"])
def test_a_prompt_version_that_is_not_known(run_dir: Path, stage: str) -> None:
    edit_config((run_dir / stage / "final").resolve(), prompt_version="tldr-2")
    line = refusal(run_dir)
    assert f"/{stage}/step-00000090/config.json: prompt_version is 'tldr-2', and this service knows 'tldr-1'" in line
    edit_config((run_dir / stage / "final").resolve(), prompt_version=None)
    assert "config.json names no prompt_version" in refusal(run_dir)


def test_a_reward_model_of_trlx_has_a_prompt_version_of_its_own(run_dir: Path) -> None:
    """Its 4 tokens before every prompt leave 124 of 128 positions; 96 + 24 of the settings fit, and 96 + 30 do not."""
    framed = {"prompt_version": "trlx-tldr-1", "score_prefix_ids": [60, 124, 62, 32]}
    edit_config((run_dir / "reward" / "final").resolve(), **framed)
    reward = load(run_dir).reward
    assert (reward.info.prompt_version, reward.positions, reward.info.max_prompt_tokens) == ("trlx-tldr-1", 124, 96)
    model = load_reward_model(run_dir / "reward" / "step-00000007")
    read = torch.tensor([[60, 124, 62, 32, 5, 6]])
    with torch.no_grad():
        expected = float(model(input_ids=read).logits) - 0.25
    assert float(reward.scorer.score([[5, 6, EOS_ID]])) == pytest.approx(expected, abs=1e-4)

    settings = tiny_config(prompt={"max_response_tokens": 30}).to_yaml()
    (run_dir / "reward" / "config.yaml").write_text(settings)
    assert "has 124 positions beside the 4 tokens that stand before every prompt, too few for" in refusal(run_dir)
    (run_dir / "reward" / "config.yaml").unlink()
    assert load(run_dir).reward.info.max_prompt_tokens == 124 - 50


def test_the_reward_models_version_is_not_a_policys(run_dir: Path) -> None:
    edit_config((run_dir / "ppo" / "final").resolve(), prompt_version="trlx-tldr-1", score_prefix_ids=[60])
    assert "prompt_version is 'trlx-tldr-1', and this service knows 'tldr-1' alone" in refusal(run_dir)


def test_a_reward_model_of_trlx_without_its_tokens(run_dir: Path) -> None:
    edit_config((run_dir / "reward" / "final").resolve(), prompt_version="trlx-tldr-1")
    assert "without the token ids that go with it" in refusal(run_dir)


class Explosive:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def test_nothing_is_unpickled(run_dir: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with StageDir(run_dir, "ppo").publish(9, final=True) as directory:
        shutil.copytree(run_dir / "sft" / "final", directory, dirs_exist_ok=True)
        (directory / "model.safetensors").unlink()
        for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
            torch.save({"weights": Explosive(mark)}, directory / name)
    assert "as safetensors: nothing is unpickled here" in refusal(run_dir)
    assert not mark.exists()
    # The trap works, and beside safetensors it is left alone.
    pickle.loads(pickle.dumps(Explosive(mark)))
    assert mark.exists()
    mark.unlink()
    shutil.copy(run_dir / "sft" / "final" / "model.safetensors", directory := (run_dir / "ppo" / "final").resolve())
    StageDir(run_dir, "ppo").adopt(directory, 10, final=True)
    load(run_dir)
    assert not mark.exists()


def test_code_in_a_model_directory_is_not_run(run_dir: Path, tmp_path: Path) -> None:
    directory = (run_dir / "ppo" / "final").resolve()
    (directory / "surprise.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    edit_config(directory, auto_map={"AutoConfig": "surprise.Config", "AutoModelForCausalLM": "surprise.Model"})
    load(run_dir)
    edit_config((run_dir / "ppo" / "final").resolve(), model_type="surprise")
    refusal(run_dir)
    assert not (tmp_path / "mark").exists()


def spoil(name: str, value: float) -> Callable[[PreTrainedModel], None]:
    def change(model: PreTrainedModel) -> None:
        model.get_parameter(name).view(-1)[7] = value

    return change


@pytest.mark.parametrize(("stage", "name"), [("ppo", "transformer.h.1.mlp.fc_in.weight"), ("reward", "score.weight")])
def test_weights_that_are_no_numbers(run_dir: Path, stage: str, name: str) -> None:
    change_weights(run_dir, stage, spoil(name, float("nan")))
    assert f"/step-00000080: {name} is not finite in float32; train {stage} again" in refusal(run_dir)


def test_weights_that_do_not_fit_the_precision(run_dir: Path) -> None:
    change_weights(run_dir, "ppo", spoil("lm_head.weight", 1e5))
    load(run_dir)
    line = refusal(run_dir, precision="float16")
    assert line.endswith("lm_head.weight is not finite in float16; train ppo again, or set APP_PRECISION=float32")


def test_finite_weights_with_infinite_results(run_dir: Path) -> None:
    change_weights(run_dir, "reward", lambda model: model.score.weight.fill_(3e38))
    assert "the reward model fails at its first use: the reward model's score is not finite" in refusal(run_dir)
    change_weights(run_dir, "ppo", lambda model: model.lm_head.weight.fill_(3e38))
    assert "the policy fails at its first use: its logits are not finite" in refusal(run_dir)


def test_a_language_model_is_no_reward_model_and_the_other_way_round(run_dir: Path) -> None:
    publish_model(run_dir, "reward", tiny_policy(), step=30)
    assert "is not a reward model: weights are missing: score.weight" in refusal(run_dir)
    publish_model(run_dir, "ppo", tiny_reward_model(), step=30)
    assert "is a reward model, not a language model" in refusal(run_dir)


def test_tokenizers_that_differ(run_dir: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["TL;DR:"])
    with StageDir(run_dir, "reward").publish(9, final=True) as directory:
        shutil.copytree(run_dir / "reward" / "final", directory, dirs_exist_ok=True)
        tokenizer.save_pretrained(directory)
    assert refusal(run_dir).startswith("the tokenizers of ppo and reward differ")


def test_a_tokenizer_with_more_tokens_than_the_model(run_dir: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"word{number}" for number in range(9)])
    with StageDir(run_dir, "ppo").publish(9, final=True) as directory:
        shutil.copytree(run_dir / "ppo" / "final", directory, dirs_exist_ok=True)
        tokenizer.save_pretrained(directory)
    assert "token 'word8' has id 266, outside the model's vocabulary of 260" in refusal(run_dir)


def test_a_device_that_is_not_there(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"^APP_POLICY_DEVICE=cuda:99 is not there"):
        load(run_dir, policy_device="cuda:99")
    with pytest.raises(ConfigError, match=r"^APP_REWARD_DEVICE=cuda:99 is not there"):
        load(run_dir, reward_device="cuda:99")


def test_too_little_memory_is_told_before_anything_is_read_whole(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cgroup").write_text("0::/\n")
    for name, text in (("memory.max", "9000"), ("memory.current", "8000"), ("memory.stat", "anon 8000\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cgroups, "CGROUPS", tmp_path)
    monkeypatch.setattr(cgroups, "MEMBERSHIP", tmp_path / "cgroup")
    phases: list[str] = []
    with pytest.raises(NoRoom, match=r"the models need 0\.\d GiB on cpu, where 0\.0 GiB are free"):
        load(run_dir, on_phase=phases.append)
    assert phases == ["looking at what is to be loaded"]


def test_a_device_that_runs_out_of_memory(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("app.loading.load_reward_model", no_memory)
    with pytest.raises(NoRoom, match="a device ran out of memory while the models were loaded; lower APP_SLOTS"):
        load(run_dir)


def test_threads_are_set(run_dir: Path) -> None:
    load(run_dir, threads=2)
    assert torch.get_num_threads() == 2


def test_threads_are_half_of_the_cores(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "usable_cores", lambda root, membership: 7)
    load(run_dir)
    assert torch.get_num_threads() == 3


def test_the_weights_are_no_pages_of_the_checkpoint(run_dir: Path) -> None:
    """A pruned or overwritten file must neither change a served model nor end the process."""
    run = load(run_dir)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(run_dir) not in maps.read_text()
    prompt = encode_prompt(run.policies["ppo"].tokenizer, post(3), max_tokens=96).ids
    before = greedy(run.policies["ppo"].engine, prompt)
    with (run.directories["ppo"] / "model.safetensors").open("r+b") as file:
        file.seek(-2000, os.SEEK_END)
        file.write(bytes(2000))
    assert greedy(run.policies["ppo"].engine, prompt) == before


def when(phase: str, action: Callable[[], object]) -> tuple[list[str], Callable[[str], None]]:
    """A listener that acts the first time it hears the phase, and the phases it heard."""
    heard: list[str] = []

    def on_phase(now: str) -> None:
        heard.append(now)
        if heard.count(phase) == 1 and now == phase:
            action()

    return heard, on_phase


@pytest.mark.parametrize("phase", ["verifying ppo", "loading ppo", "warming up sft"])
def test_a_directory_that_is_replaced_meanwhile(run_dir: Path, phase: str) -> None:
    """final moves on and what it named is pruned: the new one is loaded instead, as one whole."""

    def replace() -> None:
        old = (run_dir / "ppo" / "final").resolve()
        publish_policy(run_dir, "ppo", step=40, seed=9)
        shutil.rmtree(old)

    heard, on_phase = when(phase, replace)
    run = load(run_dir, on_phase=on_phase)
    tries = 1 if phase == "warming up sft" else 2
    assert heard.count("looking at what is to be loaded") == tries
    assert run.policies["ppo"].info.step == (5 if tries == 1 else 40)
    assert published(Settings(run_dir=run_dir))["ppo"].name == "step-00000040"


def test_a_link_that_moves_while_its_directory_stays_changes_nothing(run_dir: Path) -> None:
    before = fingerprint(run_dir / "reward" / "final")
    _, on_phase = when("verifying reward", lambda: publish_reward_model(run_dir, step=40, seed=9))
    run = load(run_dir, on_phase=on_phase)
    assert (run.reward.info.step, run.reward.info.checksum) == (7, before)
    assert run.directories != published(Settings(run_dir=run_dir))


def test_it_is_tried_once_more_and_no_more(run_dir: Path) -> None:
    heard: list[str] = []

    def on_phase(phase: str) -> None:
        heard.append(phase)
        if phase == "verifying ppo":
            old = (run_dir / "ppo" / "final").resolve()
            publish_policy(run_dir, "ppo", step=40 + len(heard), seed=9)
            shutil.rmtree(old)

    with pytest.raises(PrerequisiteError, match=r"manifest\.json is missing"):
        load(run_dir, on_phase=on_phase)
    assert heard.count("verifying ppo") == 2


def test_lengths_come_from_the_runs_settings(run_dir: Path) -> None:
    """PPO's stand in the checkpoint; a key of another release elsewhere in them does not matter."""
    settings = yaml.safe_load((run_dir / "sft" / "config.yaml").read_text())
    settings["prompt"] = {"max_prompt_tokens": 80, "max_response_tokens": 16}
    settings["sft"]["a_key_of_tomorrow"] = 1
    (run_dir / "sft" / "config.yaml").write_text(yaml.safe_dump(settings))
    (run_dir / "ppo" / "config.yaml").write_text("broken: [")
    policies = load(run_dir).policies
    assert (policies["sft"].max_prompt_tokens, policies["sft"].max_new_tokens) == (80, 16)
    assert (policies["ppo"].max_prompt_tokens, policies["ppo"].max_new_tokens) == (96, 24)
    (run_dir / "sft" / "config.yaml").write_text("broken: [")
    assert "sft/config.yaml does not tell prompt.max_prompt_tokens" in refusal(run_dir)


def test_lengths_without_settings_are_the_models(run_dir: Path) -> None:
    """50 tokens of summary, as usual, and the other 78 of 128 positions for the prompt."""
    (run_dir / "sft" / "config.yaml").unlink()
    sft = load(run_dir).policies["sft"]
    assert (sft.max_prompt_tokens, sft.max_new_tokens) == (78, 50)


def test_settings_that_do_not_fit_the_model(run_dir: Path) -> None:
    config = tiny_config(prompt={"max_prompt_tokens": 120})
    (run_dir / "reward" / "config.yaml").write_text(config.to_yaml())
    assert "has 128 positions, too few for prompt.max_prompt_tokens=120" in refusal(run_dir)


def test_other_kinds_of_models_are_served_too(run_dir: Path) -> None:
    publish_model(run_dir, "ppo", tiny_llama(), step=30)
    assert load(run_dir).policies["ppo"].info.step == 30


def test_a_run_that_is_reached_by_a_link_has_its_own_name(run_dir: Path) -> None:
    (run_dir.parent / "current").symlink_to(run_dir.name)
    assert load(run_dir.parent / "current").policies["ppo"].info.run == "served"


def test_vllm_is_given_what_it_needs(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Path, dict[str, Any]]] = []

    def engine(directory: Path, **options: Any) -> BuiltinEngine:
        asked.append((directory, options))
        return BuiltinEngine(load_policy(directory), eos_id=options["eos_id"], pad_id=options["pad_id"])

    monkeypatch.setitem(sys.modules, "rlhf.vllm_engine", SimpleNamespace(VllmEngine=engine))
    run = load(run_dir, engine="vllm", models="sft", slots=20)
    assert run.policies["sft"].info.engine == "vllm"
    options = {
        "eos_id": EOS_ID,
        "pad_id": PAD_ID,
        "slots": 20,
        "device": "cpu",
        "dtype": torch.float32,
        "max_sequence_tokens": 96 + 24,
    }
    assert asked == [(run.directories["sft"], options)]


def test_vllm_that_is_not_installed(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"vLLM is not installed; install it: pip install '\.\[vllm\]'"):
        load(run_dir, engine="vllm")
