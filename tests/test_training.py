"""The loop that SFT and the reward model share: a stop, a crash and bad numbers at every place, and what remains."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from rlhf import training
from rlhf.checkpoint import StageDir
from rlhf.collate import LengthGroupedSampler, micro_batches
from rlhf.data import load_examples
from rlhf.errors import DivergedError, PrerequisiteError, StopRequested
from rlhf.replicas import Replicas
from rlhf.schedule import learning_rate_scheduler
from rlhf.stages.sft import encode_examples
from rlhf.training_setup import Learner, Plan, Position, Window, make_optimizer
from rlhf.training_state import (
    HostState,
    load_optimizer_tensors,
    load_random_states,
    optimizer_tensors,
    random_states,
)
from tests.fakes import tiny_gpt2
from tests.tiny_run import byte_tokenizer, fetched_run, tiny_config
from tests.training_runs import StopAtLook, assert_same_run, lines, run, run_in_steps, sicken

# 10 steps: the second epoch begins at step 8; lines at steps 1, 4, 8 and 10, evaluations at 5 and 10.
SETTINGS = {"max_steps": 10, "epochs": 2, "eval_every_steps": 5, "save_every_steps": 4, "micro_batch_size": 2}
RUNTIME = {"device": "cpu", "log_every_steps": 4, "tensorboard": False}
CONFIG = tiny_config(sft=SETTINGS, reward=SETTINGS, runtime=RUNTIME)
LOOKS = 10 + 2 * (5 + 1)
"""Before each step, each of an evaluation's five batches and its one chunk of summaries."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> StageDir:
    torch.set_num_threads(1)
    return run("sft", CONFIG, fetched_run(tmp_path_factory.mktemp("undisturbed")))


@pytest.fixture
def fetched(tmp_path: Path, undisturbed: StageDir) -> Path:
    """A run of its own, of the same data."""
    run_dir = tmp_path / "tiny"
    shutil.copytree(undisturbed.run_dir / "fetch", run_dir / "fetch", symlinks=True)
    return run_dir


def test_lines_and_evaluations_come_when_they_are_due(undisturbed: StageDir) -> None:
    rows = lines(undisturbed)
    assert [row["step"] for row in rows] == [1, 4, 5, 8, 10]
    assert [row["step"] for row in rows if "sft/loss" in row] == [1, 4, 8, 10]
    assert [row["step"] for row in rows if "sft/eval_loss" in row] == [5, 10]


