"""JSON files and files of JSON lines beside a stage's checkpoints, which no manifest lists: can they be read?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class BrokenText:
    """A JSON file that cannot be read, or one of JSON lines with the lines of it that can."""

    path: Path
    problem: str
    readable: str | None


def texts_of(folder: Path) -> list[Path]:
    """The JSON files of a stage's folder that are nobody's checkpoint."""
    found = (path for pattern in ("*.json", "*.jsonl", "samples/*.jsonl") for path in folder.glob(pattern))
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))


def broken_text(path: Path, notes: list[str]) -> BrokenText | None:
    """What is wrong with a text; the last line may be torn where a process was killed, which is noted only."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None  # its writer has removed it meanwhile
    if path.suffix == ".json":
        return None if _parses(content) else BrokenText(path, "is not JSON", None)
    *lines, last = content.split(b"\n")
    if last:
        notes.append(f"{path.name} ends in the middle of a line, as a killed process leaves it; readers pass over it")
    wrong = [number for number, text in enumerate(lines, start=1) if not _parses(text)]
    if not wrong:
        return None
    readable = "".join(text.decode() + "\n" for text in lines if _parses(text))
    return BrokenText(path, f"has {len(wrong)} unreadable lines, the first is {wrong[0]}", readable)


def _parses(text: bytes) -> bool:
    try:
        json.loads(text.decode())
    except (ValueError, RecursionError):
        return False
    return True
