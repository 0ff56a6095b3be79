"""The run directory: what a stage publishes, whole or not at all, and what a reader may trust.

    <run>/<stage>/step-00000400/   files, and manifest.json with their sizes and sha256
    <run>/<stage>/{latest,best,final}   relative links to such a directory

A directory is written in the writer's room (`rlhf/lease.py`), synced, and renamed; a link is swapped atomically. A
step that is published again becomes `step-00000400.1`: nothing that is there is ever replaced in place. A reader
trusts only what the manifest confirms and falls back to the step before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from rlhf.errors import PrerequisiteError, RlhfError, UsageError
from rlhf.lease import Lease
from rlhf.processes import is_first_process
from rlhf.storage import UNFINISHED, remove, sha256, storage_errors, sync, unfinished_name, write_synced

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
CONFIG_FILE = "config.yaml"
DAMAGED = "damaged"
STEP_NAME = re.compile(r"step-(\d{8})(?:\.([1-9]\d{0,3}))?")
LINKS = ("latest", "best", "final")
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
    """What one stage of a run has published.

    With a lease, whatever becomes visible is renamed out of the holder's room and fails once the lease is lost;
    without one, as readers have it, `room` is the folder itself. settings go into every directory as config.yaml.
    """

    def __init__(self, run_dir: Path, stage: str, *, lease: Lease | None = None, settings: str | None = None) -> None:
        self.run_dir = run_dir
        self.stage = stage
        self.path = run_dir / stage
        self.room = lease.room if lease else self.path
        self._lease, self._settings = lease, settings

    def is_final(self) -> bool:
        """Whether the stage has finished; does not read the files again."""
        return (self.path / "final" / MANIFEST).is_file()

    def is_whole(self) -> bool:
        """Whether the stage has finished and its files are all there, by their sizes; damage is reported."""
        if not self.is_final():
            return False
        try:
            verify(self.path / "final", contents=False)
        except DamagedCheckpoint as damage:
            logger.warning("stage %s has finished and is damaged: %s", self.stage, damage)
            return False
        return True

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
            raise PrerequisiteError(f"{damage}; {repair(self.run_dir.name)}, then {remedy}") from damage
        return final

    def latest(self) -> tuple[int, Path] | None:
        """The newest step that verifies, with its number; None where the stage has not saved any.

        Damaged ones are reported; who holds the lease sets them aside. Raises PrerequisiteError when none is good.
        """
        listed, damaged = self.steps(), list[Path]()
        for step, directory in reversed(listed):
            try:
                verify(directory)
            except DamagedCheckpoint as damage:
                logger.warning("passing over a damaged checkpoint: %s", damage)
                damaged.append(directory)
                continue
            if self._lease:
                for other in damaged:
                    self.set_aside(other)
            if (named := self.named("latest")) and not (self.path / named).exists():
                logger.warning("%s leads nowhere; going on from %s", self.path / "latest", directory.name)
            return step, directory
        self.check()
        if self.steps() != listed:  # somebody has published and pruned while we looked
            return self.latest()
        if damaged or self.named("latest"):
            what = f"none of the {len(damaged)} checkpoints is good" if damaged else "`latest` leads nowhere"
            raise PrerequisiteError(
                f"{self.path}: {what}; bring one back from a copy, or {repair(self.run_dir.name)} "
                f"and run stage {self.stage} again from its beginning"
            )
        return None

    def steps(self) -> list[tuple[int, Path]]:
        """Published steps with all their revisions, oldest first, verified or not."""
        if not self.path.is_dir():
            return []
        matches = ((STEP_NAME.fullmatch(p.name), p) for p in self.path.iterdir() if not p.is_symlink())
        found = sorted((int(m[1]), int(m[2] or 0), p) for m, p in matches if m)
        return [(step, path) for step, _, path in found]

    @contextmanager
    def publish(self, step: int, *, final: bool = False, best: bool = False) -> Iterator[Path]:
        """Yield an empty directory to write into; when the block ends well it becomes `step`.

        Raises StorageError when the volume refuses a write, LeaseLost when another process has taken over; nothing
        published before is touched.
        """
        work = self.room / unfinished_name(f"{step:08d}")
        try:
            with self._writing():
                if self._lease is None:
                    self.path.mkdir(parents=True, exist_ok=True)
                work.mkdir()
                yield work
                self.adopt(work, step, final=final, best=best)
        except BaseException:
            remove(work)
            raise

    def adopt(self, directory: Path, step: int, *, final: bool = False, best: bool = False) -> Path:
        """Publish a directory in the room that is fully written already; it is moved."""
        with self._writing():
            if self._settings is not None:
                (directory / CONFIG_FILE).write_text(self._settings, encoding="utf-8")
            write_manifest(directory, step=step, stage=self.stage)
            target = self._free_name(step)
            self._show(directory, target)
            sync(self.path)
        for name, wanted in (("latest", True), ("best", best), ("final", final)):
            if wanted:
                self.point(name, target.name)
        logger.info("saved stage=%s step=%d path=%s", self.stage, step, target)
        return target

    def point(self, name: str, target: str) -> None:
        """Make the link `name` lead to a published directory, given by its name."""
        link = self.room / unfinished_name(name)
        try:
            with self._writing():
                link.symlink_to(target)
                self._show(link, self.path / name)
                sync(self.path)
        except BaseException:
            remove(link)
            raise

    def prune(self, keep: int) -> None:
        """Remove all but the newest `keep` steps and what a link names; of a step published again, the older ones."""
        with self._writing():
            named = {self.named(name) for name in LINKS}
        newest = list(dict(self.steps()).values())[-keep:]
        for _, directory in self.steps():
            if directory not in newest and directory.name not in named:
                with self._writing():
                    remove(self._hide(directory))

    def set_aside(self, directory: Path) -> Path:
        """Move a damaged directory out of the way, into `damaged/`; nothing is deleted."""
        aside = self.path / DAMAGED / f"{directory.name}-{uuid.uuid4().hex[:6]}"
        self.check()
        with self._writing():
            aside.parent.mkdir(exist_ok=True)
            # In one step: what lay in the room in between would be cleared away after a crash.
            os.rename(directory, aside)
            sync(self.path)
        logger.info("set aside %s as %s", directory, aside)
        return aside

    def named(self, link: str) -> str | None:
        """What a link leads to, a name in this folder; None where there is no such link.

        Raises OSError when it cannot be read, since what it names must not be taken for unnamed.
        """
        try:
            return os.readlink(self.path / link)
        except FileNotFoundError:
            return None

    def unlink(self, name: str) -> None:
        """Remove a link, if it is there."""
        with self._writing():
            if self.named(name):
                remove(self._hide(self.path / name))

    def write_text(self, name: str, text: str) -> None:
        """Replace a file of the stage's folder atomically; name may hold a folder.

        Raises StorageError, and LeaseLost.
        """
        self.rewrite(name, text).close()

    def rewrite(self, name: str, text: str) -> FileIO:
        """As `write_text`; gives the new file, open to append to.

        It is a file of its own: what the writer before this one still appends goes to the old one, which is gone.
        """
        target, beside = self.path / name, self.room / unfinished_name(Path(name).name)
        with ExitStack() as undo, self._writing():
            undo.callback(remove, beside)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_synced(beside, text)
            file = undo.enter_context(FileIO(beside, "a"))
            self._show(beside, target)
            sync(target.parent)
            undo.pop_all()
        return file

    def remove_unfinished(self) -> None:
        """Clear what a killed process left half-written."""
        for leftover in self.path.glob(f"{UNFINISHED}*"):
            with self._writing(), suppress(FileNotFoundError):
                remove(self._hide(leftover))

    def check(self) -> None:
        """Raise LeaseLost when another process has taken the stage over."""
        if self._lease:
            self._lease.check()

    def _free_name(self, step: int) -> Path:
        taken = {directory.name for _, directory in self.steps()}
        revision, name = 0, f"step-{step:08d}"
        while name in taken:
            revision += 1
            name = f"step-{step:08d}.{revision}"
        return self.path / name

    def _show(self, work: Path, target: Path) -> None:
        if self._lease:
            self._lease.show(work.name, target)
        else:
            os.rename(work, target)

    def _hide(self, path: Path) -> Path:
        hidden = self.room / unfinished_name(path.name)
        if self._lease:
            self._lease.hide(path, hidden.name)
        else:
            os.rename(path, hidden)
        return hidden

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn what the volume refuses into StorageError, and what fails for want of the lease into LeaseLost."""
        try:
            with storage_errors(self.path):
                yield
        except Exception:
            self.check()
            raise


