"""PPO on a tiny model: the first step is neutral, the same seed gives the same bits, nothing is lost on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf.checkpoint import StageDir
from rlhf.config import Config
from rlhf.data import load_examples, write_jsonl
from rlhf.environment import EnvironmentRow, load_environment
from rlhf.errors import ConfigError, PrerequisiteError, RlhfError, StopRequested
from rlhf.models import reward_model_from_policy
from rlhf.ppo_setup import build_learner
from rlhf.prompt import encode_prompt
from rlhf.rollout import minibatch
from rlhf.runtime import StopSignal, generator
from rlhf.stages import ppo
from rlhf.telemetry import Stopwatch, read_metrics
from rlhf.tokenizer import load_tokenizer
from tests.tiny_run import fetched_run, tiny_config


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that has all that PPO needs: the base model stands for SFT, a fresh head for the reward model."""
    run_dir = fetched_run(tmp_path)
    base = StageDir(run_dir, "fetch").final() / "base"
    tokenizer = load_tokenizer(base, key="base")
    for stage in ("sft", "reward"):
        with StageDir(run_dir, stage).publish(1, final=True) as directory:
            source = base if stage == "sft" else run_dir / "sft" / "final"
            if stage == "sft":
                for file in source.iterdir():
                    (directory / file.name).write_bytes(file.read_bytes())
            else:
                model = reward_model_from_policy(source, seed=5)
                model.save_pretrained(directory)
                tokenizer.save_pretrained(directory)
    data = StageDir(run_dir, "fetch").final() / "data"
    with StageDir(run_dir, "prepare").publish(0, final=True) as directory:
        for split in ("train", "valid"):
            rows = [
                {
                    "id": example.post.id,
                    "prompt_ids": encode_prompt(tokenizer, example.post, max_tokens=96).ids,
                    "cut_tokens": 0,
                    "reference_score": 0.25,
                }
                for example in load_examples(data, split)
            ]
            write_jsonl(directory / f"environment-{split}.jsonl", rows)
    return run_dir


def config(**ppo_settings: Any) -> Config:
    settings = {
        "iterations": 3,
        "unfrozen_layers": 1,
        "rollouts_per_iteration": 8,
        "rollout_chunk": 4,
        "inner_epochs": 2,
        "minibatch_size": 4,
        "micro_batch_size": 4,
        "eval_every_iterations": 2,
        "eval_posts": 4,
        "save_every_iterations": 1,
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
    } | ppo_settings
    return Config.model_validate(tiny_config().model_dump() | {"ppo": settings})


