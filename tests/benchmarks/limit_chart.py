"""The chart of `bench`: `python -m tests.benchmarks.limit_chart chart.svg before=a/bench.json after=b/bench.json`.

A group of bars a phase, a bar a result: the share of the machine's limit that was reached, with the seconds at its end.
The drawing carries its own colours, for light and dark pages. The same numbers are printed as a Markdown table.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

WIDTH, LEFT, RIGHT = 640, 130, 100
TOP, BAR, GAP = 48, 14, 12
CLASSES = ("a", "b", "c")
STYLE = """
text{font:12px system-ui,sans-serif;fill:#333}.faint{fill:#777}.grid{stroke:#ddd}
.a{fill:#3b6fb6}.b{fill:#e08a2e}.c{fill:#4f9d69}
@media (prefers-color-scheme:dark){text{fill:#ddd}.faint{fill:#999}.grid{stroke:#444}}
"""


def chart(results: Mapping[str, Sequence[Mapping[str, Any]]], *, title: str) -> str:
    """An SVG of results by name, each with the same phases; the last result has the last colour in use."""
    names = list(results)
    phases = [row["phase"] for row in results[names[0]]]
    found = [{row["phase"]: row for row in rows} for rows in results.values()]
    step = BAR * len(names) + GAP
    bottom = TOP + step * len(phases)
    parts = [f'<text class="faint" x="0" y="14">{escape(title)}</text>', _legend(names), _grid(bottom)]
    for number, phase in enumerate(phases):
        top = TOP + number * step
        middle = top + BAR * len(names) / 2 + 4
        parts.append(f'<text x="{LEFT - 8}" y="{middle:.0f}" text-anchor="end">{escape(phase)}</text>')
        for place, rows in enumerate(found):
            if phase in rows:
                parts.append(_bar(rows[phase], names[place], CLASSES[place], top + place * BAR))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 34}" width="{WIDTH}" '
        f'height="{bottom + 34}" role="img" aria-label="Share of the limit by phase"><style>{STYLE}</style>'
        f"{''.join(parts)}</svg>\n"
    )


def markdown(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The table: a row a phase, of each result the seconds, the share of the limit and how many a second."""
    names = list(results)
    found = [{row["phase"]: row for row in rows} for rows in results.values()]
    heads = [f"{name}: seconds | reached | a second" for name in names]
    lines = ["| " + " | ".join(["phase", "GFLOP", "limit, s", *heads]) + " |", "| --- " * (3 + 3 * len(names)) + "|"]
    for phase, last in found[-1].items():
        cells = [phase, f"{last['gflop']:.1f}", f"{last['limit_seconds']:.3g}"]
        for rows in found:
            row = rows[phase]
            cells.append(f"{row['seconds']:.3g} | {row['share']:.0%} | {row['per_second']:.1f} {row['unit']}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _bar(row: Mapping[str, Any], name: str, colour: str, top: float) -> str:
    width = _x(min(row["share"], 1.0)) - LEFT
    label = f"{row['share']:.0%} · {row['seconds']:.3g} s"
    hint = f"{name} {row['phase']}: {row['seconds']:.4g} s, at the limit {row['limit_seconds']:.4g} s"
    return (
        f'<g><title>{escape(hint.strip())}</title><rect class="{colour}" x="{LEFT}" y="{top:.0f}" '
        f'width="{max(width, 1):.1f}" height="{BAR - 2}" rx="2"/>'
        f'<text x="{LEFT + max(width, 1) + 6:.1f}" y="{top + BAR - 4:.0f}">{label}</text></g>'
    )


def _grid(bottom: float) -> str:
    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = _x(tick)
        parts.append(f'<line class="grid" x1="{x:.0f}" x2="{x:.0f}" y1="{TOP - 6}" y2="{bottom}"/>')
        parts.append(f'<text class="faint" x="{x:.0f}" y="{bottom + 16}" text-anchor="middle">{tick:.0%}</text>')
    return "".join(parts) + f'<text class="faint" x="{LEFT}" y="{bottom + 30}">of the machine\'s limit</text>'


def _legend(names: Sequence[str]) -> str:
    parts, x = [], LEFT
    for name, colour in zip(names, CLASSES, strict=False):
        if name:
            parts.append(f'<rect class="{colour}" x="{x}" y="24" width="10" height="10" rx="2"/>')
            parts.append(f'<text x="{x + 15}" y="33">{escape(name)}</text>')
            x += 30 + 7 * len(name)
    return "".join(parts)


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def main(arguments: list[str] | None = None) -> None:
    """Draw one file from up to three results."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) < 2 or not all("=" in one for one in arguments[1:]) or len(arguments) > 1 + len(CLASSES):
        raise SystemExit("python -m tests.benchmarks.limit_chart chart.svg name=bench.json [name=bench.json …]")
    target, results = Path(arguments[0]), {}
    for one in arguments[1:]:
        name, _, file = one.partition("=")
        results[name] = json.loads(Path(file).read_text(encoding="utf-8"))
    machine = next(reversed(results.values()))["machine"]
    title = f"{machine['name']}, {machine['dtype']}, {machine['flops'] / 1e9:.0f} GFLOP/s"
    phases = {name: result["phases"] for name, result in results.items()}
    target.write_text(chart(phases, title=title), "utf-8")
    print(markdown(phases))


if __name__ == "__main__":
    main()
