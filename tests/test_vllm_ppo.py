"""PPO whose rollouts vLLM samples: it has the policy's weights, and a run that was stopped ends with the same bits.

tests/test_vllm_engine.py begins with how to get vLLM without a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rlhf.checkpoint import StageDir
from rlhf.config import Config, TinyModelConfig
from rlhf.environment import EnvironmentRow, load_environment
from rlhf.errors import StopRequested
from rlhf.generation import BuiltinEngine, Generation, draw_chances
from rlhf.models import create_tiny_gptj
from rlhf.ppo_setup import Learner, build_learner
from rlhf.runtime import generator
from rlhf.sampling import Sampling
from rlhf.stages import ppo
from rlhf.stopping import StopSignal
from rlhf.telemetry import read_metrics
from tests.fakes import EOS_ID, PAD_ID, POSITIONS
from tests.test_ppo import AfterQuestions, metrics_but_times
from tests.tiny_run import byte_tokenizer, ppo_config, ready_for_ppo

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; see tests/test_vllm_engine.py", allow_module_level=True)

SHAPE = TinyModelConfig(layers=2, hidden=64, heads=2, rotary_dim=8, vocab_size=260)  # vLLM has no heads below 32
GREEDY = Sampling(max_new_tokens=20, temperature=0)
ADAPTERS = {"rank": 2, "targets": ["q_proj", "v_proj"]}


def gptj() -> PreTrainedModel:
    return create_tiny_gptj(SHAPE, positions=POSITIONS, vocab_size=260, eos_id=EOS_ID, pad_id=PAD_ID, seed=1)


def tied_llama() -> PreTrainedModel:
    """Its LM head is its embeddings, until PPO trains the head."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        bos_token_id=EOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return ready_for_ppo(tmp_path, shape=SHAPE)


@pytest.fixture
def learner_of(run_dir: Path) -> Iterator[Callable[..., Learner]]:
    """Builds a learner that samples with vLLM, of a policy that stands in place of the run's SFT."""
    learners: list[Learner] = []

    def build(policy: PreTrainedModel, **settings: Any) -> Learner:
        with StageDir(run_dir, "sft").publish(2, final=True) as directory:
            policy.save_pretrained(directory)
            byte_tokenizer().save_pretrained(directory)
        learners.append(build_learner(ppo_config(sampler="vllm", **settings), StageDir(run_dir, "ppo")))
        return learners[-1]

    yield build
    for learner in learners:
        learner.close()


def train(run_dir: Path, settings: Config, stop: StopSignal | None = None) -> dict[str, torch.Tensor]:
    ppo.run(settings, StageDir(run_dir, "ppo"), stop or StopSignal())
    return load_file(StageDir(run_dir, "ppo").final() / "model.safetensors")


def prompts_of(rows: int) -> list[list[int]]:
    return [torch.randint(0, 256, (3 + 5 * row,), generator=generator(row)).tolist() for row in range(rows)]


def responses(generation: Generation) -> list[list[int]]:
    rows = zip(generation.response_BR, generation.response_mask_BR, strict=True)
    return [ids_R[mask_R].tolist() for ids_R, mask_R in rows]


def move(learner: Learner, token: int) -> None:
    """Two optimiser steps that change the policy's mind, towards this token after every other."""
    for _ in range(2):
        logits_BTV = learner.actor.policy(torch.tensor([[5, 6, 9, 4]])).logits
        learner.strategy.backward(-logits_BTV.log_softmax(dim=-1)[..., token].mean())
        assert learner.strategy.step(clip=1e9).taken
        learner.schedule.step()


