"""PPO's sampler with weights of its own has the policy's whenever it samples; what vLLM cannot do is said before."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlhf.checkpoint import StageDir
from rlhf.config import Config
from rlhf.errors import ConfigError, StopRequested
from rlhf.generation import BuiltinEngine
from rlhf.models import load_policy
from rlhf.ppo_setup import build_learner
from rlhf.stages import ppo
from rlhf.stopping import StopSignal
from rlhf.vllm_engine import _seeds_of
from rlhf.vllm_limits import check_ppo_sampler
from tests.test_ppo import AfterQuestions, metrics_but_times
from tests.tiny_run import ppo_config, ready_for_ppo

ADAPTERS = {"rank": 2, "targets": ["q_proj", "v_proj"]}


class CopyEngine(BuiltinEngine):
    """Stands in for vLLM: a network of its own, which knows nothing before weights are handed over."""

    started: list[CopyEngine]

    def __init__(self, directory: Path, *, eos_id: int, pad_id: int, dtype: torch.dtype, **settings: Any) -> None:
        model = load_policy(directory, dtype=dtype)
        for weight in model.parameters():
            weight.data.fill_(torch.nan)
        super().__init__(model, eos_id=eos_id, pad_id=pad_id)
        self.settings, self.syncs, self.closed = settings, 0, False
        CopyEngine.started.append(self)

    def sync(self, state_dict: Any) -> None:
        self.syncs += 1
        super().sync(state_dict)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return ready_for_ppo(tmp_path)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[CopyEngine]:
    """The engines that were started in vLLM's place."""
    monkeypatch.setattr("rlhf.ppo_sampler.VllmEngine", CopyEngine)
    monkeypatch.setattr("rlhf.vllm_limits.find_spec", lambda name: name)
    monkeypatch.setattr(CopyEngine, "started", [], raising=False)
    return CopyEngine.started


def train(run_dir: Path, settings: Config, stop: StopSignal | None = None) -> dict[str, Tensor]:
    ppo.run(settings, StageDir(run_dir, "ppo"), stop or StopSignal())
    return load_file(StageDir(run_dir, "ppo").final() / "model.safetensors")


@pytest.mark.parametrize("lora", [{}, ADAPTERS], ids=["weights", "adapters"])
def test_a_sampler_with_a_copy_trains_the_same_policy(
    run_dir: Path, tmp_path: Path, copies: list[CopyEngine], lora: dict[str, Any]
) -> None:
    # The usual epsilon makes steps of full size out of gradients that are nothing but rounding.
    settings = {"lora": lora, "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0, "eps": 1e-4}}
    shared = train(run_dir, ppo_config(**settings))
    metrics = metrics_but_times(run_dir)
    assert copies == []
    StageDir(run_dir, "ppo").path.rename(tmp_path / "shared")

    copied = train(run_dir, ppo_config(**settings, sampler="vllm"))
    torch.testing.assert_close(copied, shared, atol=1e-5, rtol=0)
    for one, other in zip(metrics, metrics_but_times(run_dir), strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    (engine,) = copies
    # Evaluations of SFT, after 2 iterations and after 3, and the second iteration; the rest finds nothing new.
    assert engine.syncs == 4
    assert engine.closed
    expected = {"slots": 4, "device": "cpu", "max_sequence_tokens": 120, "load_weights": False}
    assert engine.settings == expected


def test_a_resumed_run_hands_over_what_it_had(run_dir: Path, tmp_path: Path, copies: list[CopyEngine]) -> None:
    settings = ppo_config(iterations=2, sampler="vllm")
    undisturbed = train(run_dir, settings)
    StageDir(run_dir, "ppo").path.rename(tmp_path / "undisturbed")
    while not StageDir(run_dir, "ppo").is_final():
        with suppress(StopRequested):
            train(run_dir, settings, AfterQuestions(8))
    resumed = load_file(StageDir(run_dir, "ppo").final() / "model.safetensors")
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)
    assert len(copies) == 3
    assert all(engine.closed for engine in copies)


def test_the_built_in_engine_is_handed_nothing(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("weights were copied onto themselves")

    monkeypatch.setattr(BuiltinEngine, "sync", refuse)
    learner = build_learner(ppo_config(), StageDir(run_dir, "ppo"))
    learner.sampler_ready()
    assert learner.handed_over is None


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"temperature": 2.5}, r"temperatures from 0\.01 to 2\.0, and ppo\.temperature is 2\.5; change it"),
        ({"temperature": 0.001}, r"and ppo\.temperature is 0\.001"),
        (
            {"lora": {**ADAPTERS, "quantize": "4bit"}},
            r"ppo\.lora\.quantize=4bit leaves none; set ppo\.lora\.quantize: none, or ppo\.sampler: builtin",
        ),
    ],
)
def test_settings_that_vllm_does_not_go_with(
    settings: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.vllm_limits.find_spec", lambda name: name)
    check_ppo_sampler(ppo_config(sampler="vllm").ppo)
    check_ppo_sampler(ppo_config(**settings).ppo)
    with pytest.raises(ConfigError, match=reason):
        check_ppo_sampler(ppo_config(sampler="vllm", **settings).ppo)


def test_without_vllm_the_extra_is_named(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.vllm_limits.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"ppo\.sampler=vllm: vLLM is not installed; install it: pip install '\.\[vllm\]' .* or set"
    ):
        ppo.run(ppo_config(sampler="vllm"), StageDir(run_dir, "ppo"), StopSignal())


def test_a_vllm_that_cannot_be_imported_names_the_setting(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.vllm_limits.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"^ppo\.sampler=vllm: .*pip install"):
        build_learner(ppo_config(sampler="vllm"), StageDir(run_dir, "ppo"))


def test_a_rows_seed_is_all_of_its_first_chance() -> None:
    chances_BR = torch.tensor([[0.0, 0.3], [0.5, 0.3], [0.5, 0.9], [1 - 2**-53, 0.3]], dtype=torch.float64)
    assert _seeds_of(chances_BR) == [0, 2**52, 2**52, 2**53 - 1]
