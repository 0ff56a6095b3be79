"""The memory planner: its counts against real models, its sums by hand, its advice, and its command."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from rlhf import block_linears, kv_cache, memory_activations, scoring, vocabulary
from rlhf.checkpoint import CONFIG_FILE
from rlhf.config import Config, LoraConfig, ModelConfig
from rlhf.console import Parser
from rlhf.errors import ConfigError, UsageError
from rlhf.forward import hidden_states
from rlhf.gptj import use_fused_attention
from rlhf.memory_activations import Batch, around_blocks, autocast_copies, cache, kept_by_block, numerics
from rlhf.memory_advice import advise, changed
from rlhf.memory_plan import Machine, other_strategies, plan_run, plan_stage
from rlhf.memory_strategy import read_strategy, training_state
from rlhf.memory_trained import adapter_numbers
from rlhf.model_families import GPT_J_6B, find_shape, shape_of
from rlhf.model_shape import ModelShape
from rlhf.packing import Packed, pack, pack_groups
from rlhf.plan_command import add_plan_command, parse_size
from rlhf.presets import load_config
from tests.benchmarks import plan_traced
from tests.conftest import REPOSITORY
from tests.tiny_run import fetched_run, tiny_config

GB = 10**9
BIG = shape_of(GPT_J_6B, name="gpt-j-6b")
SMALL = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 2}
GPTJ = {"n_embd": 96, "n_head": 4, "rotary_dim": 8, "n_positions": 96, **SMALL}
GROUPED = {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 200, **SMALL}
NEOX = {"hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 384, "max_position_embeddings": 96, **SMALL}
KINDS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "gptj": (GPTJConfig, {**GPTJ, "tie_word_embeddings": False}, "n_layer"),
    "gptj-tied": (GPTJConfig, {**GPTJ, "tie_word_embeddings": True}, "n_layer"),
    "gpt2": (GPT2Config, {"n_embd": 96, "n_head": 4, "n_positions": 96, **SMALL}, "n_layer"),
    "gpt_neox": (GPTNeoXConfig, NEOX, "num_hidden_layers"),
    "llama": (LlamaConfig, GROUPED, "num_hidden_layers"),
    "mistral": (MistralConfig, GROUPED, "num_hidden_layers"),
    "qwen2": (Qwen2Config, GROUPED, "num_hidden_layers"),
}


def model_config(kind: str, layers: int) -> PretrainedConfig:
    make, settings, key = KINDS[kind]
    made: PretrainedConfig = make(**settings, **{key: layers}, num_labels=1)
    for name, value in made.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(made, name, 0.0)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_real_models(kind: str) -> None:
    config = model_config(kind, 3)
    shape = shape_of(config.to_dict(), name=kind)
    with torch.device("meta"):
        policy = AutoModelForCausalLM.from_config(config)
        reward = AutoModelForSequenceClassification.from_config(config)
    assert shape.policy_numbers == sum(weight.numel() for weight in policy.parameters())
    assert shape.reward_numbers == sum(weight.numel() for weight in reward.parameters())


def test_gpt_j_6b_has_its_published_number_of_parameters() -> None:
    assert BIG.policy_numbers == 6_050_882_784


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["gptj", "gpt2", "gpt_neox", "llama"])
def test_a_block_keeps_what_autograd_saves(kind: str, precision: str) -> None:
    rows, tokens = 2, 80
    # The other families' rows are padded, so that they need a mask.
    packed = pack([[1] * tokens, [1] * (tokens - 5 * (kind != "gptj"))], keep=4)
    saved = [saved_bytes(model_config(kind, layers), packed, precision) for layers in (1, 2)]
    shape = shape_of(model_config(kind, 1).to_dict(), name=kind)
    form = numerics(precision, autocast=True, device="cpu")
    kept = kept_by_block(shape, form, Batch(rows, tokens, kept=4))
    # Means of norms, rotary tables and biases, which only count at a width of 96, are left out.
    assert kept == pytest.approx(saved[1] - saved[0] - autocast_copies(shape.matrix_numbers, form), rel=0.04)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_last_block_keeps_little_of_tokens_that_are_not_read(precision: str) -> None:
    shape, form = (
        shape_of(model_config("gptj", 1).to_dict(), name="gptj"),
        numerics(precision, autocast=True, device=""),
    )
    saved = saved_bytes(model_config("gptj", 1), pack([[1] * 80] * 2, keep=30), precision)
    batch = Batch(2, 80, kept=30)
    kept = kept_by_block(shape, form, batch, last=True) + around_blocks(shape, batch)
    # Of the final norm only the input is saved, and rotations are left out.
    assert kept - 2 * 30 * 4 * 96 == pytest.approx(saved - autocast_copies(shape.matrix_numbers, form), rel=0.04)


def test_blocks_keep_the_mask_of_pairs_that_share_their_prompt() -> None:
    shape, form = (
        shape_of(model_config("gptj", 1).to_dict(), name="gptj"),
        numerics("float32", autocast=True, device=""),
    )
    packed = pack_groups([[1] * 60] * 2, [[[1] * 10, [2] * 10]] * 2, keep=1)
    saved = [saved_bytes(model_config("gptj", layers), packed, "float32") for layers in (1, 2)]
    alone, shared = (kept_by_block(shape, form, Batch(2, 80, kept=2, shared=pair)) for pair in (False, True))
    assert shared - alone == 2 * 80 * 80 * 4
    assert shared == pytest.approx(saved[1] - saved[0], rel=0.04)


def packed_shape() -> ModelShape:
    return shape_of(model_config("gptj", 1).to_dict(), name="gptj")


def saved_bytes(config: PretrainedConfig, packed: Packed, precision: str) -> int:
    """Bytes of what the backbone's forward pass saves for backward, beside its weights."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation=None).train()
    use_fused_attention(model)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    half = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), half:
        hidden_KH = hidden_states(model.base_model, packed)
    assert hidden_KH.requires_grad
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in weights)


