"""The run directory: what a stage publishes, whole or not at all, and what a reader may trust.

    <run>/<stage>/step-00000400/   files, and manifest.json with their sizes and sha256
    <run>/<stage>/{latest,best,final}   relative links to such a directory

A directory is written beside its place, synced, and renamed; a link is swapped atomically. A reader
trusts only what the manifest confirms and falls back to the step before.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rlhf.errors import PrerequisiteError, RlhfError, StorageError, UsageError
from rlhf.processes import is_first_process

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STEP_NAME = re.compile(r"step-(\d{8})")
UNFINISHED = ".unfinished-"
REFUSALS = {
    errno.ENOSPC: "the volume is full: free space or enlarge it",
    errno.EDQUOT: "the quota is used up: free space or raise it",
    errno.EROFS: "the volume is read-only: mount it writable",
    errno.EACCES: "permission denied: let this user write there",
    errno.EIO: "input/output error: check the volume",
}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class DamagedCheckpoint(RlhfError):
    """A directory is not what its manifest says."""


def run_directory(runs_dir: Path, run: str) -> Path:
    """The directory of a run; a name that could leave `runs_dir` is refused with UsageError."""
    if not NAME.fullmatch(run):
        raise UsageError(
            f"--run {run[:120]!r} is not a run name; use up to 100 letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit"
        )
    return runs_dir / run


def run_first(stage: str, run: str) -> str:
    """What to do about a stage that has not finished: by `make` where we are a pod, else by our own command."""
    in_a_pod = "KUBERNETES_SERVICE_HOST" in os.environ
    command = f"make deploy-{stage}" if in_a_pod else f"python -m rlhf {stage} --run {run}"
    return f"run `{command}` first"


class StageDir:
    """What one stage of a run has published."""

    def __init__(self, run_dir: Path, stage: str) -> None:
        self.run_dir = run_dir
        self.stage = stage
        self.path = run_dir / stage

    def is_final(self) -> bool:
        """Whether the stage has finished; does not read the files again."""
        return (self.path / "final" / MANIFEST).is_file()

    def final(self) -> Path:
        """The finished, verified directory; of many processes the first reads all of it, the others trust it.

        Raises PrerequisiteError naming the command that makes it.
        """
        return self._final(contents=is_first_process())

    def final_at_a_glance(self) -> Path:
        """As `final`, but only the sizes of the files are looked at: seconds for any model."""
        return self._final(contents=False)

    def _final(self, *, contents: bool) -> Path:
        final, remedy = self.path / "final", run_first(self.stage, self.run_dir.name)
        if not self.is_final():
            raise PrerequisiteError(f"{final} does not exist; {remedy}")
        try:
            verify(final, contents=contents)
        except DamagedCheckpoint as damage:
            raise PrerequisiteError(f"{damage}; move {final.resolve()} aside, then {remedy}") from damage
        return final

    def latest(self) -> tuple[int, Path] | None:
        """The newest step that verifies, with its number; damaged ones are reported and passed over."""
        for step, directory in reversed(self.steps()):
            try:
                verify(directory)
            except DamagedCheckpoint as damage:
                logger.warning("passing over a damaged checkpoint: %s", damage)
            else:
                return step, directory
        return None

    def steps(self) -> list[tuple[int, Path]]:
        """Published steps, oldest first, verified or not."""
        if not self.path.is_dir():
            return []
        matches = ((STEP_NAME.fullmatch(p.name), p) for p in self.path.iterdir() if not p.is_symlink())
        return sorted((int(m[1]), p) for m, p in matches if m)

    @contextmanager
    def publish(self, step: int, *, final: bool = False, best: bool = False) -> Iterator[Path]:
        """Yield an empty directory to write into; when the block ends well it becomes `step`.

        Raises StorageError when the volume refuses a write; nothing published before is touched.
        """
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            work = self.path / unfinished_name(f"{step:08d}")
            work.mkdir()
        try:
            with storage_errors(self.path):
                yield work
                self.adopt(work, step, final=final, best=best)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise

    def adopt(self, directory: Path, step: int, *, final: bool = False, best: bool = False) -> Path:
        """Publish a directory on the same volume that is fully written already; it is moved."""
        with storage_errors(self.path):
            write_manifest(directory, step=step, stage=self.stage)
            target = self.path / f"step-{step:08d}"
            if target.exists():
                discarded = self.path / unfinished_name(f"replaced-{step:08d}")
                os.rename(target, discarded)
                os.rename(directory, target)
                shutil.rmtree(discarded, ignore_errors=True)
            else:
                os.rename(directory, target)
            _sync(self.path)
            for name, wanted in (("latest", True), ("best", best), ("final", final)):
                if wanted:
                    self.point(name, step)
        logger.info("saved stage=%s step=%d path=%s", self.stage, step, target)
        return target

    def point(self, name: str, step: int) -> None:
        """Make the link `name` lead to a published step."""
        link = self.path / unfinished_name(name)
        link.symlink_to(f"step-{step:08d}")
        os.replace(link, self.path / name)
        _sync(self.path)

    def prune(self, keep: int) -> None:
        """Remove all but the newest `keep` steps and those that `best` or `final` name."""
        named = {(self.path / name).resolve().name for name in ("best", "final") if (self.path / name).exists()}
        for _, directory in self.steps()[:-keep]:
            if directory.name not in named:
                shutil.rmtree(directory)

    def remove_unfinished(self) -> None:
        """Clear what a killed process left half-written."""
        if self.path.is_dir():
            for leftover in self.path.glob(f"{UNFINISHED}*"):
                if leftover.is_symlink():
                    leftover.unlink()
                else:
                    shutil.rmtree(leftover, ignore_errors=True)


def unfinished_name(name: str) -> str:
    """A name to write under first, of nobody else's: on a shared volume pods have the same process ids."""
    return f"{UNFINISHED}{name}-{uuid.uuid4().hex[:12]}"


