"""The connections between the launchers of a stage's nodes, held while it runs: who fails says so, or is missed.

Without them a node whose peer has failed would hang in a collective until that times out.
"""

from __future__ import annotations

import json
import socket
import time
from dataclasses import asdict, replace

from rlhf.launcher.outcome import Outcome

LONGEST_LINE = 65536


class Peers:
    """Node 0 holds a link to every other node, each of those one to node 0, which passes on what it hears."""

    def __init__(self, links: dict[int, socket.socket]) -> None:
        self.links = links
        self.heard_from: set[int] = set()

    def failures(self) -> list[Outcome]:
        """How other nodes failed, as far as that is new; does not wait."""
        new = []
        for node, link in list(self.links.items()):
            link.setblocking(False)
            try:
                line = read_line(link)
            except BlockingIOError:
                continue
            except OSError:
                line = ""
            if line:
                outcome = _understood(node, line)
            else:
                link.close()
                del self.links[node]
                outcome = Outcome(1, f"node {node} is gone without a word; see what became of its pod", time.time())
            if outcome.code and node not in self.heard_from:
                new.append(outcome)
                self._send(outcome, [other for number, other in self.links.items() if number != node])
            self.heard_from.add(node)
        return new

    def tell(self, outcome: Outcome) -> None:
        """Say how this node's processes ended, or that they are about to."""
        self._send(outcome, list(self.links.values()))

    def close(self) -> None:
        """Leave."""
        for link in self.links.values():
            link.close()
        self.links.clear()

    def _send(self, outcome: Outcome, links: list[socket.socket]) -> None:
        for link in links:
            try:
                link.setblocking(True)
                link.sendall(json.dumps(asdict(outcome)).encode() + b"\n")
            except OSError:
                continue  # it has left, too


def read_line(link: socket.socket) -> str:
    """The next line, without reading beyond it; what came of it when the other side hangs up.

    Raises BlockingIOError when nothing has come yet, on a connection that does not wait.
    """
    line = bytearray(link.recv(1))
    link.settimeout(link.gettimeout() or 1.0)  # a line is sent as a whole
    while line and not line.endswith(b"\n") and len(line) < LONGEST_LINE:
        more = link.recv(1)
        if not more:
            break
        line += more
    return line.decode("utf-8", errors="replace")


def notice_loss(link: socket.socket) -> None:
    """Have the kernel ask now and then whether the other side is still there."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _understood(node: int, line: str) -> Outcome:
    """A peer's words; what node 0 passes on names its node already."""
    outcome = Outcome(**json.loads(line))
    return outcome if "node " in outcome.line else replace(outcome, line=f"node {node}: {outcome.line}")