def test_constants_are_those_of_the_code_that_is_planned() -> None:
    """The planner does without torch, so it cannot import them."""
    planned = memory_activations
    assert planned.CPU_BATCH_TOKENS == scoring.CPU_BATCH_TOKENS
    assert (planned.CPU_CHUNK, planned.ACCELERATOR_CHUNK) == (vocabulary.CPU_CHUNK, vocabulary.ACCELERATOR_CHUNK)
    assert planned.STEPS_WORTH_PACKING == block_linears.STEPS_WORTH_PACKING
    assert planned.MOST_PACKED_BYTES == block_linears.MOST_PACKED_BYTES
    assert planned.COLUMNS_AT_ONCE == kv_cache.COLUMNS_AT_ONCE


def test_replicas_take_sixteen_bytes_a_parameter() -> None:
    device, host = training_state(read_strategy(None, key="x"), trained=6_050_882_784, frozen_bytes=0, processes=8)
    assert sum(device.values()) == 96_814_124_544
    assert host == {}


def test_zero_shares_what_its_stage_says() -> None:
    found = {}
    for name in ("zero2", "zero3", "zero2-offload", "zero3-offload"):
        device, host = training_state(read_strategy(name, key="x"), trained=800, frozen_bytes=0, processes=8)
        device.pop("buckets")
        found[name] = (device, host)
    # 100 of 800 weights a process: masters and moments 12 bytes each, gradients 4; stage 3 gathers all 800 at once.
    assert found["zero2"] == ({"weights": 3200, "gradients": 400, "optimiser": 1200}, {})
    assert found["zero3"][0] == {"weights": 400, "gathered weights": 3200, "gradients": 400, "optimiser": 1200}
    assert found["zero2-offload"] == ({"weights": 3200}, {"gradients": 400, "optimiser": 1600})
    assert found["zero3-offload"] == (
        {"gathered weights": 3200},
        {"weights": 400, "gradients": 400, "optimiser": 1200},
    )


def test_a_deepspeed_file_of_ones_own_is_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000}}))
    assert read_strategy(str(file), key="sft.deepspeed").reduce_buckets == 2000
    file.write_text("{}")
    with pytest.raises(ConfigError, match=r"sft\.deepspeed=.*mine\.json: no DeepSpeed file with a ZeRO stage"):
        read_strategy(str(file), key="sft.deepspeed")


def test_cache_and_adapters_by_hand() -> None:
    form = numerics("bfloat16", autocast=True, device="cuda")
    # Keys and values of 28 blocks, 16 rows, 550 tokens, 4096 wide, 2 bytes each.
    assert cache(BIG, form, rows=16, tokens=550) == 4_037_017_600
    # A padded cache of 2 blocks, 2 rows, 65 columns rounded up to 128, 2 of 4 heads of 24 numbers.
    assert cache(shape_of(model_config("llama", 2).to_dict(), name="x"), form, rows=2, tokens=65) == 98_304
    # q_proj and v_proj of 28 blocks: rank 8 times (4096 + 4096), twice.
    assert adapter_numbers(BIG, LoraConfig(rank=8), layers=28) == 3_670_016


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_traced_training_pass_takes_what_was_planned(checkpointing: bool) -> None:
    settings = {**GPT_J_6B, "n_layer": 3, "n_embd": 512, "n_head": 8, "vocab_size": 8192, "rotary_dim": 32}
    config = plan_traced.cases("sft", "bfloat16", checkpointing, 4)
    traced = plan_traced.trace("sft", config, settings)
    assert plan_traced.planned("sft", config, settings) == pytest.approx(traced, rel=0.15)


