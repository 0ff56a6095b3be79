"""How the nodes of a stage find one another before torchrun starts, and notice afterwards that one has left.

Node 0 listens; the others connect, each trying until node 0's name resolves and answers, and say what they are about
to run. When all are there, each is told where torchrun's store will be. So a node that starts late or anew never meets
the store of an attempt that is ending, a node that is missing is named, and signals are heard meanwhile.
"""

from __future__ import annotations

import json
import logging
import selectors
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from rlhf.errors import UnavailableError
from rlhf.launcher.peers import Peers, notice_loss, read_line

logger = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
REMIND_SECONDS = 30.0
CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Meeting:
    """Where torchrun's store is, and a name that tells this attempt from others."""

    address: str
    port: int
    name: str


def meet(
    host: str, port: int, *, node: int, nodes: int, about: Mapping[str, object], timeout: int
) -> tuple[Meeting, Peers]:
    """Wait, up to `timeout` seconds, until all nodes are there.

    about says what this node will run; the nodes have to agree in it.
    Raises UnavailableError naming who did not come, or what they disagree in.
    """
    deadline = time.monotonic() + timeout
    if node:
        return join(host, port, node=node, about=about, deadline=deadline, timeout=timeout)
    try:
        hall = Hall(port, nodes=nodes, about=about)
    except OSError as error:
        raise UnavailableError(f"node 0 cannot listen at port {port}: {error.strerror}") from error
    try:
        hall.gather(deadline, timeout)
        return hall.send_off()
    except BaseException:
        hall.seated.close()
        raise
    finally:
        hall.close()


class Hall:
    """Where node 0 waits for the others."""

    def __init__(self, port: int, *, nodes: int, about: Mapping[str, object]) -> None:
        self.nodes, self.about = nodes, about
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self.door = socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=nodes)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.door, selectors.EVENT_READ)
        self.unheard: set[socket.socket] = set()
        self.seated = Peers({})

    def gather(self, deadline: float, timeout: int) -> None:
        """Wait until all others are seated."""
        reminder = Reminder()
        while missing := [node for node in range(1, self.nodes) if node not in self.seated.links]:
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"{_names(missing)} of {self.nodes} did not come within {timeout} s; "
                    "see whether their pods run, and if not, why"
                )
            reminder.say("waiting for %s of %d", _names(missing), self.nodes)
            for key, _ in self.selector.select(RETRY_SECONDS):
                if key.fileobj is self.door:
                    self._open()
                else:
                    self._hear(key.fileobj)  # type: ignore[arg-type]

    def send_off(self) -> tuple[Meeting, Peers]:
        """Tell each where to go on."""
        first = next(iter(self.seated.links.values()))
        meeting = Meeting(_plain(first.getsockname()[0]), free_port(), uuid.uuid4().hex)
        for node, connection in self.seated.links.items():
            try:
                connection.setblocking(True)
                connection.sendall(json.dumps(asdict(meeting)).encode() + b"\n")
            except OSError as error:
                raise UnavailableError(f"node {node} has gone again ({error}); it is tried again") from error
        return meeting, self.seated

    def close(self) -> None:
        """Listen no more; those who are seated stay connected."""
        self.selector.close()
        self.door.close()
        for connection in self.unheard:
            connection.close()

    def _open(self) -> None:
        try:
            connection, _ = self.door.accept()
        except ConnectionError:
            return  # it has gone again
        connection.settimeout(RETRY_SECONDS)
        notice_loss(connection)
        self.unheard.add(connection)
        self.selector.register(connection, selectors.EVENT_READ)

    def _hear(self, connection: socket.socket) -> None:
        """A greeting takes a seat; the end of a connection frees it; what is none of ours is shown out."""
        self.unheard.discard(connection)
        known = {link: node for node, link in self.seated.links.items()}
        try:
            greeting = json.loads(read_line(connection))
            node, about = int(greeting["node"]), dict(greeting["about"])
        except (OSError, ValueError, TypeError, KeyError):
            self.selector.unregister(connection)
            connection.close()
            if connection in known:
                del self.seated.links[known[connection]]
            return
        if complaint := disagreement(node, about, self.about):
            connection.sendall(json.dumps({"refused": complaint}).encode() + b"\n")
            connection.close()
            raise UnavailableError(complaint)
        if before := self.seated.links.get(node):  # that node has started anew
            self.selector.unregister(before)
            before.close()
        self.seated.links[node] = connection


def join(
    host: str, port: int, *, node: int, about: Mapping[str, object], deadline: float, timeout: int
) -> tuple[Meeting, Peers]:
    """Another node's side: try until node 0 says where to go on."""
    reminder = Reminder()
    greeting = json.dumps({"node": node, "about": about}).encode() + b"\n"
    while True:
        try:
            # The name is resolved at each try: pod 0 may not be there yet, and have another address when it is.
            connection = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
            return _ask(connection, greeting, deadline)
        except OSError as error:
            reason = error.strerror or str(error)
        except ValueError:
            reason = "it hung up"
        if time.monotonic() + RETRY_SECONDS > deadline:
            raise UnavailableError(
                f"node 0 at {host}:{port} did not answer within {timeout} s ({reason}); "
                "see whether its pod runs, and if not, why"
            )
        reminder.say("waiting for node 0 at %s:%d: %s", host, port, reason)
        time.sleep(RETRY_SECONDS)


def _ask(connection: socket.socket, greeting: bytes, deadline: float) -> tuple[Meeting, Peers]:
    """Greet node 0 and wait until it has gathered all; ValueError when it hangs up instead."""
    try:
        notice_loss(connection)
        connection.sendall(greeting)
        connection.settimeout(max(deadline - time.monotonic(), RETRY_SECONDS))
        answer = json.loads(read_line(connection))
        if "refused" in answer:
            raise UnavailableError(answer["refused"])
        meeting = Meeting(_plain(connection.getpeername()[0]), answer["port"], answer["name"])
    except BaseException:
        connection.close()
        raise
    return meeting, Peers({0: connection})


def disagreement(node: int, theirs: Mapping[str, object], ours: Mapping[str, object]) -> str:
    """What a node would run otherwise than node 0, in a sentence; empty when they agree."""
    told = [f"{key} {theirs.get(key)} where node 0 has {ours[key]}" for key in ours if theirs.get(key) != ours[key]]
    if not told:
        return ""
    return f"node {node} has {', '.join(told)}; start all nodes with the same image, options and settings"


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.create_server(("", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def _plain(address: str) -> str:
    """An IPv4 address as such where a socket for both kinds wraps it."""
    return address.removeprefix("::ffff:")


def _names(nodes: list[int]) -> str:
    return f"node{'s' if len(nodes) > 1 else ''} {', '.join(map(str, nodes))}"


class Reminder:
    """Says a line at once and then now and then, however often it is asked to."""

    def __init__(self) -> None:
        self.last = -REMIND_SECONDS

    def say(self, message: str, *arguments: object) -> None:
        """Log the line if it is time."""
        if time.monotonic() - self.last >= REMIND_SECONDS:
            self.last = time.monotonic()
            logger.info(message, *arguments)
