"""What is cut short, and what must be found afterwards."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rlhf.checkpoint import LINKS, StageDir, write_manifest
from rlhf.health import Health
from rlhf.lease import ROOM, take_lease
from rlhf.ppo_state import VALUE_FILE
from rlhf.repair import repair_run
from rlhf.saver import Saver
from rlhf.storage import storage_errors
from rlhf.telemetry import Metrics, Progress, read_metrics
from rlhf.training_state import STATE_FILE
from tests.faults.learner import value_of, writer
from tests.faults.points import Ended, Scenario

STAGE = "ppo"
LEASE_SECONDS = 30.0
SETTINGS = "seed: 1\n"
KNOWN = {"config.yaml", "metrics.jsonl", "progress.json", "bad-batches.jsonl", "samples", "damaged", *LINKS}

Arm = Callable[[], None]


@dataclass(frozen=True)
class Kept:
    """What the newest step and the links may hold: the value before, and the one after; None: nothing there."""

    latest: tuple[int | None, int | None]
    links: Mapping[str, tuple[int | None, int | None]] = field(default_factory=dict)
    rows_from: int = 0


@contextmanager
def writing(run_dir: Path) -> Iterator[StageDir]:
    """A stage's folder as a stage program gets it."""
    path = run_dir / STAGE
    with storage_errors(path), take_lease(path, seconds=LEASE_SECONDS) as lease:
        yield StageDir(run_dir, STAGE, lease=lease, settings=SETTINGS)


def before(run_dir: Path) -> None:
    """Steps 2, the best, and 4; rows of metrics up to step 5; a writer that was killed in the middle of a save."""
    lease = take_lease(run_dir / STAGE, seconds=LEASE_SECONDS)  # never given back: this process just ends
    stage = StageDir(run_dir, STAGE, lease=lease, settings=SETTINGS)
    for step, best in ((2, True), (4, False)):
        with stage.publish(step, best=best) as directory:
            writer(step)(directory)
    with Metrics(stage, tensorboard=False) as metrics:
        for step in range(6):
            metrics.log(step, {"ppo/kl": step})
    stage.write_text("progress.json", json.dumps({"done": 4}))
    stage.write_text("bad-batches.jsonl", json.dumps({"step": 3, "reason": "nan", "ids": ["a"]}) + "\n")
    for left in (stage.path / ".unfinished-left", stage.room / ".unfinished-00000006"):
        left.mkdir()
        (left / "part").write_text("half")


def save(run_dir: Path, arm: Arm, *, step: int = 6, final: bool = False, best: bool = False) -> None:
    """One save as the stages do it, with the newest one step kept; its value is 6."""
    with writing(run_dir) as stage, Metrics(stage, tensorboard=False, start_step=5) as metrics:
        arm()
        for row in (5, 6):
            metrics.log(row, {"ppo/kl": row})
        with Saver(stage, keep=1, metrics=metrics) as saver:
            saver.save(step, writer(6), final=final, best=best)


def careless(run_dir: Path, arm: Arm) -> None:
    """How not to do it: the newest step written anew in its place."""
    rows = "".join(json.dumps({"step": step}) + "\n" for step in range(7))
    (run_dir / STAGE / "metrics.jsonl").write_text(rows, encoding="utf-8")
    arm()
    directory = run_dir / STAGE / "step-00000004"
    with storage_errors(directory):
        writer(6)(directory)
        write_manifest(directory, step=4, stage=STAGE)


def take_over(run_dir: Path, arm: Arm) -> None:
    """The start of a stage after its writer was killed: lease, leftovers, last step, metrics, bad batches."""
    arm()
    with writing(run_dir) as stage:
        stage.remove_unfinished()
        assert stage.latest() is not None
        Health(stage, tolerate=3)
        Metrics(stage, tensorboard=False, start_step=5).close()


def show_progress(run_dir: Path, arm: Arm) -> None:
    """What is written between saves."""
    with writing(run_dir) as stage:
        health = Health(stage, tolerate=3)
        with Metrics(stage, tensorboard=False, start_step=5) as metrics:
            arm()
            metrics.log(5, {"ppo/kl": 5})
            health.skip(5, "nan", ["b"])
            stage.write_text("samples/step-00000005.jsonl", "{}\n")
            metrics.sync()
            with Progress(stage, 10, "steps", done=5) as progress:
                progress.update(6)


def repair(run_dir: Path, arm: Arm) -> None:
    """`rlhf verify --repair`."""
    arm()
    repair_run(run_dir, say=lambda line: None)


def damage(run_dir: Path) -> None:
    """As before, but the newest step has lost a file and the link to the newest leads nowhere."""
    before(run_dir)
    (run_dir / STAGE / "step-00000004" / STATE_FILE).unlink()
    (run_dir / STAGE / "latest").unlink()
    (run_dir / STAGE / "latest").symlink_to("step-00000009")


