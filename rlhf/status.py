"""How far each stage of a run is, read from what the stages leave on the volume."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rlhf.checkpoint import StageDir
from rlhf.data import is_number
from rlhf.errors import PrerequisiteError
from rlhf.lease import is_dead, look
from rlhf.pipeline import STAGE_NAMES

SILENT_SECONDS = 60


def stage_status(run_dir: Path, stage: str) -> dict[str, Any]:
    """State (`done`, `running`, `stopped`, `not begun`), newest saved step, and progress of a stage."""
    directory = StageDir(run_dir, stage)
    steps = directory.steps()
    progress = _read_progress(directory.path / "progress.json")
    if directory.is_final():
        state = "done"
    elif not directory.path.is_dir():
        state = "not begun"
    else:
        silent = time.time() - progress.get("updated", 0)
        state = "running" if silent < SILENT_SECONDS and not _has_ended(directory.path) else "stopped"
    return {
        "stage": stage,
        "state": state,
        "saved_step": steps[-1][0] if steps else None,
        "progress": progress,
    }


def _has_ended(stage_path: Path) -> bool:
    """Whether the lease says so: given back, or its holder died on this machine."""
    claim = look(stage_path).claim
    return claim is not None and (claim.released or is_dead(claim.holder))


def status_table(run_dir: Path) -> str:
    """A line a stage, aligned. Raises PrerequisiteError for a run that does not exist."""
    if not run_dir.is_dir():
        raise PrerequisiteError(f"{run_dir} does not exist; run `python -m rlhf run --run {run_dir.name}` first")
    lines = [f"{'stage':<10}{'state':<11}{'saved step':>10}  progress"]
    for name in STAGE_NAMES:
        status = stage_status(run_dir, name)
        saved = "" if status["saved_step"] is None else str(status["saved_step"])
        lines.append(f"{name:<10}{status['state']:<11}{saved:>10}  {_progress_text(status)}".rstrip())
    return "\n".join(lines)


def _progress_text(status: dict[str, Any]) -> str:
    progress = status["progress"]
    if status["state"] in ("done", "not begun") or not progress:
        return ""
    text = f"{progress['stage']}: {progress['done']} of {progress['total']} {progress['unit']}"
    left = progress.get("seconds_left")
    if status["state"] == "running" and left is not None:
        text += f", about {duration(left)} left"
    return text


def duration(seconds: float) -> str:
    """`2 h 5 min`, `2 min 5 s` or `5 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _read_progress(path: Path) -> dict[str, Any]:
    """A stage's progress.json; nothing where it is missing, torn or not ours."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        texts = [state["stage"], state["unit"]]
        numbers = [state["done"], state["total"], state["updated"]]
        numbers += [] if state["seconds_left"] is None else [state["seconds_left"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    ours = all(isinstance(text, str) and text.isprintable() for text in texts) and all(map(is_number, numbers))
    return state if ours else {}
