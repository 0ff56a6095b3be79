"""`rlhf verify RUN --repair`: what is damaged goes to `<stage>/damaged/`, and the links lead to what is good.

Nothing that was published is deleted. What killed processes left half-written is cleared, as at every start of a
stage.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rlhf.audit import (
    Reader,
    Say,
    StageAudit,
    audit_stage,
    check_links,
    describe,
    line,
    stages_of,
    summary,
)
from rlhf.checkpoint import LINKS, DamagedCheckpoint, StageDir, fingerprint, run_first
from rlhf.config import RuntimeConfig
from rlhf.errors import DataError
from rlhf.lease import take_lease
from rlhf.storage import storage_errors


def repair_run(run_dir: Path, *, say: Say) -> int:
    """Verify a run and move what is damaged aside; says what it did and what to run next. 0: it is consistent now.

    It is the only writer meanwhile: raises LeaseHeld (75) naming the process that is at work on a stage. Raises
    PrerequisiteError (66) where there is no run, StorageError (74) where the volume refuses.
    """
    reader, audits = Reader(say), []
    with storage_errors(run_dir, doing="use"), ExitStack() as leases:
        # All of them before anything is moved, so that a stage at work leaves the whole run as it is.
        for found in stages_of(run_dir):
            lease = leases.enter_context(take_lease(found.path, seconds=RuntimeConfig().lease_seconds))
            audits.append(StageAudit(StageDir(run_dir, found.stage, lease=lease)))
        for number, empty in enumerate(audits):
            audits[number] = audit = audit_stage(empty.stage, reader)
            audit.notes.clear()  # of killed processes: the lease has cleared what they left, and is our own
            describe(audit, say)
            repair_stage(audit, say)
        for stage in (audit.stage for audit in audits):
            if not stage.is_final():
                say(line(stage.stage, "", "next", run_first(stage.stage, run_dir.name).removesuffix(" first")))
        say(summary(audits))
    return DataError.exit_code if any(audit.damages for audit in audits) else 0


def repair_stage(audit: StageAudit, say: Say) -> None:
    """Move aside what an audit found damaged, and make the links right; the audit tells afterwards what is left."""
    stage = audit.stage
    twins = {name: twin for name in LINKS if (twin := _twin(audit, name))}
    for one in audit.published:
        for path in (one.path,) if one.problems else one.unlisted:
            _move(stage, path, say)
    for text in audit.texts:
        _move(stage, text.path, say)
        if text.readable is not None:
            stage.write_text(str(text.path.relative_to(stage.path)), text.readable)
    audit.published = [replace(one, unlisted=()) for one in audit.published if not one.problems]
    audit.texts = []
    for name in audit.links:
        target = audit.good[-1].name if name == "latest" and audit.good else twins.get(name)
        _mend_link(stage, name, target, say)
    audit.links = check_links(audit)


def _twin(audit: StageAudit, name: str) -> str | None:
    """The newest revision with the very files of the damaged directory that a link names."""
    link = audit.stage.path / name
    damaged = {one.path.name: one.path for one in audit.published if one.problems}
    target = damaged.get(os.readlink(link)) if link.is_symlink() else None
    if target is None:
        return None
    try:
        wanted = fingerprint(target)
    except DamagedCheckpoint:
        return None
    step = target.name.partition(".")[0]
    revisions = [path for path in reversed(audit.good) if path.name.partition(".")[0] == step]
    return next((path.name for path in revisions if fingerprint(path) == wanted), None)


def _mend_link(stage: StageDir, name: str, target: str | None, say: Say) -> None:
    link = stage.path / name
    if os.path.lexists(link) and (target is None or not link.is_symlink()):
        _move(stage, link, say)
    if target is not None:
        stage.point(name, target)
        say(line(stage.stage, name, "repaired", f"leads to {target} now"))


def _move(stage: StageDir, path: Path, say: Say) -> None:
    aside = stage.set_aside(path)
    say(line(stage.stage, str(path.relative_to(stage.path)), "moved", f"to {aside.relative_to(stage.path)}"))
