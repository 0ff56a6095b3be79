"""trlX's configurations read into ours: today's layout and older ones, with a remark wherever a meaning changes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.config import Config
from rlhf.console import Parser
from rlhf.errors import ConfigError
from rlhf.presets import load_config
from rlhf.trlx.import_command import add_import_trlx, command_import_trlx
from rlhf.trlx.translation import Translation
from rlhf.trlx.yaml_import import imported, render
from tests.conftest import REPOSITORY

PPO = """
train: {seq_length: 550, epochs: 50, total_steps: 100000, batch_size: 4, checkpoint_interval: 10000,
        eval_interval: 200, pipeline: PromptPipeline, trainer: AcceleratePPOTrainer, tracker: wandb, seed: 7}
model: {model_path: EleutherAI/gpt-j-6b, num_layers_unfrozen: 8}
tokenizer: {tokenizer_path: gpt2, truncation_side: right}
optimizer: {name: adamw, kwargs: {lr: 5e-6, betas: [0.9, 0.999], eps: 1.0e-8, weight_decay: 0.01}}
scheduler: {name: cosine_annealing, kwargs: {T_max: 100000, eta_min: 5.0e-6}}
method: {name: PPOConfig, num_rollouts: 128, chunk_size: 16, ppo_epochs: 4, init_kl_coef: 0.1, target: 6,
         horizon: 10000, gamma: 1, lam: 0.95, cliprange: 0.2, cliprange_value: 0.3, vf_coef: 0.5,
         scale_reward: null, ref_mean: null, ref_std: null, cliprange_reward: 10,
         gen_kwargs: {max_new_tokens: 50, top_k: 0, top_p: 1.0, do_sample: true}}
"""
SFT = """
train: {seq_length: 64, epochs: 3, total_steps: 900, batch_size: 8, minibatch_size: 2, checkpoint_interval: 300,
        eval_interval: 100, pipeline: PromptPipeline, trainer: AccelerateSFTTrainer}
model: {model_path: gpt2, num_layers_unfrozen: -1}
tokenizer: {tokenizer_path: gpt2}
optimizer: {name: adamw, kwargs: {lr: 1.0e-4}}
scheduler: {name: cosine_annealing, kwargs: {T_max: 900, eta_min: 1.0e-5}}
method: {name: sftconfig, gen_kwargs: {max_new_tokens: 40, top_k: 0}}
"""
OLDEST = """
model: {model_path: gpt2, tokenizer_path: gpt2, model_type: AcceleratePPOModel, device: cuda, num_layers_unfrozen: -1}
train: {n_ctx: 512, epochs: 10, batch_size: 16, grad_clip: 0.5, lr_ramp_steps: 100, lr_decay_steps: 790,
        weight_decay: 1.0e-6, learning_rate_init: 1.412e-4, learning_rate_target: 3.0e-6, opt_betas: [0.9, 0.95],
        checkpoint_interval: 1000, eval_interval: 16, pipeline: PPOPipeline, orchestrator: PPOOrchestrator}
method: {name: ppoconfig, num_rollouts: 16, ppo_epochs: 4, init_kl_coef: 0.2, target: null, horizon: 10000, gamma: 1,
         lam: 0.95, cliprange: 0.2, cliprange_value: 0.2, vf_coef: 2.3,
         gen_kwargs: {max_length: 48, top_k: 0.0, top_p: 1.0, do_sample: true}}
