"""What a finished stage has made, without what depends on the time it took: equal runs, equal pictures."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.checkpoint import MANIFEST, StageDir, verify
from rlhf.telemetry import read_metrics

TIMED = re.compile(r"time$|time/.*|.*/tokens_per_second|.*_seconds$|updated")
WRITTEN = re.compile(rb"Written [\d-]+ [\d:]+ UTC")
SHOWN = ("samples", "bad-batches.jsonl", "config.yaml")


def picture(run_dir: Path, stage: str) -> dict[str, str]:
    """A digest for every file of `final`, every line of metrics, and what else is shown; raises when one is damaged."""
    directory = StageDir(run_dir, stage)
    final = directory.final()
    verify(final)
    found = {
        f"final/{path.relative_to(final).as_posix()}": digest_of(path)
        for path in sorted(final.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    for number, row in enumerate(read_metrics(directory.path / "metrics.jsonl")):
        found[f"metrics.jsonl:{number}"] = json.dumps(untimed(row), sort_keys=True)
    for name in SHOWN:
        shown = directory.path / name
        for path in sorted(shown.rglob("*")) if shown.is_dir() else [shown] * shown.exists():
            found[path.relative_to(directory.path).as_posix()] = digest_of(path)
    if stage == "evaluate":
        for path in sorted((run_dir / "report").rglob("*")):
            if path.is_file():
                found[f"report/{path.name}"] = digest_of(path)
    return found


def digest_of(path: Path) -> str:
    """Of the bytes; of a JSON or JSONL file, of what does not depend on time."""
    if path.suffix == ".json" and path.name != "tokenizer.json":
        data = json.dumps(untimed(json.loads(path.read_text(encoding="utf-8"))), sort_keys=True).encode()
    else:
        data = WRITTEN.sub(b"", path.read_bytes())
    return hashlib.sha256(data).hexdigest()


def untimed(value: Any) -> Any:
    """Without the keys that say how long something took, and when."""
    if isinstance(value, dict):
        return {key: untimed(inner) for key, inner in value.items() if not TIMED.fullmatch(key)}
    return [untimed(inner) for inner in value] if isinstance(value, list) else value


def differences(wanted: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Names that are missing, new or other."""
    return [
        f"{name}: {'missing' if name not in found else 'new' if name not in wanted else 'differs'}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
