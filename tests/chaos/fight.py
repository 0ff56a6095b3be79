"""Several processes fight for one stage's folder; afterwards it is judged who wrote when.

    python -m tests.chaos.fight --seconds 60 --seed 1

They are paused for longer than their lease, killed, have clocks that are an hour off, and some are on other machines
as far as they can tell. The folder itself is watched, so that what they say of themselves is not relied on.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rlhf.checkpoint import STEP_NAME, DamagedCheckpoint, StageDir, verify
from rlhf.telemetry import read_metrics
from tests.chaos.contender import MARK, STAGE, Role
from tests.chaos.watch import Change, Watch

REPOSITORY = Path(__file__).resolve().parents[2]
CONTENDERS = 5
LEASE_SECONDS = 0.5
HOUR = 3600.0
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # steps follow each other faster there


@dataclass
class Judge:
    """Follows the folder's changes; `wrong` lists what must not happen."""

    path: Path
    token: int = 0
    newest: int = 0
    published: int = 0
    takeovers: int = 0
    wrong: list[str] = field(default_factory=list)
    _tokens: dict[str, int] = field(default_factory=dict)

    def see(self, change: Change) -> None:
        """One change of a name in the stage's folder."""
        if change.name.startswith(MARK) and change.came:
            self._taken(int(change.name.removeprefix(MARK)))
        elif change.came and (step := STEP_NAME.fullmatch(change.name)):
            self._published(change.name, int(step[1]))
        elif change.came and change.name in ("latest", "best"):
            self._tokens_reach(change.name, self._token_of(self.path / change.name / "part-0.json"))
        elif change.came and change.name == "progress.json":
            self._tokens_reach(change.name, self._token_of(self.path / change.name))

    def _taken(self, token: int) -> None:
        self.takeovers += 1
        if token <= self.token:
            self.wrong.append(f"token {token} was taken after {self.token}")
        self.token = token

    def _published(self, name: str, step: int) -> None:
        self.published += 1
        if step != self.newest + 1:
            self.wrong.append(f"step {step} came after {self.newest}")
        self.newest = step
        self._tokens_reach(name, self._token_of(self.path / name / "part-0.json"))
        try:
            verify(self.path / name)
        except DamagedCheckpoint as damage:
            if (self.path / name).exists():  # else pruned meanwhile
                self.wrong.append(f"published damaged: {damage}")

    def _tokens_reach(self, name: str, token: int | None) -> None:
        if token is not None and token < self.token:
            self.wrong.append(f"{name} of token {token} came after token {self.token} was taken")

    @staticmethod
    def _token_of(path: Path) -> int | None:
        """The token in a file; what has gone meanwhile has none. It may be a newer one than that of the change."""
        try:
            return int(json.loads(path.read_text(encoding="utf-8"))["token"])
        except (OSError, ValueError):
            return None


class Ring:
    """The contenders of a fight, and what is done to them."""

    def __init__(self, folder: Path, seed: int, *, fenced: bool) -> None:
        self.run_dir, self._folder, self._fenced = folder / "run", folder, fenced
        self.kills = self.pauses = 0
        self._chance = random.Random(seed)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._paused: dict[subprocess.Popen[bytes], float] = {}
        self._begun = 0

    def fill(self) -> None:
        """Start contenders until there are enough; a clock may be right, an hour ahead or behind."""
        self._processes = [process for process in self._processes if process.poll() is None]
        while len(self._processes) < CONTENDERS:
            self._begun += 1
            role = Role(
                str(self.run_dir),
                str(self._folder / f"contender-{self._begun}.log"),
                f"contender-{self._begun}",
                LEASE_SECONDS * self._chance.choice((1.0, 1.5)),
                self._chance.choice((0.0, HOUR, -HOUR)),
                self._chance.choice(("", f"machine-{self._begun}")),
                self._chance.randrange(1 << 30),
                self._fenced,
            )
            command = [sys.executable, "-m", "tests.chaos.contender", json.dumps(asdict(role))]
            self._processes.append(subprocess.Popen(command, cwd=REPOSITORY))

    def disturb(self) -> None:
        """Pause or kill somebody, the holder rather than others; wake who has slept long enough."""
        now = time.monotonic()
        for process in [process for process, until in self._paused.items() if now > until]:
            del self._paused[process]
            process.send_signal(signal.SIGCONT)
        awake = [process for process in self._processes if process not in self._paused]
        if len(awake) < 2:
            return
        holder = [process for process in awake if process.pid == self._holder()]
        victim = self._chance.choice(holder if holder and self._chance.random() < 0.7 else awake)
        if self._chance.random() < 0.3:
            self.kills += 1
            victim.kill()
            victim.wait()
        else:
            self.pauses += 1
            victim.send_signal(signal.SIGSTOP)
            self._paused[victim] = now + LEASE_SECONDS * self._chance.uniform(0.5, 5)

    def _holder(self) -> int:
        rooms = sorted((self.run_dir / STAGE).glob(".writer-*"))
        try:
            return int(json.loads((rooms[-1] / "lease.json").read_text(encoding="utf-8"))["holder"]["pid"])
        except (IndexError, OSError, ValueError):
            return 0

    def end(self) -> None:
        """Wake all, let them go on a little, so that who was overtaken would write, and kill them."""
        for process in self._processes:
            process.send_signal(signal.SIGCONT)
        time.sleep(2 * LEASE_SECONDS)
        for process in self._processes:
            process.kill()
            process.wait()

    def told(self) -> list[dict[str, object]]:
        """What the contenders logged; a last line may be torn."""
        lines = [line for log in self._folder.glob("*.log") for line in log.read_text().splitlines()]
        return [json.loads(line) for line in lines if line.endswith("}")]


