"""The crash test: stages are killed at random moments and begun again, and make the same in the end, bit for bit.

python -m tests.chaos --kills 30              each stage so often
python -m tests.chaos --stage ppo --seed 7    one stage, with the choices of an earlier time
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

from rlhf.pipeline import STAGE_NAMES
from tests.chaos.crash import World, torment
from tests.chaos.importing import MEMORY, import_all


def main() -> int:
    """Kill, compare and count; 1 when anything was lost or differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--kills", type=int, default=30, help="how often each stage is killed (default: 30)")
    parser.add_argument("--stage", action="append", choices=STAGE_NAMES, help="only this one; repeatable")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    parser.add_argument("--anew", action="store_true", help="begin each process as a user does, which takes longer")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    logging.disable(logging.WARNING)
    import_all()
    stages = options.stage or STAGE_NAMES
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        last = max(stages, key=STAGE_NAMES.index)
        (Path(folder) / "world").mkdir()
        world = World(Path(folder) / "world", last=last)
        tallies = []
        for stage in stages:
            tally = torment(
                world, stage, Path(folder) / "place", kills=options.kills, seed=options.seed, anew=options.anew
            )
            print(tally, flush=True)
            for line in tally.wrong:
                print(f"  WRONG: {line}", flush=True)
            tallies.append(tally)
    kills, lost = sum(tally.blows.total() for tally in tallies), sum(tally.lost for tally in tallies)
    wrong = sum(len(tally.wrong) for tally in tallies)
    print(f"kills survived: {kills}, states lost: {lost}, wrong: {wrong}, seconds: {time.monotonic() - started:.0f}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
