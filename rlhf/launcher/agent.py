"""torchrun's agent of one node: starts the stage's processes, watches them, and ends them all when one fails.

`python -m torch.distributed.run` is this very `elastic_launch`; called here it keeps quiet about what the launcher
says better, and tells which processes a signal killed.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf.processes import die_with

REPORT = "agent.json"
AGENT_WAITS_SECONDS = 30
"""So long torchrun's agent leaves the others after one has failed, then it kills them itself."""


@dataclass(frozen=True)
class Order:
    """What the launcher wants run, and where the nodes meet; times are in seconds."""

    folder: str
    nodes: int
    node_rank: int
    processes: int
    address: str
    port: int
    meeting: str
    join_within: int
    stop_within: int
    launcher: int

    def command_line(self, arguments: list[str]) -> list[str]:
        """How to start this module with the order."""
        return [sys.executable, "-m", "rlhf.launcher.agent", json.dumps(asdict(self)), *arguments]


def main() -> int:
    """Run the order; 0 when all processes of this node ended with 0."""
    order = Order(**json.loads(sys.argv[1]))
    die_with(order.launcher)
    os.environ["RLHF_AGENT_PID"] = str(os.getpid())
    report = run(order, sys.argv[2:])
    (Path(order.folder) / REPORT).write_text(json.dumps(report), encoding="utf-8")
    return int(bool(report))


def run(order: Order, arguments: list[str]) -> dict[str, object]:
    """Start the processes and wait for them; what went wrong, nothing when all went well.

    `failed` maps local ranks to exit code (negative: the signal) and time; `error` is torchrun's own.
    """
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable()  # which process failed and why is the launcher's to say, in one line
    config = LaunchConfig(
        min_nodes=order.nodes,
        max_nodes=order.nodes,
        nproc_per_node=order.processes,
        run_id=order.meeting,
        rdzv_backend="static",
        rdzv_endpoint=f"[{order.address}]:{order.port}" if ":" in order.address else f"{order.address}:{order.port}",
        rdzv_configs={"rank": order.node_rank, "timeout": order.join_within},
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        signals_to_handle="SIGTERM,SIGINT",
        shutdown_timeout=order.stop_within,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "rlhf.launched", order.folder, *arguments)
    except ChildFailedError as error:
        first = min(one.timestamp for one in error.failures.values())
        by_themselves = [one for one in error.failures.values() if one.timestamp - first < AGENT_WAITS_SECONDS]
        return {"failed": {one.local_rank: [one.exitcode, one.timestamp] for one in by_themselves}}
    except SignalException:
        return {"failed": {}}
    except (dist.DistError, OSError) as error:
        return {"error": " ".join(str(error).split())}
    finally:
        # torchrun's handlers stay, and would raise into the end of this process.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    return {}


if __name__ == "__main__":
    sys.exit(main())