"""


def read(folder: Path, text: str, *, processes: int = 1) -> tuple[Config, str]:
    """Our configuration, and the text that it was read from."""
    (folder / "trlx.yml").write_text(text)
    ours = imported(folder / "trlx.yml", processes=processes)
    (folder / "ours.yaml").write_text(ours)
    return load_config(str(folder / "ours.yaml")), ours


def test_a_ppo_configuration_becomes_ours(tmp_path: Path) -> None:
    config, text = read(tmp_path, PPO)
    ppo = config.ppo
    assert (config.seed, config.model.base, config.model.tokenizer) == (7, "EleutherAI/gpt-j-6b", "gpt2")
    assert (config.prompt.max_prompt_tokens, config.prompt.max_response_tokens) == (500, 50)
    assert (ppo.rollouts_per_iteration, ppo.rollout_chunk, ppo.minibatch_size, ppo.micro_batch_size) == (128, 16, 4, 4)
    assert (ppo.unfrozen_layers, ppo.clip_ratio, ppo.clip_value, ppo.vf_coef) == (8, 0.2, 0.3, 0.5)
    assert (ppo.kl_controller, ppo.init_kl_coef, ppo.kl_target, ppo.kl_horizon) == ("adaptive", 0.1, 6.0, 10_000)
    assert (ppo.clip_score, ppo.scale_score, ppo.reward) == (10.0, "none", "absolute")
    # 4 passes over 128 rollouts by 4 are 128 optimiser steps, and 200 of them are nearest to 2 iterations.
    assert (ppo.iterations, ppo.eval_every_iterations, ppo.save_every_iterations) == (50, 2, 78)
    assert (ppo.optimizer.learning_rate, ppo.optimizer.schedule) == (5e-6, "constant")
    assert "#   train.tracker='wandb': metrics.jsonl" in text
    assert "train.epochs=50 iterations and train.total_steps=100000 optimiser steps, 128 each" in text


def test_batch_sizes_are_those_of_one_process(tmp_path: Path) -> None:
    config, _ = read(tmp_path, PPO, processes=2)
    assert (config.ppo.minibatch_size, config.ppo.micro_batch_size, config.ppo.rollouts_per_iteration) == (8, 4, 256)
    assert config.ppo.iterations == 50  # as many steps an iteration as on one


def test_total_steps_end_the_run_when_they_come_sooner(tmp_path: Path) -> None:
    assert read(tmp_path, PPO.replace("100000", "1281"))[0].ppo.iterations == 11


def test_rollouts_are_whole_chunks_and_minibatches(tmp_path: Path) -> None:
    config, text = read(tmp_path, PPO.replace("num_rollouts: 128", "num_rollouts: 20").replace("size: 4", "size: 12"))
    assert config.ppo.rollouts_per_iteration == 48  # 20 are two chunks of 16, and 32 are not a multiple of 12
    assert "20 a process, brought up to whole chunks and minibatches" in text


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        (("target: 6", "target: null"), "kl_controller", "fixed"),
        (("num_layers_unfrozen: 8", "num_layers_unfrozen: -1"), "unfrozen_layers", "all"),
        (("scale_reward: null", "scale_reward: running"), "scale_score", "running"),
        (("cliprange_reward: 10", "cliprange_reward: false"), "clip_score", None),
        (("do_sample: true", "temperature: 0.5"), "temperature", 0.5),
    ],
)
def test_special_values_have_ours(tmp_path: Path, change: tuple[str, str], key: str, value: object) -> None:
    assert getattr(read(tmp_path, PPO.replace(*change))[0].ppo, key) == value


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        (("scale_reward: null", "scale_reward: ref"), "method.scale_reward='ref'"),
        (("ref_mean: null", "ref_mean: 0.5"), "method.ref_mean=0.5"),
        (("top_p: 1.0", "top_p: 0.7"), "method.gen_kwargs.top_p=0.7"),
        (("top_k: 0, ", ""), "transformers took 50"),
        (("name: adamw", "name: adamw_8bit_bnb"), "optimizer.name=adamw_8bit_bnb"),
        (("horizon: 10000", "horizon: 10000, num_value_layers_unfrozen: 2"), "num_value_layers_unfrozen"),
        (("seed: 7", "seed: 7, swiftness: 3"), "train.swiftness=3: no key of trlX's"),
        (("cosine_annealing, kwargs: {T_max: 100000, eta_min: 5.0e-6}", "linear"), "scheduler.name=linear"),
    ],
)
def test_what_has_no_counterpart_is_named(tmp_path: Path, change: tuple[str, str], lost: str) -> None:
    assert change[0] in PPO
    header = read(tmp_path, PPO.replace(*change))[1].split("\nseed")[0]
    assert lost in header
    assert lost not in read(tmp_path, PPO)[1]


def test_adapters_are_ours(tmp_path: Path) -> None:
    adapter = "num_layers_unfrozen: 8, peft_config: {peft_type: LORA, r: 4, lora_alpha: 32, lora_dropout: 0.1}"
    config, text = read(tmp_path, PPO.replace("num_layers_unfrozen: 8", adapter))
    assert (config.ppo.lora.rank, config.ppo.lora.alpha) == (4, 32.0)
    assert "model.peft_config.lora_dropout=0.1" in text


def test_an_sft_configuration_becomes_ours(tmp_path: Path) -> None:
    sft = read(tmp_path, SFT, processes=4)[0].sft
    assert (sft.batch_size, sft.micro_batch_size, sft.epochs, sft.max_steps) == (32, 2, 3.0, 900)
    assert (sft.eval_every_steps, sft.save_every_steps, sft.loss_on) == (100, 300, "all")
    assert (sft.optimizer.schedule, sft.optimizer.final_learning_rate) == ("cosine", 1e-5)


def test_an_older_layout_is_read(tmp_path: Path) -> None:
    config, text = read(tmp_path, OLDEST)
    optimizer = config.ppo.optimizer
    assert (optimizer.learning_rate, optimizer.final_learning_rate) == (1.412e-4, 3e-6)
    assert (optimizer.betas, optimizer.weight_decay) == ((0.9, 0.95), 1e-6)
    assert (optimizer.max_grad_norm, optimizer.warmup_steps, config.ppo.schedule_steps) == (0.5, 100, 790)
    assert (config.ppo.iterations, config.ppo.rollout_chunk, config.model.tokenizer) == (10, 16, None)
    assert config.prompt == Config().prompt  # max_length counts prompt and response, so that it tells neither
    assert "method.gen_kwargs.max_length=48: it counts the prompt, too" in text
    assert "train.orchestrator='PPOOrchestrator'" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "no trlX configuration"),
        ("model: [", "not valid YAML"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
        (PPO.replace("PPOConfig", "ILQLConfig"), "method.name=ilqlconfig has no counterpart"),
        (PPO.replace("model_path", "model_arch_type: seq2seq, model_path"), "seq2seq"),
        (PPO.replace("gamma: 1,", ""), "method.gamma is missing"),
        (PPO.replace("num_rollouts: 128", "num_rollouts: many"), "num_rollouts='many' is not a number"),
        (PPO.replace("batch_size: 4", "batch_size: 0"), "train.batch_size=0 is not a positive"),
        (PPO.replace("lam: 0.95", "lam: 1.5"), "not possible here: ppo.lam=1.5"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        imported(tmp_path / "none.yml")


def test_a_section_stands_once() -> None:
    translation = Translation({}, ours={"ppo.a": 1, "ppo.deep.b": 2, "model.c": 3, "ppo.d": None, "ppo.deep.e": [1]})
    lines = render(translation, name="x.yml").splitlines()[1:]
    assert lines == ["ppo:", "  a: 1", "  d: null", "  deep:", "    b: 2", "    e: [1]", "model:", "  c: 3"]


def test_a_remark_cannot_break_out_of_its_line() -> None:
    translation = Translation({}, ours={"ppo.a": 1}, remarks={"ppo.a": "x\nppo: 2"}, lost=["y\nppo: 3"])
    assert [line for line in render(translation, name="x\nppo: 4").splitlines() if not line.startswith("#")] == [
        "ppo:",
        "  a: 1  # x ppo: 2",
    ]


def test_the_command_prints_it_and_is_light(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser()
    add_import_trlx(parser.add_subparsers())
    (tmp_path / "trlx.yml").write_text(PPO)
    options = parser.parse_args(["import-trlx", str(tmp_path / "trlx.yml"), "--processes", "2"])
    assert options.command(options) == 0
    assert "  minibatch_size: 8  # of all processes together" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--processes 0"):
        command_import_trlx(parser.parse_args(["import-trlx", str(tmp_path / "trlx.yml"), "--processes", "0"]))
    code = "import sys, rlhf.trlx.import_command; sys.exit(bool({'torch', 'trlx', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
