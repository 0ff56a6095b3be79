"""What `deploy` and `cluster-logs` print: log lines on stdout, what they say themselves on stderr."""

from __future__ import annotations

import shutil
import threading
from typing import TextIO

from rlhf.cluster.lines import parse_line, parse_progress

CLEAR_LINE = "\r\x1b[K"


class Screen:
    """Lines from several threads, whole; on a terminal as people read them, with the progress below them.

    Elsewhere, in a file or a pipe, log lines stay as they are: JSON, for machines.
    """

    def __init__(self, logs: TextIO, words: TextIO) -> None:
        self._logs, self._words = logs, words
        self._terminal = logs.isatty()
        self._lock = threading.Lock()
        self._status = ""

    def say(self, line: str) -> None:
        """A line of our own."""
        with self._lock:
            self._clear()
            self._words.write(f"{line}\n")
            self._words.flush()
            self._draw()

    def log(self, who: str, line: str) -> None:
        """A line of a container; `who` is put before it where several speak, empty where one does."""
        with self._lock:
            progress = parse_progress(line) if self._terminal else None
            self._clear()
            if progress is not None:
                # A line that wraps could not be cleared.
                self._status = str(progress)[: shutil.get_terminal_size().columns - 1]
            else:
                self._logs.write(self._rendered(who, line))
                self._logs.flush()
            self._draw()

    def close(self) -> None:
        """Leave the newest progress standing, on a line of its own."""
        with self._lock:
            if self._status:
                self._logs.write("\n")
                self._logs.flush()
                self._status = ""

    def _rendered(self, who: str, line: str) -> str:
        fact = parse_line(line) if self._terminal else None
        prefix = f"{who} | " if who else ""
        return "".join(f"{prefix}{part}\n" for part in (str(fact) if fact else line).split("\n"))

    def _clear(self) -> None:
        if self._status:
            self._logs.write(CLEAR_LINE)
            self._logs.flush()

    def _draw(self) -> None:
        if self._status:
            self._logs.write(self._status)
            self._logs.flush()