def test_advice_ends_with_something_that_fits() -> None:
    config, machine = load_config("gptj-6b"), Machine(1, 8, 24 * GB)
    for stage in ("sft", "reward", "ppo", "evaluate"):
        assert not plan_stage(stage, config, BIG, machine).fits
        advice = advise(stage, config, BIG, machine)
        assert advice.after.fits == plan_stage(stage, *_in_order(config, machine, advice.changes)).fits
        if advice.after.fits:
            for key in advice.changes:  # none of them is for nothing
                fewer = {name: value for name, value in advice.changes.items() if name != key}
                assert not plan_stage(stage, *_in_order(config, machine, fewer)).fits


def _in_order(config: Config, machine: Machine, changes: dict[str, Any]) -> tuple[Config, Any, Machine]:
    new_config, new_machine = changed(config, machine, changes)
    return new_config, BIG, new_machine


def test_advice_says_when_nothing_helps() -> None:
    advice = advise("prepare", load_config("gptj-6b"), BIG, Machine(1, 1, 8 * GB))  # its weights alone take 11.7
    assert not advice.after.fits


def test_the_mildest_change_is_advised() -> None:
    config, machine = load_config("gptj-6b"), Machine(1, 8, 80 * GB)
    assert advise("sft", config, BIG, machine).changes == {"sft.deepspeed": "zero2"}


def test_sharing_more_takes_no_more() -> None:
    plans = {p.strategy: p for p in other_strategies("sft", load_config("gptj-6b"), BIG, Machine(2, 8, 80 * GB))}
    state = {name: plan.need.peak.parts.get("optimiser", 0) for name, plan in plans.items()}
    assert state["ddp"] > state["zero2"] == state["zero3"] > state["zero2-offload"] == 0
    # Masters, moments and the pinned buffer, 16 bytes of a sixteenth of the weights.
    assert plans["zero2-offload"].need.kept["offloaded optimiser"] == 6_050_882_784
    assert plans["zero2"].need.kept == {}


def test_nothing_is_set_aside_for_cuda_on_the_cpu() -> None:
    config = load_config("demo")
    shape = find_shape(config, None, None)
    assert {plan.margin for plan in plan_run(config, shape, Machine(1, 1, GB, device="cpu"))} == {0}
    assert min(plan.margin for plan in plan_run(config, shape, Machine(1, 1, GB))) > 1_500_000_000


def test_unknown_shapes_are_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.base=nobody/knows: .*run `rlhf fetch` first, or give --model"):
        find_shape(load_config("demo", ["model.base=nobody/knows"]), None, None)
    (tmp_path / "config.json").write_text('{"model_type": "bloom"}')
    with pytest.raises(ConfigError, match=r"model_type='bloom' is not known; known are gpt2, .*--model"):
        find_shape(load_config("demo"), None, str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gptj", "n_layer": 2}')
    with pytest.raises(ConfigError, match=r"config\.json has no number 'n_embd'; complete it"):
        find_shape(load_config("demo"), None, str(tmp_path))


def run_command(*arguments: str, runs_dir: Path) -> int:
    """`rlhf plan` with these arguments, its parents as the command line has them."""
    common, settings = Parser(add_help=False), Parser(add_help=False)
    common.add_argument("--run", default="demo")
    common.add_argument("--runs-dir", type=Path, default=runs_dir)
    settings.add_argument("--config")
    settings.add_argument("--set", action="append", default=[])
    parser = Parser(prog="rlhf")
    add_plan_command(parser.add_subparsers(), [common, settings])
    options: argparse.Namespace = parser.parse_args(["plan", *arguments])
    code: int = options.command(options)
    return code


def test_command_says_yes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--config", "gptj-6b", "--set", "sft.deepspeed=zero2", "--gpus", "8", "--gpu-memory", "80GB")
    assert run_command(*arguments, "--host-memory", "512GiB", runs_dir=tmp_path) == 0
    shown = capsys.readouterr().out
    assert "6,050,882,784 parameters; 1 node(s) of 8 GPU(s) with 80.0 GB" in shown
    assert re.search(r"^sft +zero2 .* yes$", shown, re.MULTILINE)
    assert "fits, with" not in shown


def test_command_says_no_and_what_to_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--config", "gptj-6b", "--gpus", "8", "--gpu-memory", "80GB")
    assert run_command(*arguments, runs_dir=tmp_path) == 78
    shown = capsys.readouterr().out
    assert "  sft.deepspeed: zero2\n" in shown
    assert "with all of these every stage fits: --set sft.deepspeed=zero2" in shown


def test_command_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("--config", "demo", "--gpus", "1", "--gpu-memory", "4GB", "--json", runs_dir=tmp_path) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] is True
    assert set(told["stages"]) == {"sft", "reward", "prepare", "ppo", "evaluate"}
    ppo = told["stages"]["ppo"]
    assert ppo["device_bytes"] == sum(ppo["phases"][ppo["fullest"]].values()) + ppo["margin_bytes"]