def test_a_whole_run(run_dir: Path) -> None:
    before = load_file(run_dir / "sft" / "final" / "model.safetensors")
    after = train(run_dir, ppo_config(sampler="vllm"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith(("transformer.h.1.", "transformer.ln_f.", "lm_head."))}
    rows = read_metrics(run_dir / "ppo" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    # It sampled from the weights that then were the policy's: with those of an iteration before, this is above 0.01.
    assert all(0 < row["ppo/sampler_gap"] < 1e-4 for row in rows[1:])


def test_a_stopped_run_ends_with_the_same_bits(run_dir: Path, tmp_path: Path) -> None:
    settings = ppo_config(sampler="vllm", iterations=2)
    undisturbed, metrics = train(run_dir, settings), metrics_but_times(run_dir)
    StageDir(run_dir, "ppo").path.rename(tmp_path / "undisturbed")
    lives = 0
    while not StageDir(run_dir, "ppo").is_final():
        with suppress(StopRequested):
            train(run_dir, settings, AfterQuestions(4))
        lives += 1
    assert lives > 2
    resumed = load_file(StageDir(run_dir, "ppo").final() / "model.safetensors")
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)
    assert metrics_but_times(run_dir) == metrics


@pytest.mark.parametrize(
    ("policy", "settings"),
    [(gptj, {}), (gptj, {"lora": ADAPTERS}), (gptj, {"unfrozen_layers": "all"}), (tied_llama, {})],
    ids=["top blocks", "adapters", "all", "a head that was tied"],
)
def test_greedy_tokens_are_the_policys_after_every_hand_over(
    learner_of: Callable[..., Learner], policy: Callable[[], PreTrainedModel], settings: dict[str, Any]
) -> None:
    optimizer = {"learning_rate": 0.05, "warmup_steps": 0}
    learner = learner_of(policy(), optimizer=optimizer, **settings)
    own, prompts = BuiltinEngine(learner.actor.policy, eos_id=EOS_ID, pad_id=PAD_ID), prompts_of(4)
    seen = []
    for token in (7, 8, 9):
        learner.sampler_ready()
        theirs, ours = (engine.generate(prompts, GREEDY) for engine in (learner.collector.engine, own))
        assert responses(theirs) == responses(ours)
        torch.testing.assert_close(theirs.logprobs_BR, ours.logprobs_BR, atol=1e-4, rtol=0)
        seen.append(responses(theirs))
        move(learner, token)
    assert seen[0] != seen[1]


def test_without_new_weights_nothing_is_handed_over(learner_of: Callable[..., Learner]) -> None:
    learner = learner_of(gptj())
    learner.sampler_ready()
    prompts = prompts_of(2)
    before = responses(learner.collector.engine.generate(prompts, GREEDY))
    with torch.no_grad():
        learner.actor.policy.lm_head.bias[7] += 1e4  # no optimiser's doing
    learner.sampler_ready()
    assert responses(learner.collector.engine.generate(prompts, GREEDY)) == before
    learner.handed_over = None
    learner.sampler_ready()
    assert {token for row in responses(learner.collector.engine.generate(prompts, GREEDY)) for token in row} == {7}


def rows_of(run_dir: Path) -> list[EnvironmentRow]:
    return load_environment(run_dir / "prepare" / "final", "train")[:8]


def test_a_row_is_sampled_by_its_chances_in_any_company(run_dir: Path, learner_of: Callable[..., Learner]) -> None:
    learner = learner_of(gptj())
    learner.sampler_ready()
    engine, sampling = learner.collector.engine, learner.collector.sampling
    prompts = [row.prompt_ids for row in rows_of(run_dir)]
    chances_BR = draw_chances((8, sampling.max_new_tokens), generator(3))
    together = responses(engine.generate(prompts, sampling, chances_BR=chances_BR))
    assert responses(engine.generate(prompts, sampling, chances_BR=chances_BR)) == together
    parts = [
        responses(engine.generate(prompts[part], sampling, chances_BR=chances_BR[part]))
        for part in (slice(0, 1), slice(1, 6), slice(6, 8))
    ]
    assert [row for part in parts for row in part] == together
    others = responses(engine.generate(prompts, sampling, chances_BR=chances_BR.flip(0)))
    assert all(one != other for one, other in zip(others, together, strict=True))


def test_half_precision(run_dir: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = ppo_config(sampler="vllm", iterations=1).model_dump()
    settings["runtime"]["precision"] = "bfloat16"
    try:
        train(run_dir, Config.model_validate(settings))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    gap = read_metrics(run_dir / "ppo" / "metrics.jsonl")[1]["ppo/sampler_gap"]
    assert 0 < gap < 0.1
