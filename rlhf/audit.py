"""`rlhf verify RUN`: everything that a run's stages have published, held against what was written down then.

    sft      step-00001500   ok          9 files, 12.3 MB
    sft      step-00001000   damaged     model.safetensors has 40 bytes instead of 2211840
    sft      latest          damaged     leads to step-00001000, which is damaged

Damage is a directory that is not what its manifest says, a file in it that the manifest does not list, a link that
leads elsewhere than it should, a JSON file or a line of one that cannot be read. What killed processes left behind is
told but is no damage: the next start clears it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from rlhf.broken_texts import BrokenText, broken_text, texts_of
from rlhf.checkpoint import LINKS, MANIFEST, STEP_NAME, DamagedCheckpoint, StageDir, read_manifest
from rlhf.errors import DataError, PrerequisiteError, StorageError
from rlhf.lease import FENCED, ROOM, is_dead, look
from rlhf.pipeline import STAGE_NAMES
from rlhf.storage import REFUSALS, UNFINISHED, storage_errors

Say: TypeAlias = Callable[[str], None]

PIECE_BYTES = 4 << 20
SECONDS_BETWEEN_LINES = 20.0
"""How often a long reading says how far it is."""
SHOWN = 3
"""Problems of one directory that its line names."""


class InputOutputError(Exception):
    """EIO: a hiccup of the volume, or a broken place on the disk."""


@dataclass(frozen=True)
class Published:
    """A published directory: what is wrong with it, and the files in it that its manifest does not list."""

    path: Path
    files: int = 0
    size: int = 0
    problems: tuple[str, ...] = ()
    unlisted: tuple[Path, ...] = ()


@dataclass
class StageAudit:
    """What was found in a stage's folder; links holds a problem by the link's name."""

    stage: StageDir
    published: list[Published] = field(default_factory=list)
    texts: list[BrokenText] = field(default_factory=list)
    links: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def good(self) -> list[Path]:
        """Directories that are what their manifests say, oldest first."""
        return [one.path for one in self.published if not one.problems]

    @property
    def damages(self) -> int:
        """How many things are wrong."""
        wrong = sum(bool(one.problems) + len(one.unlisted) for one in self.published)
        return wrong + len(self.texts) + len(self.links)


class Reader:
    """Hashes files piece by piece, and says now and then how much it has read."""

    def __init__(self, say: Say) -> None:
        self._say, self._bytes, self._spoke = say, 0, time.monotonic()

    def sha256(self, path: Path) -> str:
        """Hex digest of a file."""
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
                self._bytes += len(piece)
                if time.monotonic() - self._spoke > SECONDS_BETWEEN_LINES:
                    self._spoke = time.monotonic()
                    self._say(f"… {readable_size(self._bytes)} read, now at {path}")
        return digest.hexdigest()


def verify_run(run_dir: Path, *, say: Say) -> int:
    """Hold a run against its manifests, saying a line for each directory and problem; 0: all is good, 65: it is not.

    Writes nothing. Raises PrerequisiteError (66) where there is no run, StorageError where it may not be read.
    """
    reader, audits = Reader(say), []
    with storage_errors(run_dir, doing="read"):
        for stage in stages_of(run_dir):
            audits.append(audit_stage(stage, reader))
            describe(audits[-1], say)
    say(summary(audits))
    return DataError.exit_code if any(audit.damages for audit in audits) else 0


def stages_of(run_dir: Path) -> list[StageDir]:
    """The stages that a run has begun. Raises PrerequisiteError when there is none."""
    stages = [StageDir(run_dir, name) for name in STAGE_NAMES if (run_dir / name).is_dir()]
    if not stages:
        raise PrerequisiteError(
            f"{run_dir} holds no run; look at --runs-dir, or begin it: `python -m rlhf run --run {run_dir.name}`"
        )
    return stages


def audit_stage(stage: StageDir, reader: Reader) -> StageAudit:
    """Look at everything in a stage's folder, while its writer may go on.

    Directories that are pruned meanwhile are passed over, those that are published meanwhile looked at as well.
    Raises StorageError for what may not be read.
    """
    try:
        audit = StageAudit(stage, notes=list(_leftovers(stage.path)))
        found: dict[str, Published] = {}
        while new := [(step, path) for step, path in stage.steps() if path.name not in found]:
            for step, path in new:
                found[path.name] = Published(path, problems=("is gone",))
                with suppress(FileNotFoundError):
                    found[path.name] = _audit_directory(path, stage.stage, step, reader)
        audit.published = [found[path.name] for _, path in stage.steps() if path.name in found]
        audit.texts = [broken for path in texts_of(stage.path) if (broken := broken_text(path, audit.notes))]
        audit.links = check_links(audit)
    except PermissionError as error:
        raise StorageError(f"cannot read {error.filename}: permission denied; let this user read it") from error
    return audit


def check_links(audit: StageAudit) -> dict[str, str]:
    """What is wrong with `latest`, `best` and `final`, by name."""
    folder, good = audit.stage.path, [path.name for path in audit.good]
    problems = {}
    for name in LINKS:
        link = folder / name
        if not os.path.lexists(link):
            if name == "latest" and good:
                problems[name] = f"is missing; the newest good directory is {good[-1]}"
        elif not link.is_symlink():
            problems[name] = "is not a link"
        elif (target := os.readlink(link)) not in good:
            there = STEP_NAME.fullmatch(target) and os.path.lexists(folder / target)
            problems[name] = f"leads to {target}, which is {'damaged' if there else 'not there'}"
        elif name == "latest" and target != good[-1]:
            problems[name] = f"leads to {target}; the newest good directory is {good[-1]}"
    return problems


def describe(audit: StageAudit, say: Say) -> None:
    """Say a line for each directory of a stage, and for each thing that is wrong or left over."""
    name, folder = audit.stage.stage, audit.stage.path
    for one in audit.published:
        amount = f"{one.files} files, {readable_size(one.size)}"
        say(line(name, one.path.name, "damaged" if one.problems else "ok", _shortened(one.problems) or amount))
        for path in one.unlisted:
            say(line(name, str(path.relative_to(folder)), "damaged", "is not in the manifest"))
    for text in audit.texts:
        say(line(name, str(text.path.relative_to(folder)), "damaged", text.problem))
    for link, problem in audit.links.items():
        say(line(name, link, "damaged", problem))
    for note in audit.notes:
        say(line(name, "", "note", note))


def summary(audits: list[StageAudit]) -> str:
    """One line on all stages."""
    published = [one for audit in audits for one in audit.published]
    damages = sum(audit.damages for audit in audits)
    amount = readable_size(sum(one.size for one in published))
    verdict = f"{damages} damaged, see above; `--repair` moves them aside" if damages else "all good"
    return (
        f"{len(audits)} stages, {len(published)} directories, {sum(one.files for one in published)} files, "
        f"{amount}: {verdict}"
    )


def line(stage: str, name: str, verdict: str, text: str) -> str:
    """A line of the output."""
    return f"{stage:<8} {name:<20} {verdict:<8} {text}"


def readable_size(size: int) -> str:
    """Bytes for people."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