def train(run_dir: Path, settings: Config, stop: StopSignal | None = None) -> dict[str, torch.Tensor]:
    ppo.run(settings, run_dir, stop or StopSignal())
    return load_file(StageDir(run_dir, "ppo").final() / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("unfrozen_layers", [1, "all"])
@pytest.mark.parametrize("value_network", ["head", "separate"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_before_the_first_step_kl_is_0_and_the_ratio_1(
    run_dir: Path, unfrozen_layers: Any, value_network: str, temperature: float
) -> None:
    settings = config(unfrozen_layers=unfrozen_layers, value_network=value_network, temperature=temperature)
    learner = build_learner(settings, run_dir)
    rows = load_environment(run_dir / "prepare" / "final", "train")[:6]
    rollouts = learner.collector.collect(rows, stream=generator(1), watch=Stopwatch())
    for rollout in rollouts:
        torch.testing.assert_close(rollout.logprobs_R, rollout.reference_logprobs_R, atol=1e-5, rtol=0)
        # What the sampler said of its tokens is what the training pass says of them.
        assert rollout.sampler_gap < 1e-5
    experience, values = ppo.learn_from(learner, rollouts)
    assert abs(values["ppo/kl"]) < 1e-5
    first = ppo.optimise_minibatch(learner, experience, torch.arange(6))
    assert first["ppo/ratio"] == pytest.approx(1, abs=1e-5)
    assert first["ppo/clip_fraction"] == 0


def test_training_moves_only_what_is_unfrozen(run_dir: Path) -> None:
    before = load_file(run_dir / "sft" / "final" / "model.safetensors")
    after = train(run_dir, config())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith(("transformer.h.1.", "transformer.ln_f.", "lm_head."))}


def test_the_same_seed_gives_the_same_bits(run_dir: Path, tmp_path: Path) -> None:
    first = train(run_dir, config())
    StageDir(run_dir, "ppo").path.rename(tmp_path / "first")
    assert same(first, train(run_dir, config()))
    StageDir(run_dir, "ppo").path.rename(tmp_path / "second")
    other = Config.model_validate(config().model_dump() | {"seed": 2})
    assert not same(first, train(run_dir, other))


def test_an_interrupted_run_ends_with_the_same_bits(run_dir: Path, tmp_path: Path) -> None:
    settings = config(scale_score="running")
    undisturbed = train(run_dir, settings)
    metrics = read_metrics(run_dir / "ppo" / "metrics.jsonl")
    StageDir(run_dir, "ppo").path.rename(tmp_path / "undisturbed")

    class AfterQuestions(StopSignal):
        """Asks to stop after having been asked so often."""

        def __init__(self, questions: int) -> None:
            self.left = questions

        @property
        def requested(self) -> bool:  # type: ignore[override]
            self.left -= 1
            return self.left < 0

    for questions in (3, 0, 1):
        with pytest.raises(StopRequested, match="run the same command again"):
            train(run_dir, settings, AfterQuestions(questions))
    assert same(undisturbed, train(run_dir, settings))
    again = read_metrics(run_dir / "ppo" / "metrics.jsonl")
    assert [row["step"] for row in again] == [0, 1, 2, 3]
    for before, after in zip(metrics, again, strict=True):
        timed = {key for key in before if "time" in key or "second" in key}
        assert {key for key in before if key not in timed and before[key] != after[key]} == set()


def test_micro_batches_give_the_minibatchs_gradient(run_dir: Path) -> None:
    """Rows of unlike length: a mean of micro-batch means would differ."""
    norms = []
    for micro in (4, 1):
        learner = build_learner(config(micro_batch_size=micro), run_dir)
        rows = load_environment(run_dir / "prepare" / "final", "train")[:4]
        rollouts = learner.collector.collect(rows, stream=generator(1), watch=Stopwatch())
        cut = [_cut(rollout, 3 + 5 * number) for number, rollout in enumerate(rollouts)]
        experience, _ = ppo.learn_from(learner, cut)
        norms.append(ppo.optimise_minibatch(learner, experience, torch.arange(4)))
    assert norms[0]["ppo/grad_norm"] == pytest.approx(norms[1]["ppo/grad_norm"], rel=1e-5)
    assert norms[0]["ppo/value_loss"] == pytest.approx(norms[1]["ppo/value_loss"], rel=1e-5)


def _cut(rollout: ppo.Rollout, length: int) -> ppo.Rollout:
    from dataclasses import replace

    return replace(
        rollout,
        response_R=rollout.response_R[:length],
        logprobs_R=rollout.logprobs_R[:length],
        reference_logprobs_R=rollout.reference_logprobs_R[:length],
        values_R=rollout.values_R[:length],
        trunk_TH=rollout.trunk_TH[: len(rollout.row.prompt_ids) + length],
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # Scores 3 and -1 against references of 0.25; the second summary never ended.
        ({"reward": "delta", "clip_score": None}, [2.75, -1.25]),
        ({"reward": "absolute", "clip_score": None}, [3.0, -1.0]),
        ({"reward": "absolute", "clip_score": 2.0}, [2.0, -1.0]),
        ({"reward": "absolute", "clip_score": None, "missing_eos_penalty": 0.5}, [3.0, -1.5]),
        ({"reward": "delta", "clip_score": None, "missing_eos_score": -4.0}, [2.75, -4.0]),
        # Deviation of 3 and -1 with n - 1: sqrt(8).
        ({"reward": "absolute", "clip_score": None, "scale_score": "running"}, [3 / 8**0.5, -1 / 8**0.5]),
    ],
)
def test_rewards_of_sequences(run_dir: Path, settings: dict[str, Any], expected: list[float]) -> None:
    from dataclasses import replace

    learner = build_learner(config(**settings), run_dir)
    rows = load_environment(run_dir / "prepare" / "final", "train")[:2]
    rollouts = learner.collector.collect(rows, stream=generator(1), watch=Stopwatch())
    made = [replace(rollouts[0], score=3.0, ended=True), replace(rollouts[1], score=-1.0, ended=False)]
    assert ppo.sequence_rewards(learner, made).tolist() == pytest.approx(expected)


def test_prompts_come_in_epochs_without_repetition(run_dir: Path) -> None:
    learner = build_learner(config(), run_dir)
    rows = [EnvironmentRow(str(number), [1] * (1 + number % 5), 0.0, 0) for number in range(20)]
    drawn: list[str] = []
    for learner.iteration in range(5):
        drawn += [row.id for row in ppo.draw_prompts(learner, rows)]
    assert sorted(drawn[:16]) == sorted(set(drawn[:16]))
    assert sorted(drawn, key=int) == sorted([str(number) for number in range(20)] * 2, key=int)


def test_a_minibatch_pads_trunk_states_as_it_pads_ids(run_dir: Path) -> None:
    learner = build_learner(config(), run_dir)
    rows = sorted(load_environment(run_dir / "prepare" / "final", "train"), key=lambda row: len(row.prompt_ids))
    rollouts = learner.collector.collect([rows[0], rows[-1]], stream=generator(1), watch=Stopwatch())
    batch, trunk_BTH = minibatch(rollouts, pad_id=learner.collector.pad_id)
    recomputed_BTH = learner.actor.trunk_states(batch.ids_BT, batch.mask_BT)
    torch.testing.assert_close(trunk_BTH[batch.mask_BT], recomputed_BTH[batch.mask_BT], atol=1e-5, rtol=0)


def test_inner_epochs_end_when_the_policy_moves_too_far(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="rlhf")
    train(run_dir, config(iterations=1, stop_kl=1e-9, inner_epochs=4))
    assert "inner epochs end early at minibatch 2" in caplog.text


def test_best_is_the_highest_reward_within_the_kl_budget(run_dir: Path) -> None:
    learner = build_learner(config(kl_budget=5.0), run_dir)
    evaluations = [(1.0, 2.0), (3.0, 6.0), (0.5, 1.0), (2.0, 4.0)]
    found = [ppo.is_best(learner, {"ppo/eval_reward": reward, "ppo/eval_kl": kl}) for reward, kl in evaluations]
    assert found == [True, False, False, True]


def test_a_table_of_samples_is_written(run_dir: Path) -> None:
    import json

    train(run_dir, config(sample_table_posts=3))
    tables = sorted((run_dir / "ppo" / "samples").iterdir())
    assert [table.name for table in tables] == [f"step-{step:08d}.jsonl" for step in (0, 2, 3)]
    rows = [json.loads(line) for line in tables[0].read_text().splitlines()]
    assert len(rows) == 3
    assert rows[0].keys() == {"id", "prompt", "summary", "score", "reference_score"}
    assert rows[0]["prompt"].startswith("SUBREDDIT: r/pets\nTITLE: ")


def test_a_gradient_that_is_not_finite_stops_before_a_checkpoint(run_dir: Path, monkeypatch) -> None:
    learner = build_learner(config(), run_dir)
    rows = load_environment(run_dir / "prepare" / "final", "train")[:4]
    rollouts = learner.collector.collect(rows, stream=generator(1), watch=Stopwatch())
    experience, _ = ppo.learn_from(learner, rollouts)
    experience.advantages_BR[0, 0] = float("inf")
    with pytest.raises(RlhfError, match="gradient of PPO iteration 0 is not finite"):
        ppo.optimise_minibatch(learner, experience, torch.arange(4))


@pytest.mark.parametrize("missing", ["sft", "reward", "prepare"])
def test_a_missing_stage_is_named(run_dir: Path, tmp_path: Path, missing: str) -> None:
    (run_dir / missing).rename(tmp_path / "aside")
    with pytest.raises(PrerequisiteError, match=f"run `python -m rlhf {missing} --run tiny` first"):
        train(run_dir, config())


def test_more_unfrozen_layers_than_there_are(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"ppo\.unfrozen_layers=3 is not between 1 and the model's 2 blocks"):
        train(run_dir, config(unfrozen_layers=3))
