"""A Kubernetes control plane for the tests: the server's own programs, on this machine, without any node.

The folder KUBEBUILDER_ASSETS holds etcd and kube-apiserver, as envtest's `setup-envtest use -p path` brings them, and
perhaps kube-controller-manager and kube-scheduler beside them, from a Kubernetes release. Role-based access control and
Pod Security admission are on, as in any cluster.
"""

from __future__ import annotations

import base64
import os
import shutil
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

START_SECONDS = 90.0
ADMINISTRATOR, PERSON = "administrator", "deployer"
CONTROLLERS = (
    "job-controller", "deployment-controller", "replicaset-controller", "garbage-collector-controller",
    "serviceaccount-controller", "namespace-controller", "resourcequota-controller", "ttl-after-finished-controller",
    "disruption-controller", "persistentvolume-binder-controller",
)  # fmt: skip


class ControlPlane:
    """etcd, kube-apiserver and what else there is; every program writes its log into `folder`."""

    def __init__(self, assets: Path, folder: Path) -> None:
        self._assets, self.folder = assets, folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._etcd_port, self._peer_port, self._port = free_ports(3)
        self._tokens = {name: base64.b32encode(os.urandom(20)).decode() for name in (ADMINISTRATOR, PERSON)}

    def has(self, program: str) -> bool:
        """Whether a program is at hand."""
        return (self._assets / program).is_file()

    def start(self) -> None:
        """Start what there is, and return when it answers."""
        self._make_key()
        groups = {ADMINISTRATOR: ',"system:masters"', PERSON: ""}
        users = [f"{token},{name},{name}{groups[name]}\n" for name, token in self._tokens.items()]
        (self.folder / "tokens.csv").write_text("".join(users), encoding="utf-8")
        address = f"http://127.0.0.1:{self._etcd_port}"
        peers = f"http://127.0.0.1:{self._peer_port}"
        self._run(
            "etcd", f"--data-dir={self.folder / 'etcd'}", f"--listen-client-urls={address}",
            f"--advertise-client-urls={address}", f"--listen-peer-urls={peers}",
            f"--initial-advertise-peer-urls={peers}", f"--initial-cluster=default={peers}", "--unsafe-no-fsync",
        )  # fmt: skip
        self.start_server()
        for program, options in {
            "kube-controller-manager": [
                f"--controllers={','.join(CONTROLLERS)}",
                f"--service-account-private-key-file={self.folder / 'accounts.key'}",
                f"--root-ca-file={self.folder / 'certificates' / 'apiserver.crt'}",
            ],
            "kube-scheduler": [],
        }.items():
            if self.has(program):
                kubeconfig = f"--kubeconfig={self.kubeconfig(ADMINISTRATOR)}"
                self._run(program, kubeconfig, "--leader-elect=false", "--secure-port=0", *options)

    def start_server(self) -> None:
        """Start the API server alone, also after `kill_server`."""
        self._run(
            "kube-apiserver", f"--etcd-servers=http://127.0.0.1:{self._etcd_port}", f"--secure-port={self._port}",
            "--bind-address=127.0.0.1", f"--cert-dir={self.folder / 'certificates'}", "--authorization-mode=RBAC",
            f"--token-auth-file={self.folder / 'tokens.csv'}", "--service-cluster-ip-range=10.96.0.0/16",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={self.folder / 'accounts.key'}",
            f"--service-account-signing-key-file={self.folder / 'accounts.key'}",
            "--kubelet-preferred-address-types=InternalIP", "--allow-privileged=false",
        )  # fmt: skip
        self._wait_until_ready()

    def kill_server(self) -> None:
        """End the API server at once, as when its machine goes down."""
        process = self._processes.pop("kube-apiserver")
        process.kill()
        process.wait()

    def stop(self) -> None:
        """End everything."""
        for process in reversed(self._processes.values()):
            process.kill()
        for process in self._processes.values():
            process.wait()

    def kubeconfig(self, user: str) -> Path:
        """A kubeconfig of a user: ADMINISTRATOR may do everything, PERSON nothing until a RoleBinding says so."""
        certificate = (self.folder / "certificates" / "apiserver.crt").read_bytes()
        cluster = {
            "server": f"https://127.0.0.1:{self._port}",
            "certificate-authority-data": base64.b64encode(certificate).decode(),
        }
        config: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "tests", "cluster": cluster}],
            "users": [{"name": user, "user": {"token": self._tokens[user]}}],
            "contexts": [{"name": user, "context": {"cluster": "tests", "user": user}}],
            "current-context": user,
        }
        path = self.folder / f"{user}.kubeconfig"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return path

    def certificate(self) -> tuple[Path, Path]:
        """A certificate for 127.0.0.1 and its key."""
        folder = self.folder / "certificates"
        return folder / "apiserver.crt", folder / "apiserver.key"

    def _make_key(self) -> None:
        """The key that signs tokens of service accounts."""
        command = ["openssl", "genrsa", "-out", str(self.folder / "accounts.key"), "2048"]
        subprocess.run(command, check=True, capture_output=True)

    def _run(self, program: str, *options: str) -> None:
        with (self.folder / f"{program}.log").open("ab") as log:
            command = [str(self._assets / program), *options]
            self._processes[program] = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            process = self._processes["kube-apiserver"]
            if process.poll() is not None or time.monotonic() > deadline:
                log = (self.folder / "kube-apiserver.log").read_text(encoding="utf-8", errors="replace")
                raise RuntimeError(f"kube-apiserver does not come up:\n{log[-3000:]}")
            time.sleep(0.1)

    def _answers(self) -> bool:
        certificate = self.folder / "certificates" / "apiserver.crt"
        if not certificate.is_file():
            return False
        request = urllib.request.Request(
            f"https://127.0.0.1:{self._port}/readyz",
            headers={"Authorization": f"Bearer {self._tokens[ADMINISTRATOR]}"},
        )
        try:
            context = ssl.create_default_context(cafile=str(certificate))
            with urllib.request.urlopen(request, context=context, timeout=2) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError as error:  # not ready yet
            error.close()
            return False
        except (OSError, ValueError):
            return False


def free_ports(count: int) -> Sequence[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def assets_folder() -> Path | None:
    """The folder KUBEBUILDER_ASSETS, if it holds what is needed."""
    folder = Path(os.environ.get("KUBEBUILDER_ASSETS", "/usr/local/kubebuilder/bin"))
    complete = all((folder / name).is_file() for name in ("etcd", "kube-apiserver")) and shutil.which("openssl")
    return folder if complete else None