def _audit_directory(path: Path, stage: str, step: int, reader: Reader) -> Published:
    if path.is_dir() and not os.listdir(path):
        return Published(path, problems=("is empty",))
    try:
        manifest = read_manifest(path)
    except DamagedCheckpoint as damage:
        return Published(path, problems=(_relative(str(damage), path),))
    problems, listed = [], manifest["files"]
    if (manifest["stage"], manifest["step"]) != (stage, step):
        problems.append(f"{MANIFEST} is that of stage {manifest['stage']}, step {manifest['step']}")
    if not listed:
        problems.append(f"{MANIFEST} lists no files")
    for name, entry in listed.items():
        if problem := _file_problem(path / name, entry, reader):
            problems.append(f"{name} {problem}")
    here = (found for found in path.rglob("*") if not found.is_dir() and found.name != MANIFEST)
    # A network file system keeps a file that is deleted while open as .nfs…
    unlisted = [f for f in here if f.relative_to(path).as_posix() not in listed and not f.name.startswith(".nfs")]
    size = sum(entry["size"] for entry in listed.values())
    return Published(path, len(listed), size, tuple(problems), tuple(unlisted))


def _file_problem(path: Path, entry: dict[str, Any], reader: Reader) -> str:
    """What is wrong with a file; a volume that does not answer says nothing about it, and is an OSError."""
    try:
        with suppress(InputOutputError):
            return _difference(path, entry, reader)
        return _difference(path, entry, reader)  # a volume may fail once; a broken disk fails again
    except InputOutputError:
        return "cannot be read: input/output error"


def _difference(path: Path, entry: dict[str, Any], reader: Reader) -> str:
    """How a file differs from its manifest's line; empty where it does not."""
    try:
        size = path.stat().st_size
        if size != entry["size"]:
            return f"has {size} bytes instead of {entry['size']}"
        return "" if reader.sha256(path) == entry["sha256"] else "has changed since it was written (sha256 differs)"
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return "is missing"
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", None)
        if number == errno.EIO:
            raise InputOutputError from error
        if number in REFUSALS:
            raise
        return f"cannot be read: {error}"


def _leftovers(folder: Path) -> Iterator[str]:
    """What killed processes left, and who is at work."""
    sight = look(folder)
    if sight.claim and not sight.claim.released:
        who = f"process {sight.claim.holder.pid} on {sight.claim.holder.host}"
        dead = is_dead(sight.claim.holder)
        yield f"{who} was killed at work here" if dead else f"{who} is at work here, or was killed elsewhere"
    for path in sorted(folder.iterdir()):
        room = ROOM.fullmatch(path.name)
        if path.name.startswith((UNFINISHED, FENCED)) or (room and int(room[1]) < sight.token):
            yield f"{path.name} was left by a killed process; the next start removes it"


def _shortened(problems: tuple[str, ...]) -> str:
    more = len(problems) - SHOWN
    return "; ".join(problems[:SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _relative(message: str, path: Path) -> str:
    return message.replace(f"{path}{os.sep}", "")
