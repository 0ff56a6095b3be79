"""Plays the kubelet of one node: tests say how containers fare, this writes it into the pods' status."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from kubernetes.client import ApiClient, ApiException, CoreV1Api
from urllib3.exceptions import HTTPError

from rlhf.cluster.documents import Document

NODE = "node-1"
WAIT_SECONDS = 30.0
CAPACITY = {"cpu": "4096", "memory": "64Ti", "pods": "500", "ephemeral-storage": "64Ti", "nvidia.com/gpu": "64"}


@dataclass(frozen=True)
class Fate:
    """How a pod fares: what its main container writes, and how it ends; exit_code None: it runs on."""

    exit_code: int | None = 0
    message: str = ""
    lines: tuple[str, ...] = ()
    container: str = "stage"
    reason: str = ""
    taken_away: bool = False


class Logs:
    """What containers wrote, each line with its time, and who is reading."""

    def __init__(self) -> None:
        self.news = threading.Condition()
        self.lines: dict[tuple[str, str], list[tuple[datetime, str]]] = {}
        self.ended: set[tuple[str, str]] = set()
        self.cuts = 0
        self.opened = 0

    def write(self, pod: str, container: str, *lines: str) -> None:
        """Append lines."""
        with self.news:
            self.lines.setdefault((pod, container), []).extend((datetime.now(UTC), line) for line in lines)
            self.news.notify_all()

    def end(self, pod: str, *containers: str) -> None:
        """Nothing more will be written."""
        with self.news:
            self.ended |= {(pod, container) for container in containers}
            self.news.notify_all()

    def cut(self) -> None:
        """Break every open stream, each in the middle of a line."""
        with self.news:
            self.cuts += 1
            self.news.notify_all()

    def read(self, pod: str, container: str, query: dict[str, list[str]]) -> Iterator[bytes]:
        """The stream that a kubelet would give; ends in half a line when it is cut."""
        since = (
            datetime.fromisoformat(query["sinceTime"][0]) if "sinceTime" in query else datetime.min.replace(tzinfo=UTC)
        )
        with self.news:
            self.opened += 1
            cuts, lines = self.cuts, self.lines.setdefault((pod, container), [])
            at = max(0, len(lines) - int(query["tailLines"][0])) if "tailLines" in query else 0
        while True:
            with self.news:
                while (
                    at == len(lines) and cuts == self.cuts and (pod, container) not in self.ended and "follow" in query
                ):
                    self.news.wait(1)
                new, at = lines[at:], len(lines)
                cut, over = cuts != self.cuts, (pod, container) in self.ended or "follow" not in query
            for stamp, line in new:
                if stamp >= since:
                    head = f"{stamp:%Y-%m-%dT%H:%M:%S.%f}000Z " if "timestamps" in query else ""
                    yield f"{head}{line}\n".encode()
            if cut:
                yield b"2000-01-01T00:00:00.000000000Z half a li"
                raise BrokenPipeError
            if over and not new:
                return


class LogHandler(BaseHTTPRequestHandler):
    """GET /containerLogs/NAMESPACE/POD/CONTAINER, as the API server asks a kubelet."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        _, _, _, pod, container = address.path.split("/")
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.flush()
        logs: Logs = self.server.logs  # type: ignore[attr-defined]
        try:
            for piece in logs.read(pod, container, parse_qs(address.query)):
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")
        except OSError:  # the reader has left, or the stream is cut
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Kubelet:
    """One node whose pods do what tests say; deleted pods save, end with 75 and go, unless `holds` is set."""

    def __init__(self, client: ApiClient, certificate: tuple[Path, Path]) -> None:
        self.api, self.logs = CoreV1Api(client), Logs()
        self.holds, self.namespaces = threading.Event(), set[str]()
        self.fates: dict[str, Callable[[Document], Fate | None]] = {}
        self._client, self._stop, self._seen = client, threading.Event(), set[str]()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), LogHandler)
        self._server.daemon_threads = True
        self._server.logs = self.logs  # type: ignore[attr-defined]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._threads = [
            threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}),
            threading.Thread(target=self._work),
        ]

    def start(self) -> None:
        """Register the node and begin."""
        self.api.create_node({"metadata": {"name": NODE}})
        self.api.patch_node(NODE, {"spec": {"taints": None}})
        status = {
            "capacity": CAPACITY,
            "allocatable": CAPACITY,
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "it is a play"}],
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self._server.server_port}},
        }
        self.api.patch_node_status(NODE, {"status": status})
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads."""
        self._stop.set()
        self._server.shutdown()
        for thread in self._threads:
            thread.join()
        self._server.server_close()

    def play(self, namespace: str, fate: Callable[[Document], Fate | None]) -> None:
        """Start every pod of a namespace by itself, and let it fare as `fate` says; None leaves it as it is."""
        self.fates[namespace] = fate

    def pods(self, namespace: str) -> list[Document]:
        """The pods of a namespace, oldest first."""
        answer = self.api.list_namespaced_pod(namespace, _preload_content=False)
        items: list[Document] = json.loads(answer.data)["items"]
        return sorted(items, key=lambda pod: (pod["metadata"]["creationTimestamp"], pod["metadata"]["name"]))

    def wait_for_pods(self, namespace: str, count: int = 1) -> list[Document]:
        """The pods that have a node and are not on their way out, as soon as there are so many."""
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            placed = [
                pod
                for pod in self.pods(namespace)
                if pod["spec"].get("nodeName")
                and "deletionTimestamp" not in pod["metadata"]
                and pod["status"].get("phase") in (None, "Pending", "Running")
            ]
            if len(placed) >= count:
                return placed
            assert time.monotonic() < deadline, f"no {count} pods on {NODE} in {namespace} after {WAIT_SECONDS} s"
            time.sleep(0.1)

    def begin(self, pod: Document) -> None:
        """The init container has passed, the main one runs."""
        self.logs.end(pod["metadata"]["name"], "check")
        running = {"running": {"startedAt": _now()}}
        self._set(pod, "Running", {"check": _ended(0), "stage": running, "api": running, "tensorboard": running})

    def end(self, pod: Document, fate: Fate) -> None:
        """End a pod: its init container or its main one left with an exit code."""
        assert fate.exit_code is not None
        ended = _ended(fate.exit_code, fate.reason, fate.message)
        check = ended if fate.container == "check" else _ended(0)
        self.logs.end(pod["metadata"]["name"], "check", "stage")
        self._set(pod, "Failed" if fate.exit_code else "Succeeded", {"check": check, "stage": ended})

    def evict(self, pod: Document) -> None:
        """Take a pod away as a drained node does: it is killed before it has saved."""
        condition = {
            "type": "DisruptionTarget",
            "status": "True",
            "reason": "EvictionByEvictionAPI",
            "message": "Eviction API: evicting",
            "lastTransitionTime": _now(),
        }
        self._patch(pod, {"conditions": [condition]})
        self.end(pod, Fate(137))

    def wait_with(self, pod: Document, container: str, reason: str, message: str) -> None:
        """A container cannot start, for a reason."""
        waiting = {"waiting": {"reason": reason, "message": message}}
        others = {"waiting": {"reason": "PodInitializing"}}
        self._set(pod, "Pending", {"check": others, "stage": others, container: waiting})

    def crash(self, pod: Document, container: str, count: int, exit_code: int, message: str) -> None:
        """A container that is started again has ended once more."""
        state = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off restarting failed container"}}
        status = {
            "name": container, "image": pod["spec"]["containers"][0]["image"], "imageID": "", "restartCount": count,
            "ready": False, "state": state, "lastState": _ended(exit_code, message=message),
        }  # fmt: skip
        self._patch(pod, {"phase": "Running", "containerStatuses": [status]})

    def _set(self, pod: Document, phase: str, states: dict[str, Document]) -> None:
        def statuses(containers: list[Document]) -> list[Document]:
            return [
                {
                    "name": each["name"], "image": each["image"], "imageID": "", "restartCount": 0,
                    "ready": "running" in states[each["name"]], "state": states[each["name"]],
                }
                for each in containers
            ]  # fmt: skip

        spec = pod["spec"]
        ready = {"type": "Ready", "status": str(phase == "Running"), "lastTransitionTime": _now()}
        self._patch(
            pod,
            {
                "phase": phase,
                "conditions": [ready],
                "initContainerStatuses": statuses(spec.get("initContainers", [])),
                "containerStatuses": statuses(spec["containers"]),
                "startTime": _now(),
            },
        )

    def _patch(self, pod: Document, status: Document) -> None:
        metadata = pod["metadata"]
        self.api.patch_namespaced_pod_status(metadata["name"], metadata["namespace"], {"status": status})

    def _work(self) -> None:
        """What a kubelet does by itself: start what is to be started, let go what is to go."""
        while not self._stop.wait(0.2):
            try:
                pods = [pod for namespace in list(self.namespaces) for pod in self.pods(namespace)]
            except (ApiException, HTTPError):  # the server is away
                continue
            for pod in pods:
                self._attend(pod)

    def _attend(self, pod: Document) -> None:
        metadata = pod["metadata"]
        try:
            if "deletionTimestamp" in metadata:
                if not self.holds.is_set():
                    self._let_go(pod)
                return
            fate = self.fates.get(metadata["namespace"])
            if fate is not None and pod["spec"].get("nodeName") and metadata["uid"] not in self._seen:
                self._seen.add(metadata["uid"])
                self._fare(pod, fate(pod))
        except (ApiException, HTTPError):  # it went while we looked, or the server did
            pass

    def _fare(self, pod: Document, fate: Fate | None) -> None:
        if fate is None:
            return
        if fate.container != "check":
            self.begin(pod)
            self.logs.write(pod["metadata"]["name"], fate.container, *fate.lines)
        if fate.taken_away:
            self.evict(pod)
        elif fate.exit_code is not None:
            self.end(pod, fate)

    def _let_go(self, pod: Document) -> None:
        metadata = pod["metadata"]
        if pod["status"].get("phase") == "Running" and "stage" in [each["name"] for each in pod["spec"]["containers"]]:
            self.end(pod, Fate(75, "rlhf: stopped on request; run the same command again to continue"))
        self.logs.end(metadata["name"], "check", *(each["name"] for each in pod["spec"]["containers"]))
        self.api.delete_namespaced_pod(metadata["name"], metadata["namespace"], grace_period_seconds=0)


def _ended(exit_code: int, reason: str = "", message: str = "") -> Document:
    reason = reason or ("Error" if exit_code else "Completed")
    ended = {"exitCode": exit_code, "reason": reason, "startedAt": _now(), "finishedAt": _now()}
    return {"terminated": ended | ({"message": message} if message else {})}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
