"""One of several processes that fight for a stage's folder; `tests/chaos/fight.py` starts, stops and kills them.

Takes the lease, publishes a few steps with its token in them, gives it back, and begins again. Its clock is wrong,
it may pretend to be another machine, and it leaves a mark in the folder when it has the lease.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf import lease as lease_module
from rlhf.checkpoint import StageDir
from rlhf.lease import Lease, LeaseHeld, LeaseLost, take_lease
from rlhf.telemetry import Metrics

STAGE = "ppo"
MARK = "taken-"
KEEP = 3


@dataclass(frozen=True)
class Role:
    """Who a contender is.

    skew: by how many seconds its clocks are wrong; machine: the one it says it runs on; fenced: it writes by its lease.
    """

    run_dir: str
    log: str
    name: str
    lease_seconds: float
    skew: float
    machine: str
    seed: int
    fenced: bool


def main() -> None:
    """Fight until killed."""
    role = Role(**json.loads(sys.argv[1]))
    pretend(role)
    chance = random.Random(role.seed)
    with Path(role.log).open("a", encoding="utf-8") as log:
        while True:
            try:
                hold(role, chance, log)
            except LeaseHeld:
                time.sleep(chance.uniform(0, role.lease_seconds / 10))
            except LeaseLost:
                tell(log, "fenced")
            except BaseException:
                tell(log, "failed", trace=traceback.format_exc())
                raise


def pretend(role: Role) -> None:
    """Wrong clocks, also in the times of files, and another machine."""
    wall, monotonic, utime, this = time.time, time.monotonic, os.utime, lease_module.this_process

    def skewed_utime(path: str, times: Any = None) -> None:
        now = time.time_ns() + int(role.skew * 1e9)
        utime(path, ns=(now, now))

    time.time = lambda: wall() + role.skew
    time.monotonic = lambda: monotonic() + role.skew
    os.utime = skewed_utime  # type: ignore[assignment]
    if role.machine:
        lease_module.this_process = lambda: replace(this(), host=role.machine, machine=role.machine)


def hold(role: Role, chance: random.Random, log: Any) -> None:
    """One turn as the writer. Raises LeaseHeld, LeaseLost."""
    path = Path(role.run_dir) / STAGE
    with take_lease(path, seconds=role.lease_seconds) as lease:
        # As every other write: who is paused here and overtaken must not leave a mark either.
        StageDir(Path(role.run_dir), STAGE, lease=lease).write_text(f"{MARK}{lease.token}", "")
        held = lease if role.fenced else None
        stage = StageDir(Path(role.run_dir), STAGE, lease=held, settings=f"token: {lease.token}\n")
        stage.remove_unfinished()
        found = stage.latest()
        newest = found[0] if found else 0
        tell(log, "taken", token=lease.token, newest=newest, name=role.name)
        with Metrics(stage, tensorboard=False, start_step=newest + 1) as metrics:
            for step in range(newest + 1, newest + chance.randint(2, 12)):
                metrics.log(step, {"token": lease.token})
                publish(stage, lease, step, chance)
                tell(log, "published", token=lease.token, step=step)


def publish(stage: StageDir, lease: Lease, step: int, chance: random.Random) -> None:
    """A step with its token inside, written slowly; then the other writes of a stage."""
    with stage.publish(step, best=chance.random() < 0.2) as directory:
        for number in range(3):
            text = json.dumps({"token": lease.token, "step": step, "filling": "x" * 2000 * number})
            (directory / f"part-{number}.json").write_text(text, encoding="utf-8")
            time.sleep(chance.uniform(0, 0.01))
    stage.prune(KEEP)
    stage.write_text("progress.json", json.dumps({"token": lease.token, "done": step}))


def tell(log: Any, event: str, **facts: Any) -> None:
    log.write(json.dumps({"event": event} | facts) + "\n")
    log.flush()


if __name__ == "__main__":
    main()
