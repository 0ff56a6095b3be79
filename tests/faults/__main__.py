"""Fault injection: every system call of a save fails once in turn, in every way. Prints what was tried.

python -m tests.faults            every call in every way, and the calls that only look, too
python -m tests.faults --sample   every call in one way each
"""

from __future__ import annotations

import argparse
import errno
import gc
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from tests.faults.learner import writer
from tests.faults.points import FAULTS, Fault, Workbench
from tests.faults.scenarios import CARELESS, SCENARIOS
from tests.faults.trap import Call, Kind, Mode, Trap, missing


def main() -> int:
    """Try all points; 1 when anything was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--sample", action="store_true", help="try each call in one way instead of all")
    by_name = {scenario.name: scenario for scenario in (*SCENARIOS, CARELESS)}
    parser.add_argument("--scenario", action="append", choices=by_name, help="only this one; repeatable")
    options = parser.parse_args()
    if lacking := missing():
        sys.exit(lacking)
    logging.disable(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    # What is imported does not change: children need no pages of their own for it.
    gc.freeze()
    tried = lost = 0
    started = time.monotonic()
    # In memory where there is such a place: syncing the disk for real tells nothing here.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        trap = Trap(Path(folder))
        writer(0)(Path(folder))  # made once, and libraries look around once: children need not do it again
        chosen = [by_name[name] for name in options.scenario] if options.scenario else SCENARIOS
        for number, scenario in enumerate(chosen):
            bench = Workbench(trap, Path(folder) / str(number), scenario, reads=not options.sample)
            calls = bench.undisturbed()
            results = [(at, fault, bench.try_point(at, fault)) for at, fault in points(calls, options.sample)]
            held = [result for *_, result in results if result is not None]
            tried += len(held)
            print(f"{scenario.name}: {len(calls)} calls, {len(held)} points", flush=True)
            for at, fault, result in results:
                if result:
                    lost += 1
                    call = calls[at - 1]
                    print(f"  LOST at call {at} ({call.kind.name} {call.path}), {fault.name}: {result}", flush=True)
    print(f"points tried: {tried}, lost: {lost}, seconds: {time.monotonic() - started:.0f}")
    return bool(lost)


def points(calls: list[Call], sample: bool) -> Iterator[tuple[int, Fault]]:
    """Every call with every fault that it can meet, or with one each in rotation."""
    for at, call in enumerate(calls, start=1):
        ways = [fault for fault in FAULTS if applies(fault, call)]
        yield from ((at, fault) for fault in ([ways[at % len(ways)]] if sample else ways))


def applies(fault: Fault, call: Call) -> bool:
    """Only a write can be cut short; a call that only looks meets errors of the disk."""
    if call.kind is Kind.READ:
        return fault.number == errno.EIO
    return fault.mode is not Mode.SHORT or call.kind is Kind.WRITE


if __name__ == "__main__":
    sys.exit(main())
