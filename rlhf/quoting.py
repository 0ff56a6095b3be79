"""What strangers wrote, for a message: on one line, printable, of a bounded length."""

from __future__ import annotations

import reprlib

MOST_CHARACTERS = 1000


def shown(value: object) -> str:
    """A value as Python writes it, with long and deep parts cut."""
    writer = reprlib.Repr()
    writer.maxlevel, writer.maxstring, writer.maxother, writer.maxlong = 3, 80, 80, 80
    try:
        return one_line(writer.repr(value))
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a huge number"


def one_line(text: str) -> str:
    """Text whose whitespace is single spaces, in which what cannot be printed is written as `\\n` or `\\x00`."""
    words = " ".join(text.split())
    if not words.isprintable():
        words = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in words)
    return words if len(words) <= MOST_CHARACTERS else f"{words[:MOST_CHARACTERS]}…"
