"""The logs of all pods of a Job or a Deployment, followed through cut connections and replaced pods."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from rlhf.cluster.api import ApiRefusal, Cluster
from rlhf.cluster.documents import Document
from rlhf.cluster.snapshot import container_statuses, phase, short_name
from rlhf.errors import UnavailableError

# A connection that is silent for so long may be dead: it is opened again where it ended.
SILENT_SECONDS = 60.0
PAUSE_SECONDS = 1.0
Stamp = tuple[int, int]


@dataclass
class Position:
    """How far a log was read: the newest line's time, and how many lines bore it."""

    newest: Stamp = (0, 0)
    same: int = 0

    def since(self) -> str:
        """What to ask the server for: it knows whole seconds only, so some lines come again."""
        return datetime.fromtimestamp(self.newest[0], UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def fresh(self, lines: Iterable[str]) -> Iterator[str]:
        """The lines, without their times, that were not read before."""
        seen, again, catching_up = self.newest, self.same, True
        for line in lines:
            stamp, text = split_stamp(line)
            if stamp is not None:
                if catching_up and stamp < seen:
                    continue
                if catching_up and stamp == seen and again:
                    again -= 1
                    continue
                catching_up = False
                self._advance(stamp)
            yield text

    def _advance(self, stamp: Stamp) -> None:
        if stamp == self.newest:
            self.same += 1
        elif stamp > self.newest:
            self.newest, self.same = stamp, 1


def split_stamp(line: str) -> tuple[Stamp | None, str]:
    """Seconds and nanoseconds of the time before a line, and the line; no time where there is none to read."""
    text, _, rest = line.partition(" ")
    seconds, point, tail = text.partition(".")
    digits = tail.rstrip("Z").partition("+")[0].partition("-")[0] if point else ""
    zone = tail[len(digits) :] if point else ""
    try:
        return (int(datetime.fromisoformat(seconds + zone).timestamp()), int(digits.ljust(9, "0") or 0)), rest
    except ValueError:
        return None, line


def whole_lines(pieces: Iterable[bytes], *, ended: bool) -> Iterator[str]:
    """The lines of a stream; one without its end is kept back unless the container had ended: it will come again."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)
    if rest and ended:
        yield rest.decode(errors="replace")


class LogFollower:
    """Follows every container of the pods that it is shown, a thread a pod; emit gets the pod's name and the line.

    tell gets a line when an account may not read a log. tail: of what was written before, only so many lines.
    """

    def __init__(
        self,
        cluster: Cluster,
        emit: Callable[[str, str], None],
        tell: Callable[[str], None],
        *,
        tail: int | None = None,
    ) -> None:
        self._cluster, self._emit, self._tell, self._tail = cluster, emit, tell, tail
        self._pods: dict[str, Document] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._news = threading.Condition()
        self._leaving = self._named = False

    def show(self, pods: Iterable[Document], *, named: bool) -> None:
        """Tell which pods there are now, and how they are; named: whether lines are to tell whose they are."""
        with self._news:
            self._named = named
            self._pods = {pod["metadata"]["uid"]: pod for pod in pods}
            for uid, pod in self._pods.items():
                if uid not in self._threads:
                    self._threads[uid] = threading.Thread(target=self._follow_pod, args=(uid, pod), daemon=True)
                    self._threads[uid].start()
            self._news.notify_all()

    def finish(self, within_seconds: float) -> None:
        """Wait until all that ended pods wrote is printed, but no longer than this; nothing is printed afterwards."""
        deadline = time.monotonic() + within_seconds
        for uid, thread in self._threads.items():
            if uid not in self._pods or phase(self._pods[uid]) != "Running":
                thread.join(max(0.0, deadline - time.monotonic()))
        with self._news:
            self._leaving = True
            self._news.notify_all()

    def _follow_pod(self, uid: str, pod: Document) -> None:
        """One container after the other, as they run."""
        for container in container_names(pod):
            position, whole = Position(), False
            while not whole:
                ended = self._wait_for_start(uid, container)
                if ended is None:
                    return
                try:
                    whole = self._read(pod, container, position, ended=ended) and ended
                except ApiRefusal as refusal:
                    self._tell(f"no log of {short_name(pod)}: {refusal}")
                    return

    def _wait_for_start(self, uid: str, container: str) -> bool | None:
        """Whether a container has ended, as soon as it has begun; None when it never will, or nobody listens."""
        with self._news:
            while not self._leaving and uid in self._pods:
                pod = self._pods[uid]
                if has_begun(pod, container):
                    return has_ended(pod, container)
                if phase(pod) in ("Succeeded", "Failed"):
                    return None
                self._news.wait()
        return None

    def _read(self, pod: Document, container: str, position: Position, *, ended: bool) -> bool:
        """Print what is new until the stream ends (True) or breaks (False); then wait a moment.

        Raises ApiRefusal where the account may not read it.
        """
        query = [("container", container), ("follow", "true"), ("timestamps", "true")]
        if position.same:
            query.append(("sinceTime", position.since()))
        elif self._tail is not None:
            query.append(("tailLines", str(self._tail)))
        whole = True
        try:
            pieces = self._cluster.log(pod["metadata"]["name"], query, read_seconds=SILENT_SECONDS)
            for line in position.fresh(whole_lines(pieces, ended=ended)):
                if self._leaving:
                    return True
                self._emit(short_name(pod) if self._named else "", line)
        except UnavailableError as error:  # away, or not yet there: the pods that we are shown tell when to give up
            if isinstance(error, ApiRefusal) and error.status in (401, 403) and not self._cluster.passes(error):
                raise
            whole = False
        if not (whole and ended):
            with self._news:
                self._news.wait(PAUSE_SECONDS)
        return whole


def print_log(cluster: Cluster, pod: Document, emit: Callable[[str, str], None], *, tail: int | None = None) -> None:
    """What a pod's containers have written so far. Raises UnavailableError where it cannot be read."""
    for container in container_names(pod):
        if has_begun(pod, container):
            query = [("container", container)] + ([] if tail is None else [("tailLines", str(tail))])
            pieces = cluster.log(pod["metadata"]["name"], query, read_seconds=SILENT_SECONDS)
            for line in whole_lines(pieces, ended=True):
                emit(short_name(pod), line)


def container_names(pod: Document) -> list[str]:
    """A pod's containers in the order in which they begin."""
    spec = pod["spec"]
    return [str(container["name"]) for container in [*spec.get("initContainers", []), *spec["containers"]]]


def has_begun(pod: Document, container: str) -> bool:
    """Whether a container has a log, its own or that of the try before."""
    status = next((each for each in container_statuses(pod) if each["name"] == container), {})
    state, before = status.get("state", {}), status.get("lastState", {})
    return "running" in state or "terminated" in state or "terminated" in before


def has_ended(pod: Document, container: str) -> bool:
    """Whether a container has written its last line, and will not be started again."""
    status = next((each for each in container_statuses(pod) if each["name"] == container), {})
    ended = status.get("state", {}).get("terminated")
    if ended is None:
        return False
    begun_once = container in [each["name"] for each in pod["spec"].get("initContainers", [])] and not ended["exitCode"]
    return begun_once or pod["spec"].get("restartPolicy") == "Never" or phase(pod) in ("Succeeded", "Failed")
