"""PPO on a tiny model: the first step is neutral, the same seed gives the same bits, nothing is lost on the way."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file

from rlhf.checkpoint import StageDir
from rlhf.config import Config
from rlhf.environment import EnvironmentRow, load_environment
from rlhf.errors import ConfigError, DivergedError, PrerequisiteError, StopRequested
from rlhf.experience import InHand, in_hand_state, load_in_hand
from rlhf.generation import draw_chances
from rlhf.overlap import scoring_ahead
from rlhf.ppo_evaluation import is_best
from rlhf.ppo_setup import Learner, build_learner
from rlhf.rollout import Collector, Rollout, minibatch
from rlhf.runtime import generator
from rlhf.saver import Saver
from rlhf.stages import ppo
from rlhf.stopping import StopSignal
from rlhf.telemetry import Stopwatch, read_metrics
from tests.tiny_run import ppo_config, ready_for_ppo

RUNTIME = {"device": "cpu", "tensorboard": False, "max_bad_steps": 2}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return ready_for_ppo(tmp_path)


config = ppo_config


def collect(learner: Learner, rows: list[EnvironmentRow]) -> list[Rollout]:
    """Rollouts by the chances of seed 1."""
    shape = (len(rows), learner.config.prompt.max_response_tokens)
    chances_BR = draw_chances(shape, generator(1))
    with scoring_ahead(learner.scorer, heed=lambda: None) as score:
        return learner.collector.begin(rows, chances_BR=chances_BR, score=score, watch=Stopwatch())()


def train(run_dir: Path, settings: Config, stop: StopSignal | None = None) -> dict[str, torch.Tensor]:
    ppo.run(settings, StageDir(run_dir, "ppo"), stop or StopSignal())
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
    learner = build_learner(settings, StageDir(run_dir, "ppo"))
    rows = load_environment(run_dir / "prepare" / "final", "train")[:6]
    rollouts = collect(learner, rows)
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


class AfterQuestions(StopSignal):
    """Asks to stop after having been asked so often."""

    def __init__(self, questions: int) -> None:
        super().__init__()
        self.left = questions

    @property
    def requested(self) -> bool:  # type: ignore[override]
        self.left -= 1
        return self.left < 0

    @requested.setter
    def requested(self, value: bool) -> None:
        pass


def metrics_but_times(run_dir: Path) -> list[dict[str, Any]]:
    rows = read_metrics(run_dir / "ppo" / "metrics.jsonl")
    return [{key: value for key, value in row.items() if "time" not in key and "second" not in key} for row in rows]


@pytest.mark.parametrize("scale_score", ["running", "none"])
def test_a_run_stopped_at_every_point_ends_with_the_same_bits(run_dir: Path, tmp_path: Path, scale_score: str) -> None:
    """In rollouts, between minibatches of the inner epochs, in evaluations: each life does one more piece of work."""
    settings = config(scale_score=scale_score, iterations=2, save_every_iterations=5)
    undisturbed, metrics = train(run_dir, settings), metrics_but_times(run_dir)
    samples = {path.name: path.read_bytes() for path in (run_dir / "ppo" / "samples").iterdir()}
    StageDir(run_dir, "ppo").path.rename(tmp_path / "undisturbed")
    lives = 0
    while not StageDir(run_dir, "ppo").is_final():
        # Two chunks of rollouts begin again when they are stopped, so a life has to do one piece more.
        with suppress(StopRequested):
            train(run_dir, settings, AfterQuestions(3))
        lives += 1
        assert lives < 30
    assert lives > 4
    assert same(undisturbed, load_file(StageDir(run_dir, "ppo").final() / "model.safetensors"))
    assert metrics_but_times(run_dir) == metrics
    assert {path.name: path.read_bytes() for path in (run_dir / "ppo" / "samples").iterdir()} == samples


def test_a_stop_that_finds_nothing_new_saves_nothing(run_dir: Path) -> None:
    settings = config()
    for questions in (0, 1, 0, 1):  # in the first evaluation, then in the first rollouts
        with pytest.raises(StopRequested):
            train(run_dir, settings, AfterQuestions(questions))
    assert [directory.name for _, directory in StageDir(run_dir, "ppo").steps()] == ["step-00000000"]


def test_micro_batches_give_the_minibatchs_gradient(run_dir: Path) -> None:
    """Rows of unlike length: a mean of micro-batch means would differ."""
    norms = []
    for micro in (4, 1):
        learner = build_learner(config(micro_batch_size=micro), StageDir(run_dir, "ppo"))
        rows = load_environment(run_dir / "prepare" / "final", "train")[:4]
        rollouts = collect(learner, rows)
        cut = [_cut(rollout, 3 + 5 * number) for number, rollout in enumerate(rollouts)]
        experience, _ = ppo.learn_from(learner, cut)
        norms.append(ppo.optimise_minibatch(learner, experience, torch.arange(4)))
    assert norms[0]["ppo/grad_norm"] == pytest.approx(norms[1]["ppo/grad_norm"], rel=1e-5)
    assert norms[0]["ppo/value_loss"] == pytest.approx(norms[1]["ppo/value_loss"], rel=1e-5)


def _cut(rollout: ppo.Rollout, length: int) -> ppo.Rollout:
    return replace(
        rollout,
        response_R=rollout.response_R[:length],
        logprobs_R=rollout.logprobs_R[:length],
        reference_logprobs_R=rollout.reference_logprobs_R[:length],
        values_R=rollout.values_R[:length],
        trunk_TH=rollout.trunk_TH[: len(rollout.row.prompt_ids) + length - 1],
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
    learner = build_learner(config(**settings), StageDir(run_dir, "ppo"))
    rows = load_environment(run_dir / "prepare" / "final", "train")[:2]
    rollouts = collect(learner, rows)
    made = [replace(rollouts[0], score=3.0, ended=True), replace(rollouts[1], score=-1.0, ended=False)]
    assert ppo.sequence_rewards(learner, made).tolist() == pytest.approx(expected)


def test_prompts_come_in_epochs_without_repetition(run_dir: Path) -> None:
    learner = build_learner(config(), StageDir(run_dir, "ppo"))
    rows = [EnvironmentRow(str(number), [1] * (1 + number % 5), 0.0, 0) for number in range(20)]
    drawn: list[str] = []
    for learner.iteration in range(5):
        drawn += [row.id for row in ppo.draw_prompts(learner, rows)]
    assert sorted(drawn[:16]) == sorted(set(drawn[:16]))
    assert sorted(drawn, key=int) == sorted([str(number) for number in range(20)] * 2, key=int)


def test_a_rollout_keeps_the_trunks_states_of_its_tokens(run_dir: Path) -> None:
    learner = build_learner(config(), StageDir(run_dir, "ppo"))
    rows = sorted(load_environment(run_dir / "prepare" / "final", "train"), key=lambda row: len(row.prompt_ids))
    rollouts = collect(learner, [rows[0], rows[-1]])
    batch, trunk_NH = minibatch(rollouts)
    torch.testing.assert_close(trunk_NH, learner.actor.trunk_states(batch.packed), atol=1e-5, rtol=0)
    tokens = [len(rollout.row.prompt_ids) + len(rollout.response_R) - 1 for rollout in rollouts]
    assert [len(rollout.trunk_TH) for rollout in rollouts] == tokens


def test_rollouts_that_another_release_saved_are_refused(run_dir: Path) -> None:
    learner = build_learner(config(), StageDir(run_dir, "ppo"))
    rows = load_environment(run_dir / "prepare" / "final", "train")[:2]
    experience, values = ppo.learn_from(learner, collect(learner, rows))
    numbers, tensors = in_hand_state(InHand(experience, values))
    assert load_in_hand(numbers, tensors, rows, learner.device).done == 0
    tensors["1.trunk_TH"] = torch.cat([tensors["1.trunk_TH"], tensors["1.trunk_TH"][-1:]])
    with pytest.raises(PrerequisiteError, match="another release"):
        load_in_hand(numbers, tensors, rows, learner.device)


def test_inner_epochs_end_when_the_policy_moves_too_far(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="rlhf")
    train(run_dir, config(iterations=1, stop_kl=1e-9, inner_epochs=4))
    assert "inner epochs end early at minibatch 2" in caplog.text


def test_best_is_the_highest_reward_within_the_kl_budget(run_dir: Path) -> None:
    learner = build_learner(config(kl_budget=5.0), StageDir(run_dir, "ppo"))
    evaluations = [(1.0, 2.0), (3.0, 6.0), (0.5, 1.0), (2.0, 4.0)]
    found = [is_best(learner, {"ppo/eval_reward": reward, "ppo/eval_kl": kl}) for reward, kl in evaluations]
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


def poisoned(monkeypatch: pytest.MonkeyPatch, iterations: set[int], what: str) -> None:
    """Make the rollouts of some iterations carry a number that is not finite, or a KL beyond all bounds."""
    begin = Collector.begin
    calls = {"n": 0}

    def wrong(self: Collector, rows: Any, **how: Any) -> Callable[[], list[Rollout]]:
        finish = begin(self, rows, **how)
        calls["n"] += len(rows) == 4
        # The first evaluation is call 1; then two calls an iteration, and an evaluation after every second.
        iteration = {2: 1, 3: 1, 4: 2, 5: 2, 7: 3, 8: 3}.get(calls["n"], 0)
        return partial(spoiled, finish, what) if len(rows) == 4 and iteration in iterations else finish

    monkeypatch.setattr(Collector, "begin", wrong)


def spoiled(finish: Callable[[], list[Rollout]], what: str) -> list[Rollout]:
    rollouts = finish()
    if what == "score":
        return [replace(rollouts[0], score=float("nan")), *rollouts[1:]]
    return [replace(rollout, reference_logprobs_R=rollout.logprobs_R - 50.0) for rollout in rollouts]


@pytest.mark.parametrize(("what", "reason"), [("score", "is not finite"), ("kl", "over ppo.max_kl")])
def test_rollouts_that_are_wrong_teach_nothing(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, what: str, reason: str
) -> None:
    poisoned(monkeypatch, {1}, what)
    before = load_file(run_dir / "sft" / "final" / "model.safetensors")
    after = train(run_dir, config(iterations=1))
    assert same(before, after)
    (line,) = read_metrics(run_dir / "ppo" / "bad-batches.jsonl")
    assert line["step"] == 1
    assert reason in line["reason"]
    known = {row.id for row in load_environment(run_dir / "prepare" / "final", "train")}
    assert len(line["ids"]) >= 1
    assert set(line["ids"]) <= known
    assert [row.get("ppo/skipped") for row in read_metrics(run_dir / "ppo" / "metrics.jsonl")] == [None, 1.0]


def test_wrong_rollouts_in_a_row_end_the_run_before_a_checkpoint(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, {2, 3}, "score")
    settings = Config.model_validate(config(eval_every_iterations=5).model_dump() | {"runtime": RUNTIME})
    with pytest.raises(DivergedError, match=r"2 steps of ppo in a row.*step-00000001.*learning_rate"):
        train(run_dir, settings)
    assert [step for step, _ in StageDir(run_dir, "ppo").steps()] == [1]
    assert [row["step"] for row in read_metrics(run_dir / "ppo" / "bad-batches.jsonl")] == [2, 3]


def test_a_gradient_that_is_not_finite_moves_nothing(run_dir: Path) -> None:
    learner = build_learner(config(), StageDir(run_dir, "ppo"))
    rows = load_environment(run_dir / "prepare" / "final", "train")[:4]
    rollouts = collect(learner, rows)
    experience, _ = ppo.learn_from(learner, rollouts)
    experience.advantages_BR[0, 0] = float("inf")
    before = {name: tensor.clone() for name, tensor in learner.actor.state_dict().items()}
    assert ppo.optimise_minibatch(learner, experience, torch.arange(4)) is None
    assert same(before, learner.actor.state_dict())
    (line,) = read_metrics(run_dir / "ppo" / "bad-batches.jsonl")
    assert line == {"step": 1, "reason": "the norm of the gradient is nan", "ids": [row.id for row in rows]}
    assert not learner.health.is_well
    experience.advantages_BR[0, 0] = 0.0
    assert ppo.optimise_minibatch(learner, experience, torch.arange(4)) is not None
    assert learner.health.is_well


def test_a_loss_scale_may_be_sought_but_not_collapse(run_dir: Path) -> None:
    """With float16 on a GPU; here a scaler on the CPU stands in for it."""
    learner = build_learner(config(), StageDir(run_dir, "ppo"))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    learner.accelerator.scaler = scaler
    replicas: Any = learner.strategy
    replicas._wrapped = AcceleratedOptimizer(replicas._optimizer, scaler=scaler)
    rows = load_environment(run_dir / "prepare" / "final", "train")[:4]
    rollouts = collect(learner, rows)
    experience, _ = ppo.learn_from(learner, rollouts)
    experience.advantages_BR[0, 0] = float("inf")
    before = {name: tensor.clone() for name, tensor in learner.actor.state_dict().items()}
    for scale, skipped in ((2.0, 0), (1.0, 0), (0.5, 1), (0.25, 2)):
        assert ppo.optimise_minibatch(learner, experience, torch.arange(4)) is None
        assert (scaler.get_scale(), learner.health.skipped) == (scale, skipped)
    assert same(before, learner.actor.state_dict())


def test_weights_that_are_not_finite_are_never_published(run_dir: Path, tmp_path: Path) -> None:
    stage = StageDir(run_dir, "ppo")
    learner = build_learner(config(), stage)
    with torch.no_grad():
        next(iter(learner.actor.trainable_parameters())).fill_(float("nan"))
    with pytest.raises(DivergedError, match="is not finite, so nothing is saved"), Saver(stage, keep=2) as saver:
        ppo.save(learner, saver, final=True)
    assert stage.steps() == []


@pytest.mark.parametrize("missing", ["sft", "reward", "prepare"])
def test_a_missing_stage_is_named(run_dir: Path, tmp_path: Path, missing: str) -> None:
    (run_dir / missing).rename(tmp_path / "aside")
    with pytest.raises(PrerequisiteError, match=f"run `python -m rlhf {missing} --run tiny` first"):
        train(run_dir, config())


def test_more_unfrozen_layers_than_there_are(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"ppo\.unfrozen_layers=3 is not between 1 and the model's 2 blocks"):
        train(run_dir, config(unfrozen_layers=3))
