"""How many nodes and processes a stage runs on, by options or by the environment variables that a Job sets."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

from rlhf.console import Parser
from rlhf.errors import ConfigError, UnavailableError, UsageError
from rlhf.gpus import visible_gpus
from rlhf.placement import check_dedicated


@dataclass(frozen=True)
class Layout:
    """How many nodes and processes there are, which of the nodes this is, and where and how long nodes meet."""

    nodes: int
    node_rank: int
    processes: int
    rendezvous: tuple[str, int] | None
    timeout: int


def launch_options() -> Parser:
    """The options of `launch`; each has an environment variable, which a Job sets."""
    parser = Parser(add_help=False)
    for option, metavar, meaning in (
        ("--nodes", "N", "nodes it runs on (default: $RLHF_NODES or 1)"),
        ("--node-rank", "R", "which of them this is (default: $RLHF_NODE_RANK, else $JOB_COMPLETION_INDEX, else 0)"),
        ("--gpus", "N", "GPUs of this node to use; 0: none (default: $RLHF_GPUS or what the driver shows)"),
        ("--processes", "N", "processes on this node (default: $RLHF_PROCESSES or one a GPU, at least one)"),
        (
            "--rendezvous-timeout",
            "SECONDS",
            "how long nodes wait for each other (default: $RLHF_RENDEZVOUS_TIMEOUT or 600)",
        ),
    ):
        parser.add_argument(option, type=int, metavar=metavar, help=meaning)
    parser.add_argument(
        "--rendezvous", metavar="HOST:PORT", help="where node 0 listens for the others (default: $RLHF_RENDEZVOUS)"
    )
    return parser


def layout(options: argparse.Namespace, *, parallel: bool, device: str, dedicated: bool = False) -> Layout:
    """Read options and environment for a stage that many processes may share, or one that runs in one.

    device is `runtime.device` of the settings; dedicated: the stage is one process whose reward model has a GPU of
    its own. Where no GPU is to be used, they are hidden from this process. Raises UsageError for what does not fit
    together, ConfigError when the settings want another device or number of processes, UnavailableError when GPUs
    are missing.
    """
    nodes = number(options.nodes, "--nodes", "RLHF_NODES", least=1) or 1
    rank = number(options.node_rank, "--node-rank", "RLHF_NODE_RANK", "JOB_COMPLETION_INDEX") or 0
    timeout = number(options.rendezvous_timeout, "--rendezvous-timeout", "RLHF_RENDEZVOUS_TIMEOUT", least=1) or 600
    if rank >= nodes:
        raise UsageError(f"--node-rank {rank} is not below --nodes {nodes}; nodes count from 0")
    if not parallel and (nodes > 1 or max(options.processes or 1, options.gpus or 1) > 1):
        raise UsageError(f"{options.stage} runs in one process; leave out --nodes, --processes and --gpus")
    gpus = usable_gpus(number(options.gpus, "--gpus", "RLHF_GPUS"), device=device)
    if gpus == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    processes = number(options.processes, "--processes", "RLHF_PROCESSES", least=1)
    if dedicated:
        processes = processes or 1
        check_dedicated(gpus=gpus, processes=nodes * processes)
    processes = processes or max(gpus, 1)
    return Layout(
        nodes=nodes,
        node_rank=rank,
        processes=processes if parallel else 1,
        rendezvous=_endpoint(options.rendezvous or os.environ.get("RLHF_RENDEZVOUS")) if nodes > 1 else None,
        timeout=timeout,
    )


def usable_gpus(asked: int | None, *, device: str) -> int:
    """How many GPUs to use of those that the driver shows: as many as asked for, all when nothing was said.

    Raises ConfigError when `runtime.device` wants what is not asked for, UnavailableError when there are fewer.
    """
    if device == "cuda" and asked == 0:
        raise ConfigError("runtime.device=cuda, but no GPU is asked for (RLHF_GPUS=0); ask for GPUs or use auto")
    if device == "cpu" or asked == 0:
        return 0
    seen = visible_gpus()
    if asked is not None and seen.count < asked:
        why = f": {seen.problem}" if seen.problem else ""
        raise UnavailableError(f"{asked} GPUs asked for, {seen.count} visible{why}")
    return seen.count if asked is None else asked


def number(given: int | None, option: str, *variables: str, least: int = 0) -> int | None:
    """An option, else the first of the environment variables that is set; UsageError below `least`."""
    name, text = option, None if given is None else str(given)
    for variable in variables:
        if text is None and os.environ.get(variable):
            name, text = variable, os.environ[variable]
    if text is None:
        return None
    if not text.removeprefix("-").isdigit() or int(text) < least:
        raise UsageError(f"{name}={text} is not a whole number of at least {least}")
    return int(text)


def _endpoint(text: str | None) -> tuple[str, int]:
    if not text:
        raise UsageError("several nodes need --rendezvous HOST:PORT (or RLHF_RENDEZVOUS), where node 0 listens")
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"--rendezvous {text} is not HOST:PORT")
    return host.strip("[]"), int(port)
