"""An overlay as a list of documents: `kubectl kustomize` in a child process."""

from __future__ import annotations

import difflib
import shutil
import subprocess
from pathlib import Path

import yaml

from rlhf.cluster.documents import Document
from rlhf.errors import ConfigError, UnavailableError, UsageError

KUSTOMIZE_SECONDS = 60
KUSTOMIZATION_FILES = ("kustomization.yaml", "kustomization.yml", "Kustomization")


def manifests_folder(given: Path | None) -> Path:
    """The folder of manifests: the one named, else `k8s/` beside the package, as in a checkout.

    Raises UsageError where there is none.
    """
    folder = given or Path(__file__).resolve().parents[2] / "k8s"
    if not (folder / "overlays").is_dir():
        raise UsageError(
            f"no manifests at {folder}: the package alone brings none; run this in a checkout of the project, "
            "or name its k8s folder with --manifests"
        )
    return folder


def overlay_folder(overlay: str, given: Path | None) -> Path:
    """The folder of an overlay, from its name below `overlays/` or its path.

    Raises UsageError for one that is not there, with the nearest name.
    """
    path = Path(overlay)
    if _is_kustomization(path) and (path.is_absolute() or len(path.parts) > 1 or overlay.startswith(".")):
        return path
    overlays = manifests_folder(given) / "overlays"
    if _is_kustomization(overlays / overlay):
        return overlays / overlay
    names = sorted(folder.name for folder in overlays.iterdir() if _is_kustomization(folder))
    near = difflib.get_close_matches(overlay, names, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}; or give a folder, ./mine say"
    raise UsageError(f"--overlay {overlay}: no such overlay; {remedy}")


def _is_kustomization(folder: Path) -> bool:
    return any((folder / name).is_file() for name in KUSTOMIZATION_FILES)


def kustomize(folder: Path) -> list[Document]:
    """The documents that an overlay makes.

    Raises UnavailableError without kubectl, ConfigError where the overlay is wrong, with kubectl's words.
    """
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise UnavailableError("kubectl is not on the PATH: it renders the manifests; install version 1.29 or newer")
    command = [kubectl, "kustomize", str(folder)]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=KUSTOMIZE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"{' '.join(command)} did not run: {error}") from error
    if done.returncode:
        words = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise ConfigError(f"overlay {folder} cannot be rendered; `{' '.join(command)}` says: {words}")
    return [document for document in yaml.safe_load_all(done.stdout) if document]