@dataclass(frozen=True)
class Outcome:
    """What a fight came to."""

    takeovers: int
    fenced: int
    published: int
    kills: int
    pauses: int
    wrong: list[str]


def fight(folder: Path, *, seconds: float, seed: int, fenced: bool = True) -> Outcome:
    """Let them fight until a rule is broken, then hold what was seen and what is left against the rules.

    Not fenced, holders write past their lease, which shows that the rules find it.
    """
    ring = Ring(folder, seed, fenced=fenced)
    stage_path = ring.run_dir / STAGE
    stage_path.mkdir(parents=True)
    judge, watch = Judge(stage_path), Watch(stage_path)
    chance, until = random.Random(seed + 1), time.monotonic() + seconds
    next_blow = time.monotonic() + 1
    try:
        while time.monotonic() < until and not judge.wrong:
            ring.fill()
            for change in watch.changes(0.05):
                judge.see(change)
            if time.monotonic() > next_blow:
                ring.disturb()
                next_blow = time.monotonic() + chance.uniform(0.05, LEASE_SECONDS)
    finally:
        ring.end()
    while changes := list(watch.changes(0.1)):
        for change in changes:
            judge.see(change)
    watch.close()
    told = ring.told()
    wrong = judge.wrong + [str(line["trace"]) for line in told if line["event"] == "failed"] + leftovers(judge)
    fenced_off = sum(line["event"] == "fenced" for line in told)
    return Outcome(judge.takeovers, fenced_off, judge.published, ring.kills, ring.pauses, wrong)


def leftovers(judge: Judge) -> list[str]:
    """What is wrong with the folder when all is over."""
    wrong = []
    stage = StageDir(judge.path.parent, STAGE)
    found = stage.latest()
    if found is None or found[0] != judge.newest:
        wrong.append(f"step {judge.newest} was published, but the newest good one is {found}")
    for _, directory in stage.steps():
        try:
            verify(directory)
        except DamagedCheckpoint as damage:
            wrong.append(str(damage))
    rows = read_metrics(judge.path / "metrics.jsonl")
    steps, tokens = [row["step"] for row in rows], [row["token"] for row in rows]
    if steps != list(range(1, len(steps) + 1)) or not 0 <= len(steps) - judge.newest <= 1:
        wrong.append(f"metrics have the steps {steps} of {judge.newest}")
    if tokens != sorted(tokens):
        wrong.append(f"the tokens of the metrics go back: {tokens}")
    return wrong


def main() -> int:
    """Print what a fight came to; 1 when a rule was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.fight")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        outcome = fight(Path(folder), seconds=options.seconds, seed=options.seed)
    for line in outcome.wrong:
        print(f"WRONG: {line}")
    print(
        f"fight: seed {options.seed}, {outcome.takeovers} times taken, {outcome.published} steps published, "
        f"{outcome.fenced} fenced off, {outcome.pauses} pauses, {outcome.kills} kills, "
        f"{len(outcome.wrong)} rules broken"
    )
    return bool(outcome.wrong)


if __name__ == "__main__":
    sys.exit(main())
