"""`rlhf deploy`, `undeploy`, `cluster-status` and `cluster-logs`: options and what they set going.

Nothing but the standard library is imported before a command runs, so that help answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.cluster.documents import NAMESPACE, SERVICES
from rlhf.console import Parser
from rlhf.errors import UnavailableError

if TYPE_CHECKING:
    from rlhf.cluster.api import Cluster
    from rlhf.cluster.documents import Document
    from rlhf.cluster.screen import Screen

ALL = "all"


def add_commands(commands: argparse._SubParsersAction[Parser], stages: Sequence[str]) -> None:
    """Add the commands that drive a cluster; stages are the pipeline's, in order."""
    cluster = Parser(add_help=False)
    cluster.add_argument("--namespace", metavar="NS", help=f"namespace (default: the overlay's, {NAMESPACE})")
    cluster.add_argument("--context", metavar="NAME", help="context of the kubeconfig (default: its current one)")
    cluster.add_argument("--debug", action="store_true", help="tracebacks")
    parts = (*stages, *SERVICES)

    deploy = commands.add_parser(
        "deploy",
        help="put a stage, all stages or the service into a cluster",
        description="Render an overlay, apply it, and wait for the Job or the rollout if asked to.",
        parents=[cluster],
    )
    deploy.add_argument("part", choices=(*parts, ALL), metavar="STAGE", help=f"one of {', '.join((*parts, ALL))}")
    _add_deploy_options(deploy)
    deploy.set_defaults(command=command_deploy, stages=stages)

    undeploy = commands.add_parser(
        "undeploy",
        help="remove what was deployed; the volume stays",
        parents=[cluster],
        description=command_undeploy.__doc__,
    )
    undeploy.add_argument("part", nargs="?", choices=parts, metavar="STAGE", help="only this stage or service")
    undeploy.set_defaults(command=command_undeploy)

    status = commands.add_parser("cluster-status", help="how far each stage is in the cluster", parents=[cluster])
    status.set_defaults(command=command_status, stages=stages)

    logs = commands.add_parser("cluster-logs", help="the log of a stage or a service in the cluster", parents=[cluster])
    logs.add_argument("part", choices=parts, metavar="STAGE", help=f"one of {', '.join(parts)}")
    logs.add_argument("--follow", action="store_true", help="until the end, whose exit code this command takes")
    logs.add_argument("--tail", type=int, metavar="LINES", help="only the last lines of what is there already")
    logs.set_defaults(command=command_logs)


def _add_deploy_options(deploy: argparse.ArgumentParser) -> None:
    deploy.add_argument("--overlay", required=True, metavar="NAME|DIR", help="one of k8s/overlays, or a folder")
    deploy.add_argument("--manifests", type=Path, metavar="DIR", help="the k8s folder (default: beside the package)")
    deploy.add_argument("--image", metavar="IMAGE", help="our image with tag or digest (default: the overlay's)")
    deploy.add_argument("--config", metavar="NAME|FILE", help="a preset or a YAML file (default: the overlay's)")
    deploy.add_argument(
        "--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="change one setting; repeatable"
    )
    deploy.add_argument("--run", metavar="NAME", help="name of the run (default: the overlay's)")
    deploy.add_argument(
        "--nodes", type=int, metavar="N", help=f"pods of the stage, one a node; with {ALL}: of the training stages"
    )
    deploy.add_argument(
        "--gpus", type=int, metavar="G", help=f"GPUs of each pod; with {ALL}, the other stages take no more than now"
    )
    deploy.add_argument("--wait", action="store_true", help="until the Job has ended or the service is ready")
    deploy.add_argument("--follow", action="store_true", help="wait, and show the logs")
    deploy.add_argument("--replace", action="store_true", help="end an active Job of the stage first")
    deploy.add_argument("--force-conflicts", action="store_true", help="take over fields that others own")
    deploy.add_argument("--dry-run", action="store_true", help="print what would be applied; the server checks it")
    deploy.add_argument(
        "--stuck-after",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="give up when the same thing stands in the way for so long (default: 300)",
    )
    deploy.add_argument("--timeout", type=float, metavar="SECONDS", help="give up waiting after this (default: never)")


def command_deploy(options: argparse.Namespace) -> int:
    """Render, edit, apply, and wait if asked to."""
    from rlhf.cluster.edits import home_namespace

    documents, screen = wanted_documents(options), open_screen()
    if options.dry_run:
        return dry_run(options, documents, screen)
    with open_cluster(options, screen, home_namespace(documents)) as cluster:
        return deploy_documents(options, cluster, documents, screen)


