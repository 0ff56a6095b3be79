"""Two processes share a stage, and one of them is killed: the launch ends, and begun again it makes the same.

python -m tests.chaos.together --stage ppo --kills 3
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil

from rlhf.errors import PERMANENT_CODES, StopRequested
from tests.chaos.child import HANGS_AFTER_SECONDS, Child
from tests.chaos.compare import differences, picture
from tests.chaos.crash import RUN, Tally, World, arguments, newest, tail
from tests.chaos.importing import MEMORY, import_all

PROCESSES = 2
STAGES = ("sft", "ppo")


def torment_launch(world: World, stage: str, place: Path, *, kills: int, seed: int) -> Tally:
    """An undisturbed launch, then one that loses a process again and again.

    The launch is the measure, since one process alone adds up in another order.
    """
    tally, chance = Tally(f"{stage} on {PROCESSES} processes"), random.Random(f"{seed} {stage}")
    world.copy_before(stage, place)
    child = launch(stage, place)
    code = child.wait(HANGS_AFTER_SECONDS)
    assert code == 0, f"undisturbed, it ended with {code}: {tail(child.log)}"
    wanted = picture(place / RUN, stage)
    world.copy_before(stage, place)
    while not tally.wrong:
        before = newest(place / RUN, stage)
        child = launch(stage, place)
        if tally.blows.total() < kills and goes_on(child, place, stage, before):
            time.sleep(chance.uniform(0, 1))
            strike_one(child, chance, tally)
        code = child.wait(HANGS_AFTER_SECONDS)
        if code is None:
            tally.wrong.append(f"it hangs: {tail(child.log)}")
            end_group(child)
        elif code in PERMANENT_CODES:
            tally.wrong.append(f"ended with {code}, which is not tried again: {tail(child.log)}")
        elif (after := newest(place / RUN, stage)) < before:
            tally.lost += before - after
            tally.wrong.append(f"step {before} was there, now {after} is the newest")
        elif code == 0:
            tally.finished += 1
            tally.wrong += differences(wanted, picture(place / RUN, stage))
            if tally.blows.total() >= kills:
                break
            world.copy_before(stage, place)
    return tally


def launch(stage: str, place: Path) -> Child:
    """`rlhf launch`, in a session of its own."""
    command = ["launch", *arguments(stage, place), "--processes", str(PROCESSES)]
    return Child(command, place.parent / "launch.log", anew=True)


def goes_on(child: Child, place: Path, stage: str, before: int) -> bool:
    """Wait until a step more is there; False when it ended before that, or hangs."""
    until = time.monotonic() + HANGS_AFTER_SECONDS
    while child.ended() is None and time.monotonic() < until:
        if newest(place / RUN, stage) > before:
            return True
        time.sleep(0.05)
    return False


def strike_one(child: Child, chance: random.Random, tally: Tally) -> None:
    """Kill one of the processes that share the stage, or ask the launcher to stop."""
    if tally.blows.total() % 3 == 2:
        started = time.monotonic()
        child.send(signal.SIGTERM)
        code = child.wait(HANGS_AFTER_SECONDS)
        tally.slowest_stop = max(tally.slowest_stop, time.monotonic() - started)
        tally.blows["SIGTERM to the launcher"] += 1
        if code not in (0, StopRequested.exit_code):
            tally.wrong.append(f"SIGTERM to the launcher: ended with {code}: {tail(child.log)}")
        return
    ranks = [process for process in psutil.Process(child.pid).children(recursive=True) if is_rank(process)]
    if ranks:
        chance.choice(ranks).kill()
        tally.blows["SIGKILL to one process"] += 1


def is_rank(process: psutil.Process) -> bool:
    """Whether a process is one of those that share the stage."""
    try:
        return "RANK" in process.environ() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def end_group(child: Child) -> None:
    """All that the launcher has begun."""
    os.killpg(child.pid, signal.SIGKILL)
    child.wait(HANGS_AFTER_SECONDS)


def main() -> int:
    """1 when anything was lost or differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.together")
    parser.add_argument("--kills", type=int, default=3, help="how often each stage is struck (default: 3)")
    parser.add_argument("--stage", action="append", choices=STAGES, help="only this one; repeatable")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    logging.disable(logging.WARNING)
    import_all()
    wrong = 0
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        stages = options.stage or STAGES
        (Path(folder) / "world").mkdir()
        world = World(Path(folder) / "world", last="prepare" if "ppo" in stages else "fetch")
        for stage in stages:
            tally = torment_launch(world, stage, Path(folder) / "place", kills=options.kills, seed=options.seed)
            print(tally, *(f"  WRONG: {line}" for line in tally.wrong), sep="\n", flush=True)
            wrong += len(tally.wrong)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
