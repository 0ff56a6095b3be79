"""One stage, killed again and again at random moments and begun again, until it is done as if nothing had been."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rlhf.checkpoint import StageDir
from rlhf.config import RuntimeConfig
from rlhf.errors import StopRequested
from rlhf.pipeline import STAGE_NAMES
from tests.chaos.child import HANGS_AFTER_SECONDS, Child
from tests.chaos.compare import differences, picture

SETTINGS = Path(__file__).with_name("world.yaml")
RUN = "run"
GRACE_SECONDS = float(RuntimeConfig().stop_within_seconds)
BLOWS = {
    "SIGKILL": (signal.SIGKILL,),
    "SIGTERM": (signal.SIGTERM,),
    "SIGTERM twice": (signal.SIGTERM, signal.SIGTERM),
    "SIGINT": (signal.SIGINT,),
    "SIGTERM, then SIGKILL": (signal.SIGTERM, signal.SIGKILL),
}
WEIGHTS = (6, 3, 2, 1, 1)
# What a stack tells of the moment; the first that is found counts.
MOMENTS = {
    "saving": re.compile(r"/(saver|checkpoint|training_checkpoint|ppo_state)\.py"),
    "evaluating": re.compile(r"in (evaluate|write_report|measure|all_results)\b"),
    "stepping": re.compile(r"in (train_to_end|results|generate|_write)\b"),
}


@dataclass
class Tally:
    """What became of a stage. wrong lists whatever differs from what was promised."""

    stage: str
    blows: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)
    finished: int = 0
    lost: int = 0
    slowest_stop: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        blows = ", ".join(f"{count} {name}" for name, count in self.blows.items())
        moments = "".join(f"; {count} {name}" for name, count in self.moments.most_common())
        return (
            f"{self.stage}: {self.blows.total()} kills survived ({blows}{moments}), {self.finished} runs finished, "
            f"{self.lost} states lost, slowest stop {self.slowest_stop:.1f} s, {len(self.wrong)} wrong"
        )


class World:
    """An undisturbed run of all stages, which the others are held against."""

    def __init__(self, folder: Path, *, last: str) -> None:
        self.folder = folder
        self.pictures: dict[str, dict[str, str]] = {}
        self.seconds: dict[str, float] = {}
        for stage in STAGE_NAMES[: STAGE_NAMES.index(last) + 1]:
            started = time.monotonic()
            child = Child(arguments(stage, folder), folder / f"{stage}.log", anew=False)
            code = child.wait(HANGS_AFTER_SECONDS)
            assert code == 0, f"{stage} ended with {code}:\n{child.log.read_text()}"
            self.seconds[stage] = time.monotonic() - started
            self.pictures[stage] = picture(folder / RUN, stage)

    def copy_before(self, stage: str, place: Path) -> None:
        """A run in which all before `stage` has been done."""
        shutil.rmtree(place, ignore_errors=True)
        for earlier in STAGE_NAMES[: STAGE_NAMES.index(stage)]:
            shutil.copytree(self.folder / RUN / earlier, place / RUN / earlier, symlinks=True)
        (place / RUN).mkdir(parents=True, exist_ok=True)


def arguments(stage: str, place: Path) -> list[str]:
    """The command line of a stage."""
    return [stage, "--config", str(SETTINGS), "--run", RUN, "--runs-dir", str(place)]


def torment(world: World, stage: str, place: Path, *, kills: int, seed: int, anew: bool = False) -> Tally:
    """Kill the stage so often, beginning over when it gets done, then let it finish."""
    tally, chance = Tally(stage), random.Random(f"{seed} {stage}")
    longest = world.seconds[stage] * 0.7 + (15.0 if anew else 0.0)
    world.copy_before(stage, place)
    while True:
        before = newest(place / RUN, stage)
        (place.parent / "stage.found").unlink(missing_ok=True)
        began = time.time()
        child = Child(arguments(stage, place), place.parent / "stage.log", anew=anew)
        strikes = tally.blows.total() < kills
        code = child.wait(chance.uniform(0, longest) if strikes else HANGS_AFTER_SECONDS)
        if code is None:
            code = strike(child, chance, tally)
        elif code != 0:
            tally.wrong.append(f"ended with {code}: {tail(child.log)}")
        judge_start(place, before, tally)
        if code == StopRequested.exit_code:
            judge_stop(place / RUN, began, tally)
        if code == 0:
            tally.finished += 1
            tally.wrong += differences(world.pictures[stage], picture(place / RUN, stage))
        if tally.wrong:
            tally.wrong.append(f"log: {tail(child.log)}")
        if tally.wrong or (code == 0 and tally.blows.total() >= kills):
            return tally
        if code == 0:
            world.copy_before(stage, place)


def strike(child: Child, chance: random.Random, tally: Tally) -> int:
    """Send the signals of one blow, and hold the end against what is promised; returns the exit code."""
    name = chance.choices(list(BLOWS), WEIGHTS)[0]
    stacks = child.stacks()
    moment = next((moment for moment, pattern in MOMENTS.items() if pattern.search(stacks)), "loading")
    started = time.monotonic()
    for number in BLOWS[name]:
        child.send(number)
        child.wait(chance.uniform(0, 0.3))
    code = child.wait(GRACE_SECONDS)
    seconds = time.monotonic() - started
    if code is None:
        tally.wrong.append(f"{name} while {moment}: no end within {GRACE_SECONDS:.0f} s; stacks:\n{child.stacks()}")
        child.send(signal.SIGKILL)
        child.wait(HANGS_AFTER_SECONDS)
        return -signal.SIGKILL
    if code == 0:
        return 0  # it was done before the signal came
    tally.blows[name] += 1
    tally.moments[moment if stacks else "not looked"] += 1
    if "SIGKILL" not in name:
        tally.slowest_stop = max(tally.slowest_stop, seconds)
    # Nothing has begun before it listens: a signal ends it as it ends any process.
    deaf = not child.log.read_text() and "in command_stage" not in stacks
    if code not in promised(name) and not (deaf and code < 0):
        tally.wrong.append(f"{name} while {moment}: ended with {code}; stacks:\n{stacks}")
    return code


def promised(blow: str) -> set[int]:
    """How a stage may end after a blow that it has not outrun."""
    killed, stopped = -int(signal.SIGKILL), StopRequested.exit_code
    return {"SIGKILL": {killed}, "SIGTERM, then SIGKILL": {killed, stopped}}.get(blow, {stopped})


def newest(run_dir: Path, stage: str) -> int:
    """The newest good step, or how many results are kept: what the next start must go on from."""
    directory = StageDir(run_dir, stage)
    if partials := list(directory.path.glob("*.partial.jsonl")):
        return sum(text.endswith("}") for text in partials[0].read_text().split("\n")[:-1])
    found = directory.latest()
    return found[0] if found else 0


def judge_start(place: Path, before: int, tally: Tally) -> None:
    """Hold what the child found to go on from against what was there."""
    found = place.parent / "stage.found"
    if not found.exists():
        return  # it did not come so far, or had nothing to find
    name, first = found.read_text().split("\n")[0].split()
    if name == tally.stage and int(first) < before:
        tally.lost += before - int(first)
        tally.wrong.append(f"went on from {first} though {before} was there")


def judge_stop(run_dir: Path, began: float, tally: Tally) -> None:
    """Who was asked to stop has saved the step that it was at; results that are kept one by one need no saving."""
    shown = run_dir / tally.stage / "progress.json"
    if tally.stage not in ("sft", "reward", "ppo") or not shown.exists():
        return
    progress = json.loads(shown.read_text(encoding="utf-8"))
    if progress["updated"] > began + 0.1 and newest(run_dir, tally.stage) < progress["done"]:
        tally.lost += progress["done"] - newest(run_dir, tally.stage)
        tally.wrong.append(f"stopped at {progress['done']}, but {newest(run_dir, tally.stage)} is saved")


def tail(log: Path) -> str:
    """The end of a log."""
    return log.read_text(errors="replace")[-1500:]
