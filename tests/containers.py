"""Containers for tests: of docker where its engine runs, else of buildah and an OCI runtime, which need no engine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

USER = 10001


@dataclass(frozen=True)
class Spec:
    """What to run in the image, and with what: the root is read-only, /tmp fresh, and `runs` is mounted at /runs.

    Without `command` the image's entrypoint runs with `arguments`. Only with `network` there is one: the machine's.
    """

    arguments: Sequence[str] = ()
    command: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    runs: Path | None = None
    user: int = USER
    network: bool = False


@dataclass(frozen=True)
class Container:
    """A container that was started; its process ends with the container's exit code."""

    name: str
    process: subprocess.Popen[str]


class Engine(Protocol):
    """What tests want of an engine."""

    def config(self) -> dict[str, Any]:
        """The image's configuration, as OCI's image specification names its fields."""

    def start(self, spec: Spec) -> Container:
        """Start a container; it is removed when it ends."""

    def execute(self, container: Container, *command: str) -> str:
        """What a command beside the container's own says."""

    def signal(self, container: Container, name: str) -> None:
        """Send the container's first process a signal, "TERM" say."""

    def close(self) -> None:
        """Remove what was made beside the image."""


def run(engine: Engine, spec: Spec, *, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a container to its end."""
    container = engine.start(spec)
    try:
        output, error = container.process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        engine.signal(container, "KILL")
        output, error = container.process.communicate()
        raise AssertionError(f"{spec} did not end within {seconds} seconds:\n{output}{error}") from None
    return subprocess.CompletedProcess(spec.arguments, container.process.returncode, output, error)


def lacking() -> str | None:
    """What this machine lacks to run containers; None where it lacks nothing."""
    if docker_runs():
        return None
    if not (shutil.which("buildah") and _runtime()):
        return "neither docker's engine nor buildah with runc or crun is here; install one of them"
    return None if os.geteuid() == 0 else "buildah's images can be mounted by root alone; run as root, or start docker"


def docker_runs() -> bool:
    """Whether docker is here and its engine answers."""
    if not shutil.which("docker"):
        return False
    return subprocess.run(["docker", "info"], check=False, capture_output=True).returncode == 0


def open_engine(image: str) -> Engine:
    """The engine that this machine has, for containers of one image."""
    return Docker(image) if docker_runs() else Buildah(image)


class Docker:
    """Containers of docker."""

    def __init__(self, image: str) -> None:
        self._image = image

    def config(self) -> dict[str, Any]:
        """See Engine."""
        return dict(json.loads(_said("docker", "image", "inspect", self._image, "--format", "{{json .Config}}")))

    def start(self, spec: Spec) -> Container:
        """See Engine."""
        name = f"rlhf-test-{uuid.uuid4().hex}"
        command = ["docker", "run", "--rm", "--name", name, "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL"]
        command += ["--security-opt", "no-new-privileges", "--network", "host" if spec.network else "none"]
        command += ["--user", f"{spec.user}:{spec.user}"]
        command += [word for item in spec.environment.items() for word in ("--env", "=".join(item))]
        command += ["--volume", f"{spec.runs}:/runs"] if spec.runs else []
        command += ["--entrypoint", spec.command[0]] if spec.command else []
        return Container(name, _started([*command, self._image, *spec.command[1:], *spec.arguments]))

    def execute(self, container: Container, *command: str) -> str:
        """See Engine."""
        return _said("docker", "exec", container.name, *command)

    def signal(self, container: Container, name: str) -> None:
        """See Engine."""
        _said("docker", "kill", "--signal", name, container.name)

    def close(self) -> None:
        """See Engine."""


class Buildah:
    """Containers of runc or crun in buildah's image, mounted once and never written."""

    def __init__(self, image: str) -> None:
        self._image = image
        self._stack = ExitStack()
        working = _said("buildah", "from", "--pull-never", image).strip()
        self._stack.callback(_said, "buildah", "rm", working)
        self._root = _said("buildah", "mount", working).strip()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._runtime = [_runtime(), "--root", str(self._folder / "state")]

    def config(self) -> dict[str, Any]:
        """See Engine."""
        return dict(json.loads(_said("buildah", "inspect", "--type", "image", self._image))["OCIv1"]["config"])

    def start(self, spec: Spec) -> Container:
        """See Engine."""
        name = uuid.uuid4().hex
        bundle = self._folder / name
        bundle.mkdir()
        (bundle / "config.json").write_text(json.dumps(self._bundle(spec)), encoding="utf-8")
        return Container(name, _started([*self._runtime, "run", "--bundle", str(bundle), name]))

    def _bundle(self, spec: Spec) -> dict[str, Any]:
        """The runtime's own description of a container, of OCI's runtime specification."""
        image = self.config()
        environment = dict(pair.split("=", 1) for pair in image["Env"]) | spec.environment
        tmpfs = {"type": "tmpfs", "source": "tmpfs"}
        mounts: list[dict[str, Any]] = [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", **tmpfs, "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/shm", **tmpfs, "options": ["nosuid", "nodev", "mode=1777"]},
            {"destination": "/tmp", **tmpfs, "options": ["nosuid", "nodev", "mode=1777"]},
        ]
        if spec.runs:
            mounts.append({"destination": "/runs", "type": "bind", "source": str(spec.runs), "options": ["rbind"]})
        kinds = ["pid", "mount", "ipc", "uts", *([] if spec.network else ["network"])]
        return {
            "ociVersion": "1.0.2",
            "root": {"path": self._root, "readonly": True},
            "process": {
                "user": {"uid": spec.user, "gid": spec.user},
                "args": [*(spec.command or image["Entrypoint"]), *spec.arguments],
                "env": ["=".join(item) for item in environment.items()],
                "cwd": image["WorkingDir"],
                "noNewPrivileges": True,
            },
            "mounts": mounts,
            "linux": {"namespaces": [{"type": kind} for kind in kinds]},
        }

    def execute(self, container: Container, *command: str) -> str:
        """See Engine."""
        return _said(*self._runtime, "exec", container.name, *command)

    def signal(self, container: Container, name: str) -> None:
        """See Engine."""
        _said(*self._runtime, "kill", container.name, name)

    def close(self) -> None:
        """See Engine."""
        self._stack.close()


def _runtime() -> str:
    return shutil.which("runc") or shutil.which("crun") or ""


def _started(command: list[str]) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)


def _said(*command: str) -> str:
    """What a command prints; an AssertionError with what it complained of when it fails."""
    answer = subprocess.run(command, check=False, capture_output=True, text=True)
    assert answer.returncode == 0, f"{' '.join(command)}: {answer.stderr}"
    return answer.stdout
