"""Log lines of our containers: JSON facts, progress among them, as people read them."""

from __future__ import annotations

import json
from dataclasses import dataclass

from rlhf.status import duration

PROGRESS = "progress "
KNOWN_KEYS = frozenset({"time", "level", "logger", "message", "traceback"})


@dataclass(frozen=True)
class LogLine:
    """One fact that a container logged; `extra` holds what the service adds to it."""

    time: str
    level: str
    message: str
    traceback: str
    extra: tuple[tuple[str, object], ...]

    def __str__(self) -> str:
        clock = self.time[11:19]
        facts = "".join(f" {key}={value}" for key, value in self.extra)
        return f"{clock} {self.level[:1]} {self.message}{facts}" + (f"\n{self.traceback}" if self.traceback else "")


@dataclass(frozen=True)
class Progress:
    """How far a stage is; `shown` are the numbers worth a look, such as reward and kl."""

    stage: str
    done: int
    total: int
    unit: str
    seconds_left: float | None
    shown: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        text = f"{self.stage}: {self.done} of {self.total} {self.unit}"
        if self.seconds_left is not None and self.done < self.total:
            text += f", about {duration(self.seconds_left)} left"
        return text + "".join(f", {key} {value}" for key, value in self.shown)


def parse_line(line: str) -> LogLine | None:
    """The fact in a line; None for a line that is no log of ours."""
    if not line.startswith("{"):
        return None
    try:
        facts = json.loads(line)
    except ValueError:
        return None
    if not isinstance(facts, dict) or "message" not in facts:
        return None
    extra = tuple((key, value) for key, value in facts.items() if key not in KNOWN_KEYS)
    time, level = str(facts.get("time", "")), str(facts.get("level", "INFO"))
    return LogLine(time, level, str(facts["message"]), str(facts.get("traceback", "")), extra)


def parse_progress(line: str) -> Progress | None:
    """The progress that a line tells; None for any other line."""
    fact = parse_line(line)
    if fact is None or not fact.message.startswith(PROGRESS):
        return None
    values = dict(word.split("=", 1) for word in fact.message.split(" ") if "=" in word)
    try:
        stage, unit = values.pop("stage"), values.pop("unit", "steps")
        done, total = int(values.pop("done")), int(values.pop("total"))
        left = values.pop("seconds_left", None)
        return Progress(stage, done, total, unit, float(left) if left else None, tuple(values.items()))
    except (KeyError, ValueError):
        return None
