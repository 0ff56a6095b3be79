"""LoRA from SFT to PPO: what is published is a plain model, the adapters lie beside it, and a run goes on from them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from rlhf.checkpoint import StageDir
from rlhf.config import Config
from rlhf.errors import ConfigError
from rlhf.models import load_policy, load_reward_model
from rlhf.pipeline import STAGES
from rlhf.presets import load_config
from rlhf.running import run_stage
from rlhf.stages import reward
from rlhf.stopping import StopSignal
from tests.sharing import Order, assert_same_weights, run_here
from tests.tiny_run import fetched_run, tiny_config

LORA = {"rank": 2, "alpha": 8.0}
TRAINING = {"max_steps": 4, "eval_every_steps": 4, "save_every_steps": 2, "lora": LORA}
PPO = {
    "iterations": 2,
    "unfrozen_layers": 1,
    "rollouts_per_iteration": 4,
    "rollout_chunk": 4,
    "inner_epochs": 2,
    "minibatch_size": 2,
    "micro_batch_size": 2,
    "eval_posts": 4,
    "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0},
    "lora": LORA,
}


def settings(folder: Path, **runtime: Any) -> Path:
    tree = tiny_config(sft=TRAINING, reward=TRAINING).model_dump()
    runtime = {"device": "cpu", "tensorboard": False} | runtime
    path = folder / "lora.yaml"
    path.write_text(Config.model_validate(tree | {"ppo": PPO, "runtime": runtime}).to_yaml())
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run through PPO with adapters in each stage, and its settings."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("lora")
    run_dir, config = fetched_run(folder), settings(folder)
    for stage in ("sft", "reward", "prepare", "ppo"):
        run_here(Order(stage, str(run_dir), str(config)), gradients=False)
    return run_dir, config


def moved(run_dir: Path, stage: str, before: Path) -> set[str]:
    """The weights in which a stage's model differs from the one that it started from."""
    old, new = load_file(before / "model.safetensors"), load_file(run_dir / stage / "final" / "model.safetensors")
    return {name for name in new if name not in old or not torch.equal(old[name], new[name])}


def test_what_is_published_is_plain_and_moved_where_the_adapters_were(trained: tuple[Path, Path]) -> None:
    run_dir, _ = trained
    attention = {f"transformer.h.{block}.attn.{name}.weight" for block in range(2) for name in ("q_proj", "v_proj")}
    top = {name for name in attention if ".h.1." in name}
    sft = run_dir / "sft" / "final"
    assert moved(run_dir, "sft", run_dir / "fetch" / "final" / "base") == attention
    assert moved(run_dir, "ppo", sft) == top, "ppo.unfrozen_layers: 1"
    assert moved(run_dir, "reward", sft) == top | {"score.weight"}, "reward.frozen_fraction: 0.5"
    model = load_reward_model(run_dir / "reward" / "final")
    assert load_policy(sft).config.prompt_version == model.config.prompt_version


def test_a_reward_model_that_is_frozen_as_a_whole_has_no_place_for_adapters(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "tiny"
    shutil.copytree(trained[0], run_dir, symlinks=True, ignore=shutil.ignore_patterns("reward", "prepare", "ppo"))
    tree = load_config(str(trained[1])).model_dump()
    tree["reward"]["frozen_fraction"] = 1.0
    with pytest.raises(ConfigError, match=r"reward\.frozen_fraction=1\.0 leaves no block to the adapters"):
        reward.run(Config.model_validate(tree), StageDir(run_dir, "reward"), StopSignal())
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(("stage", "before"), [("sft", "fetch/final/base"), ("ppo", "sft/final")])
def test_the_adapters_beside_it_give_the_same_model_to_peft(
    trained: tuple[Path, Path], stage: str, before: str
) -> None:
    run_dir, _ = trained
    final = run_dir / stage / "final"
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    adapted = peft.PeftModel.from_pretrained(load_policy(run_dir / before), str(final / "adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, load_policy(final)(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_stopped_stage_goes_on_from_its_adapters(trained: tuple[Path, Path], tmp_path: Path, stage: str) -> None:
    run_dir, config = trained
    other = tmp_path / "tiny"
    shutil.copytree(run_dir, other, symlinks=True, ignore=shutil.ignore_patterns(stage))
    run_here(Order(stage, str(other), str(config), stop_after=3), gradients=False)
    assert not StageDir(other, stage).is_final()
    run_here(Order(stage, str(other), str(config)), gradients=False)
    assert_same_weights(StageDir(other, stage).final(), StageDir(run_dir, stage).final())


def test_frozen_weights_in_half_precision_are_merged_as_they_were_before(tmp_path: Path) -> None:
    run_dir, config = fetched_run(tmp_path), settings(tmp_path, precision="bfloat16")
    run_here(Order("sft", str(run_dir), str(config)), gradients=False)
    base = run_dir / "fetch" / "final" / "base"
    assert {name.split(".")[4] for name in moved(run_dir, "sft", base)} == {"q_proj", "v_proj"}
    weights = load_file(run_dir / "sft" / "final" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("lora", "named"),
    [
        ({"rank": 2, "targets": ["query"]}, r"sft\.lora\.targets=\[query\].*they have fc_in, fc_out, k_proj"),
        ({"quantize": "4bit"}, r"sft\.lora\.quantize=4bit without adapters.*set sft\.lora\.rank"),
        ({"rank": 2, "quantize": "4bit"}, r"sft\.lora\.quantize=4bit needs a CUDA GPU"),
    ],
)
def test_what_cannot_be_adapted_is_named(tmp_path: Path, lora: dict[str, Any], named: str) -> None:
    run_dir = fetched_run(tmp_path)
    config = tiny_config(sft={"lora": lora}, runtime={"device": "cpu"})
    try:
        with pytest.raises(ConfigError, match=named):
            run_stage(next(one for one in STAGES if one.name == "sft"), config, run_dir, StopSignal())
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