def write_manifest(directory: Path, *, step: int, stage: str) -> None:
    """List every file with size and sha256, syncing each to the disk."""
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST):
        # safetensors writes for the owner alone; whoever may read the volume may read what is published on it.
        path.chmod(path.stat().st_mode | 0o444)
        files[path.relative_to(directory).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
        _sync(path)
    manifest = {"stage": stage, "step": step, "files": files}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync(directory / MANIFEST)
    for folder in [directory, *(p for p in directory.rglob("*") if p.is_dir())]:
        _sync(folder)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a published directory; raises DamagedCheckpoint."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest["files"], dict) or not isinstance(manifest["step"], int):
            raise TypeError("wrong types")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{directory / MANIFEST} is missing or unreadable") from error
    return manifest


def verify(directory: Path, *, contents: bool = True) -> None:
    """Hold every file against the manifest; raises DamagedCheckpoint naming the first that differs.

    Without contents, files are not read: only what is missing or has another size is found.
    """
    for name, entry in read_manifest(directory)["files"].items():
        path = directory / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{path} is missing")
        if path.stat().st_size != entry["size"]:
            raise DamagedCheckpoint(f"{path} has {path.stat().st_size} bytes instead of {entry['size']}")
        if contents and sha256(path) != entry["sha256"]:
            raise DamagedCheckpoint(f"{path} has changed since it was written (sha256 differs)")


def fingerprint(directory: Path) -> str:
    """One sha256 for a published directory: that of its manifest's file list."""
    files = read_manifest(directory)["files"]
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text_atomically(path: Path, text: str) -> None:
    """Replace a file so that a reader sees the old text or the new, never a part."""
    with storage_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(unfinished_name(path.name))
        beside.write_text(text, encoding="utf-8")
        _sync(beside)
        os.replace(beside, path)


@contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Turn what a volume can refuse into a StorageError of one clear line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = REFUSALS.get(_error_number(error))
        if reason is None:
            raise
        raise StorageError(f"cannot write below {where}: {reason}; what was saved before is still good") from error


def _error_number(error: OSError | SafetensorError) -> int:
    if isinstance(error, OSError):
        return error.errno or 0
    # safetensors' own error names the number only in its text.
    match = re.search(r"os error (\d+)", str(error))
    return int(match[1]) if match else 0


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