def after(kept: Kept, run_dir: Path, ended: Ended) -> None:
    """Whatever was cut short: a reader finds the old or the new, and the next start goes on from there."""
    readable(kept, run_dir, ended)
    newest = next_start(run_dir)
    tidy(run_dir)
    stage = StageDir(run_dir, STAGE)
    found = stage.latest()
    assert found is not None
    assert found[0] == newest + 2
    assert value_of(found[1]) == 8


def after_repair(run_dir: Path, ended: Ended) -> None:
    """Nothing is deleted. What could not be read may have been moved, so that a stage begins over."""
    path = run_dir / STAGE
    for step in ("step-00000002", "step-00000004"):
        places = [*path.glob(f"{step}/{VALUE_FILE}"), *path.glob(f"damaged/{step}-*/{VALUE_FILE}")]
        assert places, f"{step} was deleted"
    if any(path.glob("damaged/step-00000002-*")):
        next_start(run_dir)
    else:
        after(Kept((2, 2), {"best": (2, 2)}), run_dir, ended)


def readable(kept: Kept, run_dir: Path, ended: Ended) -> None:
    """What a reader finds now, before anybody has cleaned up."""
    stage = StageDir(run_dir, STAGE)
    found = stage.latest()
    saved = None if found is None else value_of(found[1])
    assert saved in kept.latest, f"the newest is {saved}"
    assert saved == kept.latest[1] or not ended.well, f"said to be saved, but the newest is {saved}"
    for name, allowed in kept.links.items():
        link = stage.path / name
        value = value_of(link) if os.path.lexists(link) else None
        assert value in allowed, f"{name} is {value}"
        assert value == allowed[1] or not ended.well, f"said to be saved, but {name} is {value}"
    rows = [row["step"] for row in read_metrics(stage.path / "metrics.jsonl")]
    wanted = list(range(kept.rows_from, 7))
    assert rows == wanted[: len(rows)], f"rows of metrics: {rows}"
    assert len(rows) >= len([row for row in wanted if row <= 4 or saved == 6]), f"rows of metrics: {rows}"
    if (stage.path / "progress.json").exists():
        assert json.loads((stage.path / "progress.json").read_text(encoding="utf-8"))["done"] in (4, 5, 6)


def next_start(run_dir: Path) -> int:
    """What the next process does: takes the lease, cleans up, and saves two steps on; the step it began from."""
    with writing(run_dir) as stage:
        stage.remove_unfinished()
        found = stage.latest()
        newest = found[0] if found else 0
        with Metrics(stage, tensorboard=False, start_step=newest + 1) as metrics, Saver(stage, keep=2) as saver:
            metrics.log(newest + 1, {"ppo/kl": newest + 1})
            saver.save(newest + 2, writer(8))
        steps = [row["step"] for row in read_metrics(stage.path / "metrics.jsonl")]
        assert steps[-1] == newest + 1
        assert len(steps) == len(set(steps))
    return newest


def tidy(run_dir: Path) -> None:
    """Nothing half-written is left, and one room, which is empty but for the lease."""
    names = {path.name for path in (run_dir / STAGE).iterdir()}
    rooms = {name for name in names if ROOM.fullmatch(name)}
    rest = {name for name in names - rooms - KNOWN if not name.startswith("step-")}
    assert not rest, f"left behind: {sorted(rest)}"
    assert len(rooms) == 1, f"rooms: {sorted(rooms)}"
    left = {path.name for path in (run_dir / STAGE / rooms.pop()).iterdir()}
    assert left == {"lease.json"}, f"left in the room: {sorted(left)}"


def nothing(run_dir: Path) -> None:
    """A run that has not begun."""
    run_dir.mkdir(exist_ok=True)


SCENARIOS = (
    Scenario("the first save", nothing, save, partial(after, Kept((None, 6), rows_from=5))),
    Scenario("a save", before, save, partial(after, Kept((4, 6), {"best": (2, 2)}))),
    Scenario("a best one", before, partial(save, best=True), partial(after, Kept((4, 6), {"best": (2, 6)}))),
    Scenario(
        "the final one",
        before,
        partial(save, final=True, best=True),
        partial(after, Kept((4, 6), {"best": (2, 6), "final": (None, 6)})),
    ),
    Scenario("a step again", before, partial(save, step=4), partial(after, Kept((4, 6), {"best": (2, 2)}))),
    Scenario("a start", before, take_over, partial(after, Kept((4, 4), {"best": (2, 2)}))),
    Scenario("a start after damage", damage, take_over, partial(after, Kept((2, 2), {"best": (2, 2)}))),
    Scenario("a repair", damage, repair, after_repair),
    Scenario("between saves", before, show_progress, partial(after, Kept((4, 4), {"best": (2, 2)}))),
)

# What shows that losses are found.
CARELESS = Scenario("a careless save", before, careless, partial(after, Kept((4, 6), {"best": (2, 2)})))
