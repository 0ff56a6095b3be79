"""`rlhf launch STAGE`: a stage on one process or many, on one node or several, with the exit codes of the stage itself.

One process is this one. For several, torchrun's agent starts them and this process stays beside it: it passes signals
on once, and ends with the code and the one line of the process that failed first.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

from rlhf import __version__
from rlhf.checkpoint import StageDir
from rlhf.config import Config
from rlhf.errors import RlhfError
from rlhf.launcher.agent import Order
from rlhf.launcher.layout import Layout, layout
from rlhf.launcher.outcome import Outcome
from rlhf.launcher.peers import Peers
from rlhf.launcher.rendezvous import Meeting, free_port, meet
from rlhf.launcher.supervise import supervise
from rlhf.pipeline import STAGES, check_settings
from rlhf.shares import check_shares

logger = logging.getLogger(__name__)

STOP_MARGIN_SECONDS = 15
"""Given to the processes beyond `runtime.stop_within_seconds`, before they are killed."""


class StageFailed(RlhfError):
    """The processes of a stage failed; exit code and line are theirs."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.line)
        self.exit_code = outcome.code


def launch(
    options: argparse.Namespace,
    config: Config,
    run_dir: Path,
    arguments: list[str],
    *,
    run_here: Callable[[argparse.Namespace], int],
) -> int:
    """Run a stage to its end; 0, or what run_here gives. Raises StageFailed with the code and the line of the failure.

    arguments are those of the stage's own command, its name first; run_here runs it in this process.
    """
    check_settings(config, run_dir)
    directory = StageDir(run_dir, options.stage)
    if directory.is_whole():
        # A pod that was started anew must not wait for others, which have left.
        logger.info("stage=%s is already done path=%s", options.stage, directory.path / "final")
        return 0
    parallel = next(stage.parallel for stage in STAGES if stage.name == options.stage)
    dedicated = options.stage == "ppo" and config.ppo.reward_placement == "dedicated"
    where = layout(options, parallel=parallel, device=config.runtime.device, dedicated=dedicated)
    if where.nodes * where.processes == 1:
        return run_here(options)
    check_shares(config, options.stage, where.nodes * where.processes)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # nothing has begun: leave as upon Ctrl-C
    meeting, peers = find_one_another(options.stage, where, about={"run": options.run, "settings": _digest(config)})
    with tempfile.TemporaryDirectory(prefix="rlhf-launch-") as folder:
        order = Order(
            folder=folder,
            nodes=where.nodes,
            node_rank=where.node_rank,
            processes=where.processes,
            address=meeting.address,
            port=meeting.port,
            meeting=meeting.name,
            join_within=where.timeout,
            stop_within=config.runtime.stop_within_seconds + STOP_MARGIN_SECONDS,
            launcher=os.getpid(),
        )
        try:
            outcome = supervise(order, arguments, peers)
        finally:
            peers.close()
    if outcome.code:
        raise StageFailed(outcome)
    return 0


def find_one_another(stage: str, where: Layout, *, about: dict[str, object]) -> tuple[Meeting, Peers]:
    """Where the processes of all nodes meet, and the connections to the other launchers."""
    if where.rendezvous is None:
        return Meeting("127.0.0.1", free_port(), stage), Peers({})
    told = {"version": __version__, "stage": stage, "nodes": where.nodes, "processes": where.processes} | about
    host, port = where.rendezvous
    return meet(host, port, node=where.node_rank, nodes=where.nodes, about=told, timeout=where.timeout)


def _digest(config: Config) -> str:
    return hashlib.sha256(config.to_yaml().encode()).hexdigest()[:12]
