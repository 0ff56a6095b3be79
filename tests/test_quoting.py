"""What strangers wrote stays on one line of a message, printable and short."""

from __future__ import annotations

import pytest

from rlhf.quoting import one_line, shown


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("as it is: é 猫", "as it is: é 猫"),
        ("two\nlines\tand  spaces ", "two lines and spaces"),
        ("\x1b[31mred\x00", r"\x1b[31mred\x00"),
        ("half \ud800", r"half \ud800"),
        ("no-break\xa0space", "no-break space"),
        ("soft\xadhyphen", r"soft\xadhyphen"),
        ("x" * 2000, "x" * 1000 + "…"),
    ],
)
def test_one_line(text: str, line: str) -> None:
    assert one_line(text) == line


def test_values_are_short_however_large_they_are() -> None:
    bomb: list[object] = ["x"] * 9
    for _ in range(12):
        bomb = [bomb] * 9
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (bomb, deep, "y" * 10_000, {"z" * 5000: b"a" * 5000}, 10**4000):
        assert len(shown(value)) < 1500
    assert shown(10**5000) == "a huge number"
    assert shown("a\n'b'") == "\"a\\n'b'\""