def test_a_stop_after_every_step_changes_nothing(
    fetched: Path, undisturbed: StageDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_in_steps("sft", CONFIG, fetched, monkeypatch) == 10
    assert_same_run(StageDir(fetched, "sft"), undisturbed)


@pytest.mark.parametrize("look", [1, 6, 7, 11, 12, 13, LOOKS - 5, LOOKS])
def test_a_stop_at_any_look_changes_nothing(fetched: Path, undisturbed: StageDir, look: int) -> None:
    """Before the first step; before the batches and the summaries of an evaluation; before the step after it."""
    with pytest.raises(StopRequested) as stopped:
        run("sft", CONFIG, fetched, StopAtLook(look))
    step = min(look - 1, 5) if look < 12 else look - 7 if look < 16 else 10
    told = f"step {step} of 10 is saved" if step else "before the first step"
    assert told in str(stopped.value)
    assert [saved for saved, _ in StageDir(fetched, "sft").steps()][-1:] == ([step] if step else [])
    assert_same_run(run("sft", CONFIG, fetched), undisturbed)


def test_how_often_it_looks_for_a_stop(fetched: Path) -> None:
    stop = StopAtLook(LOOKS + 1)
    run("sft", CONFIG, fetched, stop)
    assert stop.looks == LOOKS


@pytest.mark.parametrize(
    ("where", "call", "newest"),
    [
        ("rlhf.training.optimise", 3, None),
        ("rlhf.training.optimise", 7, 4),
        ("rlhf.training.save_training", 2, 4),
        ("rlhf.training.publish_final", 1, 10),
        # Links are made one by one: those of steps 4, 8 and 10, then latest and final of the end.
        ("rlhf.checkpoint.StageDir.point", 5, 10),
    ],
)
def test_a_crash_loses_the_time_since_the_last_save_at_most(
    fetched: Path, undisturbed: StageDir, monkeypatch: pytest.MonkeyPatch, where: str, call: int, newest: int | None
) -> None:
    calls, owner, name = 0, *where.rsplit(".", 1)
    target = training if owner == "rlhf.training" else StageDir
    original = getattr(target, name)

    def crash(*arguments: object, **named: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            raise RuntimeError("crash")
        return original(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(target, name, crash)
        with pytest.raises(RuntimeError, match="crash"):
            run("sft", CONFIG, fetched)
    stage = StageDir(fetched, "sft")
    assert not stage.is_final()
    assert [step for step, _ in stage.steps()][-1:] == ([] if newest is None else [newest])
    assert_same_run(run("sft", CONFIG, fetched), undisturbed)


def test_checkpoints_hold_the_training_and_the_final_one_the_model_alone(fetched: Path, undisturbed: StageDir) -> None:
    with pytest.raises(StopRequested):
        run("sft", CONFIG, fetched, StopAtLook(4))
    _, saved = StageDir(fetched, "sft").latest() or (0, fetched)
    training_files = {"optimizer.safetensors", "random.safetensors", "training_state.json"}
    names = {path.name for path in saved.iterdir()}
    assert names >= training_files | {"config.json", "model.safetensors", "tokenizer.json", "manifest.json"}
    final = {path.name for path in undisturbed.final().iterdir()}
    assert final & training_files == {"training_state.json"}
    for path in [*saved.iterdir(), *undisturbed.path.rglob("*")]:
        # A zip archive, as torch.save writes, or a pickle of protocol 2 and later.
        assert not path.is_file() or not path.read_bytes().startswith((b"PK", b"\x80")), path


def test_the_window_of_a_line_is_saved(fetched: Path) -> None:
    with pytest.raises(StopRequested):
        run("sft", CONFIG, fetched, StopAtLook(4))
    _, saved = StageDir(fetched, "sft").latest() or (0, fetched)
    position = json.loads((saved / "training_state.json").read_text())["position"]
    assert (position["step"], position["window"]["steps"], position["due"]) == (3, 2, None)
    # Step 1 had a line of its own; the losses of steps 2 and 3 are a little below ln 260 = 5.56 each.
    assert 2 * 5 < position["window"]["loss"] < 2 * 5.56
    assert position["window"]["tokens"] > 0


def test_a_checkpoint_without_its_training_is_refused(fetched: Path, undisturbed: StageDir) -> None:
    with StageDir(fetched, "sft").publish(4) as directory:
        shutil.copytree(undisturbed.final(), directory, dirs_exist_ok=True)
        (directory / "training_state.json").unlink()
    with pytest.raises(PrerequisiteError, match=r"step-00000004 holds no training_state\.json"):
        run("sft", CONFIG, fetched)


def test_bad_steps_are_skipped_and_their_batches_noted(
    fetched: Path, undisturbed: StageDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    sicken(monkeypatch, 4, 5)
    stage = run("sft", CONFIG, fetched)
    bad = [json.loads(line) for line in (stage.path / "bad-batches.jsonl").read_text().splitlines()]
    assert [(line["step"], line["reason"]) for line in bad] == [(4, "the loss is nan"), (5, "the loss is nan")]
    examples = load_examples(fetched / "fetch" / "final" / "data", "train")
    encoded = encode_examples(byte_tokenizer(), examples, prompt=CONFIG.prompt)
    order = list(LengthGroupedSampler([one.length for one in encoded], batch_size=4, seed=CONFIG.seed))
    assert bad[0]["ids"] == [encoded[index].id for index in order[12:16]]
    # The learning rate of step 8 is that of the sixth step taken; step 4's line is the mean of steps 2 and 3.
    rates = {row["step"]: row["sft/learning_rate"] for row in lines(stage) if "sft/loss" in row}
    assert rates[8] > {row["step"]: row.get("sft/learning_rate") for row in lines(undisturbed)}[8]
    assert all(row["sft/loss"] > 0 for row in lines(stage) if "sft/loss" in row)


def test_a_bad_step_leaves_the_weights_alone_and_is_not_saved(fetched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sicken(monkeypatch, 4)
    with pytest.raises(StopRequested, match="step 5 of 10 is saved"):
        run("sft", CONFIG, fetched, StopAtLook(5))  # it comes after step 4, and waits for a step that is fine
    assert [step for step, _ in StageDir(fetched, "sft").steps()] == [5]
    state = json.loads((fetched / "sft" / "step-00000005" / "training_state.json").read_text())
    assert state["schedule_steps"] == 4
    moments = load_file(fetched / "sft" / "step-00000005" / "optimizer.safetensors")
    assert {float(value) for name, value in moments.items() if name.endswith(".step")} == {4.0}


def test_a_run_with_bad_steps_resumes_to_the_same(
    fetched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other" / "tiny"
    shutil.copytree(fetched, other, symlinks=True)
    sicken(monkeypatch, 3, 5, 6)
    whole = run("sft", CONFIG, other)
    run_in_steps("sft", CONFIG, fetched, monkeypatch)
    assert_same_run(StageDir(fetched, "sft"), whole)
    noted = [(folder / "sft" / "bad-batches.jsonl").read_text() for folder in (fetched, other)]
    assert noted[0] == noted[1]
    assert len(noted[0].splitlines()) == 3


def test_too_many_bad_steps_end_the_training_before_anything_bad_is_saved(
    fetched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sicken(monkeypatch, 6, 7, 8)
    with pytest.raises(DivergedError, match=r"3 steps of sft in a row .*step-00000004") as ended:
        run("sft", CONFIG, fetched)
    assert ended.value.exit_code == 78
    assert [step for step, _ in StageDir(fetched, "sft").steps()] == [4]
    assert len((fetched / "sft" / "bad-batches.jsonl").read_text().splitlines()) == 3


class HalfPrecision:
    """What the loop's update needs of an accelerator with a scaler, on the CPU, where accelerate makes none."""

    def __init__(self, scale: float) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        Accelerator(cpu=True)  # its state, which the optimiser's wrapper looks at

    def prepare(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, ...]:
        self.inner = optimizer
        return model, AcceleratedOptimizer(optimizer, scaler=self.scaler)

    def clip_grad_norm_(self, parameters: Iterator[torch.nn.Parameter], clip: float) -> torch.Tensor:
        self.scaler.unscale_(self.inner)
        return torch.nn.utils.clip_grad_norm_(parameters, clip)


def stepped(learner: Learner, *, loss: float, gradient: float) -> tuple[float, str | None]:
    """An update after a backward pass with these results."""
    learner.accelerator.scaler.scale(torch.zeros(()))  # as a backward pass does; it makes the scale
    learner.network.weight.grad = torch.full((1, 2), gradient) * learner.accelerator.scaler.get_scale()
    return training.update(learner, loss, clip=1.0)


def test_a_scaler_may_search_but_not_collapse() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    schedule = learning_rate_scheduler(optimizer, total=9, config=CONFIG.sft.optimizer)
    half = HalfPrecision(scale=4.0)
    learner = Learner(Plan(1, 9, 9), half, model, Replicas(half, model, optimizer), schedule, None)
    before = model.weight.detach().clone()
    # 4 is too much, 2 is too much, 1 still is, and then there is no room left.
    assert [stepped(learner, loss=1.0, gradient=math.inf)[1] for _ in range(2)] == [None, None]
    assert stepped(learner, loss=1.0, gradient=math.inf)[1] == "the scale of float16 fell to 0.5"
    assert torch.equal(model.weight, before)
    assert schedule.last_epoch == 0
    # It goes on with the next scale, also after a loss that is no number: its gradients are dropped.
    half.scaler.update(8.0)
    assert stepped(learner, loss=math.nan, gradient=1.0) == (pytest.approx(2**0.5), "the loss is nan")
    assert torch.equal(model.weight, before)
    assert stepped(learner, loss=1.0, gradient=1.0) == (pytest.approx(2**0.5), None)
    assert not torch.equal(model.weight, before)
    assert (schedule.last_epoch, half.scaler.get_scale()) == (1, 8.0)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_weights_that_are_not_finite_are_not_saved(fetched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update = training.update

    def ruin(learner, loss, *, clip):
        result = update(learner, loss, clip=clip)
        if learner.position.step + 1 == 8:
            torch.nn.init.constant_(next(learner.network.parameters()), float("inf"))
        return result

    monkeypatch.setattr(training, "update", ruin)
    with pytest.raises(DivergedError, match=r"wte\.weight is not finite"):
        run("sft", CONFIG, fetched)
    assert [step for step, _ in StageDir(fetched, "sft").steps()] == [4]


def test_every_step_and_batch_is_a_sign_of_life(fetched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beats = []
    monkeypatch.setattr("rlhf.training.Watchdog.beat", lambda self: beats.append(1))
    run("sft", CONFIG, fetched)
    # A look each, two micro-batches a step (in the seventh one: the epoch ends with two examples), three saves and
    # a start; and one before the end.
    assert len(beats) == LOOKS + (10 * 2 - 1) + 3 + 1 + 1


def test_a_step_is_shared_out_among_processes() -> None:
    batch = [7, 5, 3, 1, 0, 2, 4, 6]
    assert micro_batches(batch, size=2, processes=1) == [[7, 5], [3, 1], [0, 2], [4, 6]]
    assert micro_batches(batch, size=2, processes=4)[1::4] == [[3, 1]]
    # The last step of an epoch: as many micro-batches for each process, some of them empty.
    assert micro_batches(batch[:5], size=2, processes=1) == [[7, 5], [3, 1], [0]]
    assert micro_batches(batch[:5], size=2, processes=2) == [[7, 5], [3, 1], [0], []]
    assert micro_batches(batch[:1], size=2, processes=4) == [[7], [], [], []]


def test_biases_and_norms_do_not_decay() -> None:
    model = tiny_gpt2()
    decayed, kept = make_optimizer(model, tiny_config().sft.optimizer).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in kept["params"]} >= {"ln_1", "ln_f", "c_attn"}
    assert all(names[id(p)].endswith(".bias") or ".ln_" in names[id(p)] for p in kept["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def drawn() -> list[float]:
    return [random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), *torch.rand(2).tolist()]


def test_random_numbers_go_on_where_they_were() -> None:
    random.gauss(0, 1), np.random.randn(), torch.rand(3)  # leaves half a pair of Gaussian numbers behind
    states = random_states()
    expected = (random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.rand(2).tolist())
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    load_random_states(states)
    assert expected == (
        random.gauss(0, 1),
        random.random(),
        np.random.randn(),
        np.random.rand(),
        torch.rand(2).tolist(),
    )
    before = torch.get_rng_state()
    load_random_states({key.replace("0.", "7.", 1): value for key, value in states.items()})
    assert torch.equal(before, torch.get_rng_state()), "another process's"


def test_moments_of_another_model_are_refused() -> None:
    optimizers = []
    for width in (3, 4):
        layer = torch.nn.Linear(width, 1)
        layer(torch.ones(width)).backward()
        optimizers.append(torch.optim.AdamW(layer.parameters()))
        optimizers[-1].step()
    with pytest.raises(ValueError, match="belong to no parameter"):
        load_optimizer_tensors(optimizers[1], optimizer_tensors(optimizers[0]))


def test_weights_of_one_tensor_share_their_copy_and_frozen_ones_are_copied_once() -> None:
    model = tiny_gpt2()
    model.transformer.wpe.requires_grad_(False)
    host = HostState(model)
    first, second = host.weights(), host.weights()
    assert first.keys() == model.state_dict().keys()
    assert first["lm_head.weight"] is first["transformer.wte.weight"]
    assert first["transformer.wpe.weight"] is second["transformer.wpe.weight"]
    # The memory is kept: taking it anew would cost more than the copy.
    assert first["transformer.ln_f.weight"].data_ptr() == second["transformer.ln_f.weight"].data_ptr()
    assert first["transformer.ln_f.weight"].data_ptr() != model.transformer.ln_f.weight.data_ptr()


def test_a_position_survives_json_with_its_nan() -> None:
    position = Position(
        step=3, window=Window(steps=1, loss=2.5, tokens=7, seconds=0.5), due={"a": float("nan"), "b": 1.0}
    )
    other = Position()
    other.load_state_dict(json.loads(json.dumps(position.state_dict(), allow_nan=False)))
    assert other.window == position.window
    assert other.due is not None
    assert str(other.due) == str(position.due)


def test_no_example_is_without_an_id(fetched: Path) -> None:
    examples = load_examples(fetched / "fetch" / "final" / "data", "train")
    encoded = encode_examples(byte_tokenizer(), examples, prompt=CONFIG.prompt)
    assert [one.id for one in encoded] == [one.post.id for one in examples]
