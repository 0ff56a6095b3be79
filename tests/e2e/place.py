"""A namespace of a cluster in which things are tried, with the commands that users have: `rlhf` and `kubectl`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import REPOSITORY

SETTINGS = Path(__file__).with_name("small.yaml")
VOLUME_POD = REPOSITORY / "k8s" / "extras" / "volume-pod.yaml"
LOOK_EVERY_SECONDS = 0.3

Object = dict[str, Any]


@dataclass(frozen=True)
class Ended:
    """A command that has ended, and how long it took."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def verdict(self) -> str:
        """The last line that it said."""
        return self.err.strip().rpartition("\n")[2]


@dataclass(frozen=True)
class Place:
    """One namespace, with the environment in which kubectl reaches its cluster and the image that it runs."""

    namespace: str
    image: str
    environment: Mapping[str, str] = field(repr=False)

    def rlhf(self, command: str, *arguments: str, seconds: float = 600) -> Ended:
        """Run `python -m rlhf COMMAND` in this namespace."""
        with self.began(command, *arguments) as running:
            return running.ended(seconds)

    def deploy(self, part: str, *options: str) -> Ended:
        """Deploy a stage, all of them or the service, as a laptop does, with small settings."""
        return self.rlhf("deploy", part, *self.options(), *options)

    def began(self, command: str, *arguments: str) -> Running:
        """`python -m rlhf COMMAND`, running."""
        return Running([sys.executable, "-m", "rlhf", command, "--namespace", self.namespace, *arguments], self)

    def options(self) -> list[str]:
        """What every `deploy` here is told."""
        return ["--overlay", "local-cpu", "--image", self.image, "--config", str(SETTINGS)]

    def kubectl(self, *arguments: str, stdin: str | None = None, seconds: float = 300) -> str:
        """What kubectl prints; raises CalledProcessError, with its words shown, when it fails."""
        command = ["kubectl", "--namespace", self.namespace, *arguments]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, input=stdin, env=self.environment, timeout=seconds
        )
        if done.returncode:
            sys.stderr.write(f"{' '.join(command)}: {done.stderr}\n")
            done.check_returncode()
        return done.stdout

    def get(self, *what: str) -> Object:
        """An object, or a list of them."""
        found: Object = json.loads(self.kubectl("get", *what, "--output", "json"))
        return found

    def pods(self, job: str) -> list[Object]:
        """The pods that a Job has made and that are still there, by their names."""
        listed = self.get("pods", "--selector", f"batch.kubernetes.io/job-name={job}")["items"]
        return sorted(listed, key=lambda pod: str(pod["metadata"]["name"]))

    def apply(self, path: Path) -> None:
        """Apply a file of ours, moved to this namespace, with the image that is tried."""
        documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
        for document in documents:
            document["metadata"]["namespace"] = self.namespace
            for container in document["spec"].get("containers", []):
                container["image"] = self.image
        self.kubectl("apply", "--filename", "-", stdin=yaml.safe_dump_all(documents))

    def on_volume(self, script: str) -> str:
        """What a shell script prints that runs in the folder of runs on the volume."""
        if not self.kubectl("get", "pod", "rlhf-volume", "--ignore-not-found"):
            self.apply(VOLUME_POD)
            self.kubectl("wait", "--for=condition=Ready", "pod/rlhf-volume", "--timeout=180s")
        return self.kubectl("exec", "rlhf-volume", "--", "sh", "-ec", script)

    def in_pod(self, pod: str, script: Path, *arguments: str) -> str:
        """What a Python script of ours prints that runs in a pod."""
        return self.kubectl("exec", pod, "--", "python", "-c", script.read_text(encoding="utf-8"), *arguments)


class Running:
    """A command at work; stopped at the end of a `with` block that leaves it so."""

    def __init__(self, command: list[str], place: Place) -> None:
        self._started = time.monotonic()
        self.process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=place.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.communicate()

    def until(self, found: Callable[[], Any], *, what: str, seconds: float = 120) -> Any:
        """Look until something true is found while the command is at work, and return it."""

        def look() -> Any:
            assert self.process.poll() is None, f"it ended before there was a {what}:\n{self.ended(10).err}"
            return found()

        return until(look, what=what, seconds=seconds)

    def ended(self, seconds: float = 600) -> Ended:
        """Wait for its end."""
        out, err = self.process.communicate(timeout=seconds)
        return Ended(self.process.returncode, out, err, time.monotonic() - self._started)


def until(found: Callable[[], Any], *, what: str, seconds: float = 120) -> Any:
    """Look until something true is found, and return it."""
    deadline = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < deadline, f"no {what} within {seconds:g} seconds"
        time.sleep(LOOK_EVERY_SECONDS)
    return result