def repair(run: str) -> str:
    """What to do about damage."""
    return f"run `python -m rlhf verify {run} --repair`, which moves damaged directories aside"


def write_manifest(directory: Path, *, step: int, stage: str) -> None:
    """List every file with size and sha256, syncing each to the disk."""
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST):
        # safetensors writes for the owner alone; whoever may read the volume may read what is published on it.
        path.chmod(path.stat().st_mode | 0o444)
        files[path.relative_to(directory).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
        sync(path)
    manifest = {"stage": stage, "step": step, "files": files}
    write_synced(directory / MANIFEST, json.dumps(manifest, indent=1))
    for folder in [directory, *(p for p in directory.rglob("*") if p.is_dir())]:
        sync(folder)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a published directory; raises DamagedCheckpoint for one that is missing or not ours.

    Raises StorageError when the volume refuses to be read: that says nothing about the directory.
    """
    try:
        with storage_errors(directory, doing="read"):
            manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        whole = (
            type(manifest["step"]) is int
            and isinstance(manifest["stage"], str)
            and all(_is_entry(name, entry) for name, entry in manifest["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{directory / MANIFEST} is missing or unreadable") from error
    if not whole:
        raise DamagedCheckpoint(f"{directory / MANIFEST} is not a manifest of this project")
    return manifest


def _is_entry(name: str, entry: Any) -> bool:
    """Whether a line of a manifest names a file inside its directory, a size and a digest."""
    inside = name.isprintable() and not name.startswith("/") and ".." not in name.split("/")
    return inside and type(entry["size"]) is int and isinstance(entry["sha256"], str)


def verify(directory: Path, *, contents: bool = True) -> None:
    """Hold every file against the manifest; raises DamagedCheckpoint naming the first that differs, and StorageError.

    Without contents, files are not read: only what is missing or has another size is found.
    """
    for name, entry in read_manifest(directory)["files"].items():
        path = directory / name
        try:
            with storage_errors(directory, doing="read"):
                size = path.stat().st_size
                changed = size == entry["size"] and contents and sha256(path) != entry["sha256"]
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DamagedCheckpoint(f"{path} is missing") from error
        except (OSError, ValueError) as error:
            raise DamagedCheckpoint(f"{path} cannot be read: {error}") from error
        if size != entry["size"]:
            raise DamagedCheckpoint(f"{path} has {size} bytes instead of {entry['size']}")
        if changed:
            raise DamagedCheckpoint(f"{path} has changed since it was written (sha256 differs)")


def fingerprint(directory: Path) -> str:
    """One sha256 for a published directory: that of its manifest's file list."""
    files = read_manifest(directory)["files"]
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