def deploy_documents(
    options: argparse.Namespace, cluster: Cluster, documents: Sequence[Document], screen: Screen
) -> int:
    """Put one part or the whole pipeline into the cluster; the verdict's exit code where it is waited for."""
    from rlhf.cluster.deploy import Manner, deploy, deploy_all
    from rlhf.cluster.jobs import watch_command
    from rlhf.cluster.waiting import Waiting, wait_for

    manner = Manner(replace=options.replace, force_conflicts=options.force_conflicts)
    waiting = Waiting(follow=options.follow, stuck_after_seconds=options.stuck_after, timeout_seconds=options.timeout)
    if options.part == ALL:
        verdict = deploy_all(cluster, documents, options.stages, manner, waiting, screen)
    else:
        deploy(cluster, documents, options.part, manner, screen.say)
        if not (options.wait or options.follow):
            screen.say(f"{options.part} is deployed; `{watch_command(cluster, options.part)}` watches it")
            return 0
        verdict = wait_for(cluster, options.part, waiting, screen)
    screen.say(verdict.line)
    return verdict.exit_code


def wanted_documents(options: argparse.Namespace) -> list[Document]:
    """The documents that the options of `deploy` ask for."""
    from rlhf.cluster.customise import Changes, customised
    from rlhf.cluster.render import kustomize, overlay_folder

    changes = Changes(
        image=options.image,
        namespace=options.namespace,
        run=options.run,
        nodes=options.nodes,
        gpus=options.gpus,
        config=options.config,
        overrides=tuple(options.set),
    )
    parts = options.stages if options.part == ALL else [options.part]
    return customised(kustomize(overlay_folder(options.overlay, options.manifests)), parts, changes)


def dry_run(options: argparse.Namespace, documents: Sequence[Document], screen: Screen) -> int:
    """Print what would be applied, and have the server check it where one can be reached."""
    import yaml

    from rlhf.cluster.api import ApiRefusal
    from rlhf.cluster.apply import check_with_server, in_order
    from rlhf.cluster.edits import home_namespace

    sys.stdout.write(yaml.safe_dump_all(in_order(documents), sort_keys=False, width=120))
    sys.stdout.flush()
    try:
        with open_cluster(options, screen, home_namespace(documents)) as cluster:
            unchecked = check_with_server(cluster, documents, force=options.force_conflicts)
    except ApiRefusal:
        raise
    except UnavailableError as error:
        screen.say(f"nothing was applied, and no server has checked it: {error}")
        return 0
    screen.say(f"nothing was applied; {unchecked or 'the server would accept it'}")
    return 0


def command_undeploy(options: argparse.Namespace) -> int:
    """Delete what was deployed: Jobs, services, ConfigMaps and rights; never the volume nor the namespace."""
    from rlhf.cluster.undeploy import undeploy

    screen = open_screen()
    with open_cluster(options, screen, NAMESPACE) as cluster:
        undeploy(cluster, options.part, screen.say)
    return 0


def command_status(options: argparse.Namespace) -> int:
    """Print a line a stage, and how the service is reached."""
    from rlhf.cluster.overview import overview

    with open_cluster(options, open_screen(), NAMESPACE) as cluster:
        sys.stdout.write(overview(cluster, options.stages) + "\n")
    return 0


def command_logs(options: argparse.Namespace) -> int:
    """Print the log of a stage or a service; with --follow until its end."""
    from rlhf.cluster.waiting import Waiting, follow_logs, print_logs_of

    screen = open_screen()
    with open_cluster(options, screen, NAMESPACE) as cluster:
        if not options.follow:
            print_logs_of(cluster, options.part, screen, options.tail)
            return 0
        waiting = Waiting(follow=True, tail=options.tail, stuck_after_seconds=None)
        verdict = follow_logs(cluster, options.part, waiting, screen)
    screen.say(verdict.line)
    return verdict.exit_code


def open_screen() -> Screen:
    """Log lines on stdout, words on stderr."""
    from rlhf.cluster.screen import Screen

    return Screen(sys.stdout, sys.stderr)


@contextmanager
def open_cluster(options: argparse.Namespace, screen: Screen, namespace: str) -> Iterator[Cluster]:
    """The cluster that the options name; what it tells is said once."""
    from rlhf.cluster.kubeconfig import connect

    said: set[str] = set()

    def tell(line: str) -> None:
        if line not in said:
            said.add(line)
            screen.say(line)

    cluster = connect(options.context, options.namespace or namespace, tell)
    try:
        yield cluster
    finally:
        cluster.close()
