"""One node's share of a stage: torchrun's agent runs its processes, and this process stays beside it.

It passes a signal on, once; ends the processes when another node has failed; and finds the exit code and the line
that tell what happened.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from types import FrameType
from typing import Any

from rlhf import cgroups
from rlhf.errors import PERMANENT_CODES, StopRequested, UnavailableError
from rlhf.launcher.agent import REPORT, Order
from rlhf.launcher.outcome import (
    STILL_GOOD,
    UNFORESEEN,
    Outcome,
    ended_with,
    read_outcomes,
    stopped_early,
    verdict,
    words_of,
)
from rlhf.launcher.peers import Peers

POLL_SECONDS = 0.5
LISTEN_SECONDS = 5.0
"""So long a node whose processes met an exception waits to hear whether another's failure was the cause."""


def supervise(order: Order, arguments: list[str], peers: Peers) -> Outcome:
    """Run the processes of this node to their end, or until another node fails; how this node ends."""
    watch = Watch(order, start_agent(order, arguments))
    told, elsewhere = False, list[Outcome]()
    before = {number: signal.signal(number, watch.on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while not watch.ended():
            if not told and (failure := watch.failure_so_far()):
                peers.tell(failure)
                told = True
            elsewhere += peers.failures()
            if elsewhere:
                watch.stop(signal.SIGTERM, for_peers=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    here = watch.outcome()
    if not told:
        peers.tell(here)
    deadline = time.monotonic() + LISTEN_SECONDS
    while here.code == UNFORESEEN and peers.links and not elsewhere and time.monotonic() < deadline:
        elsewhere += peers.failures()
        time.sleep(0.05)
    return conclude(here, elsewhere)


def conclude(here: Outcome, elsewhere: list[Outcome]) -> Outcome:
    """How this node ends when others have failed, too.

    Where another's failure is the cause and trying again may help, this node leaves as if stopped on request: a
    Job counts a failure once then, not once a node.
    """
    cause = verdict([here, *elsewhere])
    if here.code == 0 or here.code == cause.code == StopRequested.exit_code:
        return here
    if cause is here or cause.code in PERMANENT_CODES:
        return cause
    return Outcome(StopRequested.exit_code, f"{cause.line}; stopped with it, run the same command again", here.time)


def start_agent(order: Order, arguments: list[str]) -> subprocess.Popen[bytes]:
    """Start torchrun's agent, with an even share of the cores for each of its processes unless that is set."""
    cores = cgroups.usable_cores(cgroups.CGROUPS, cgroups.MEMBERSHIP)
    threads = {"OMP_NUM_THREADS": str(max(cores // order.processes, 1))}
    # In a session of its own, so that Ctrl-C reaches the processes through us, and once.
    return subprocess.Popen(order.command_line(arguments), env=threads | os.environ, start_new_session=True)


class Watch:
    """torchrun's agent as a child, and the folder in which it and the processes leave what became of them."""

    def __init__(self, order: Order, agent: subprocess.Popen[bytes]) -> None:
        self.order, self.agent, self.folder = order, agent, Path(order.folder)
        self.asked_to_stop = self.for_peers = False

    def ended(self) -> bool:
        """Whether the agent has ended; waits a moment for it."""
        try:
            self.agent.wait(POLL_SECONDS)
        except subprocess.TimeoutExpired:
            return False
        return True

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on."""
        self.stop(number, for_peers=False)

    def stop(self, number: int, *, for_peers: bool) -> None:
        """Have the processes stop; asked again, it changes nothing, since that would break into the agent's waiting."""
        if self.asked_to_stop:
            return
        self.asked_to_stop, self.for_peers = True, for_peers
        at_work = len(list(self.folder.glob("begun-*"))) > len(read_outcomes(self.folder))
        # While none is at work the agent may be waiting for another node's in a call that no signal interrupts.
        self.agent.send_signal(number if at_work else signal.SIGKILL)

    def failure_so_far(self) -> Outcome | None:
        """How a process has failed, while others may still be at work."""
        failed = [outcome for outcome in read_outcomes(self.folder).values() if outcome.code]
        return verdict(failed) if failed else None

    def outcome(self) -> Outcome:
        """How this node's processes ended: what each left, or what is known of those that left nothing."""
        outcomes = read_outcomes(self.folder)
        path = self.folder / REPORT
        report = json.loads(path.read_text("utf-8")) if path.exists() else {}
        for rank in set(range(self.order.processes)) - outcomes.keys():
            outcomes[rank] = self._silent(rank, report)
        return verdict(outcomes.values())

    def _silent(self, rank: int, report: dict[str, Any]) -> Outcome:
        """What became of a process that left nothing."""
        now = time.time()
        if str(rank) in report.get("failed", {}):
            code, when = report["failed"][str(rank)]
            words = self.folder / words_of(rank)
            if words.is_file():
                return Outcome(code, words.read_text(encoding="utf-8").removeprefix("rlhf: "), when)
            return ended_with(code, when, local_rank=rank)
        if not (self.folder / f"begun-{rank}").exists():
            if self.asked_to_stop:
                return stopped_early(now)
            why = report.get("error") or f"torchrun's agent ended with {self.agent.returncode}"
            return Outcome(UnavailableError.exit_code, f"the processes did not come together: {why}", now)
        if self.asked_to_stop:
            code = UNFORESEEN if self.for_peers else 1  # without its peers it could not
            return Outcome(code, f"not stopped within {self.order.stop_within} s, so killed; {STILL_GOOD}", now)
        if not report:
            return Outcome(1, f"torchrun's agent was killed; {STILL_GOOD}", now)
        return Outcome(UNFORESEEN, f"process {rank} hung after another had failed, so was killed; {STILL_GOOD}", now)
