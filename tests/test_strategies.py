"""The same training on 1, 2 and 4 processes, replicated and sharded: gradients of each step, weights, and going on."""

from __future__ import annotations

import pytest

from rlhf.telemetry import read_metrics
from tests.sharing import Difference, Order, Place, difference, run, run_here

GRADIENTS, WEIGHTS = 1e-4, 1e-5
"""Sums in another order: the last places of float32, some more where gradients are small differences of large ones."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The run of one process without DeepSpeed, from SFT to PPO."""
    place = Place(tmp_path_factory.mktemp("strategies"))
    place.run_alone()
    return place


def assert_same_training(place: Place, order: Order) -> None:
    """The gradients of each step, the weights and the logged numbers of the run alone, as far as float32 goes."""
    found = difference(order, place.alone(order))
    assert found == Difference(
        found.steps,
        pytest.approx(0, abs=GRADIENTS),  # type: ignore[arg-type]
        pytest.approx(0, abs=WEIGHTS),  # type: ignore[arg-type]
    )
    assert found.steps == (8 if order.stage == "ppo" else 9)
    ours, theirs = (read_metrics(one.directory.path / "metrics.jsonl") for one in (order, place.alone(order)))
    for row, expected in zip(ours, theirs, strict=True):
        numbers = {key: value for key, value in expected.items() if "time" not in key and "second" not in key}
        # What is near 0 is a difference of large numbers.
        assert {key: row[key] for key in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-5)


STRATEGIES = {2: ("ddp", "zero2", "zero3"), 4: ("ddp", "zero3-offload")}


@pytest.mark.parametrize("processes", [2, 4])
def test_many_processes_train_as_one_does(place: Place, processes: int) -> None:
    orders = [
        place.order(stage, None if name == "ddp" else name, name=f"{processes}-{name}")
        for name in STRATEGIES[processes]
        for stage in ("sft", "reward", "ppo")
    ]
    run(orders, processes=processes)
    for order in orders:
        assert_same_training(place, order)


def test_a_training_goes_on_under_another_strategy(place: Place) -> None:
    """Stopped in the middle, PPO between two minibatches of an iteration, by the last process."""
    here = [place.order(stage, name="here", stop_after=3) for stage in ("sft", "ppo")]
    there = [place.order(stage, "zero3", name="there", stop_after=3) for stage in ("sft", "ppo")]
    for order in here:
        run_here(order)
    onward = [place.order(order.stage, "zero2", name="here") for order in here]
    run([*there, *onward], processes=2)
    for order in there:
        assert not order.directory.is_final()
        run_here(place.order(order.stage, name="there"))
    for order in (*onward, *there):
        assert order.directory.is_final()
        assert_same_training(place, order)