def test_command_reads_the_base_that_the_run_has_fetched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = fetched_run(tmp_path)
    config = tiny_config().model_copy(update={"model": ModelConfig(base="tiny")})
    (run_dir / "fetch" / CONFIG_FILE).write_text(config.to_yaml())
    size = ("--gpus", "1", "--gpu-memory", "4GB")
    assert run_command("--run", run_dir.name, "--set", "ppo.unfrozen_layers=2", *size, runs_dir=tmp_path) == 0
    # 2 blocks of 12,512, 260 x 32 embeddings, as many in the head and 260 biases, 64 in the last norm.
    assert f"{run_dir / 'fetch' / 'final' / 'base'}: gptj, 41,988 parameters" in capsys.readouterr().out
    assert run_command("--run", run_dir.name, "--config", "gptj-6b", *size, runs_dir=tmp_path) == 78
    assert "6,050,882,784 parameters" in capsys.readouterr().out


def test_the_kubernetes_page_shows_what_the_command_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (REPOSITORY / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    found = re.search(r"^python -m rlhf plan (.*?)^```$\n+^```$\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert found is not None
    run_command(*shlex.split(found.group(1).replace("\\\n", " ")), runs_dir=tmp_path)
    assert capsys.readouterr().out == found.group(2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpus", "8", "--gpu-memory", "80"), "--gpu-memory 80: give a size with its unit, 80GB say"),
        (("--gpus", "8", "--gpu-memory", "lots"), "--gpu-memory lots: give a size with its unit"),
        (("--gpus", "0", "--gpu-memory", "80GB"), "--gpus 0: give 1 or more"),
        (("--gpus", "8", "--nodes", "0", "--gpu-memory", "80GB"), "--nodes 0: give 1 or more"),
        (("--gpu-memory", "80GB"), "required: --gpus"),
    ],
)
def test_command_refuses_what_makes_no_sense(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        run_command("--config", "gptj-6b", *arguments, runs_dir=tmp_path)


def test_sizes_have_units() -> None:
    assert parse_size("80GB", option="x") == 80_000_000_000
    assert parse_size("1.5 GiB", option="x") == 1_610_612_736


def test_planning_needs_no_torch() -> None:
    code = "import sys, rlhf.plan_text, rlhf.plan_command, rlhf.memory_advice; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_vllm_keeps_a_copy_of_the_policy_and_a_cache_beside_the_training() -> None:
    def phases(sampler: str) -> dict[str, dict[str, int]]:
        config = load_config("gptj-6b", ["runtime.precision=bfloat16", f"ppo.sampler={sampler}"])
        need = plan_stage("ppo", config, BIG, Machine(nodes=1, gpus=1, gpu_memory=80 * GB)).need
        return {phase.name: phase.parts for phase in need.phases}

    plain, copied = phases("builtin"), phases("vllm")
    # 16 sequences of 550 tokens in 5 blocks of 128 each, and an empty block; 28 layers, keys and values of 4096.
    kept = {"vLLM's weights": 2 * 6_050_882_784, "vLLM's kv cache": 2 * (16 * 5 + 1) * 128 * 2 * 28 * 4096}
    assert (
        copied.pop("rollouts").keys()
        == (plain.pop("rollouts").keys() - {"kv cache", "activations", "precision copies"}) | kept.keys()
    )
    assert copied == {name: parts | kept for name, parts in plain.items()}
