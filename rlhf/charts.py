"""Small SVG charts for the report: lines, points, bars with intervals.

Colours are CSS classes (`c-sft`, `c-ppo`, `c-reference`, …) that the page defines once for light and once for dark;
text takes the page's font. Every mark has a `<title>`, which browsers show on hover and screen readers read out.
All charts are drawn on the same width, so that text is of one size across the page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 360.0
_LEFT, _RIGHT, _BOTTOM = 44.0, 40.0, 34.0
_MAX_LINE_POINTS = 240
_SMOOTH_FROM = 40
_BAR_HEIGHT, _BAR_STEP = 14.0, 30.0

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one colour; name is empty where the chart needs no legend."""

    name: str
    colour: str
    points: Sequence[Point]
    hints: Sequence[str] = ()
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A value with its interval; low and high are the value where there is none."""

    name: str
    colour: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scale:
    """Maps data to pixels; `ticks` are the round numbers inside."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        """Pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def scale(values: Sequence[float], start: float, end: float, *, count: int = 5, pad: float = 0.0) -> Scale:
    """A linear scale that holds all values and ends on round numbers; pad widens it by that share first."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    room = (high - low) * pad
    step = _round_step((high - low + 2 * room) / count)
    first, last = math.floor((low - room) / step + 1e-9), math.ceil((high + room) / step - 1e-9)
    ticks = tuple(index * step for index in range(first, last + 1))
    return Scale(ticks[0], ticks[-1], start, end, ticks)


def number(value: float) -> str:
    """A number as a reader wants it: three digits, no trailing zeros, k and M for thousands and millions."""
    for unit, suffix in ((1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / (1e3 if suffix == 'k' else unit):.3g}{suffix}".replace("-", "−")
    text = f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return ("0" if float(text) == 0 else text).replace("-", "−")


def line_chart(title: str, series: Sequence[Series], *, x_label: str, y_label: str) -> str:
    """Curves over steps, each with its last value written at its end.

    A long noisy curve is drawn pale with its moving mean over it.
    """
    height = 220.0
    x, y = _scales(series, height, legend=_has_legend(series))
    parts = [_frame(x, y, x_label=x_label, y_label=y_label), _legend(series)]
    labels: list[float] = []
    for one in series:
        points = [one.points[i] for i in _spread(len(one.points), _MAX_LINE_POINTS)]
        smooth = _moving_mean(points) if len(points) >= _SMOOTH_FROM else points
        if smooth is not points:
            parts.append(_path(points, x, y, f"line pale c-{one.colour}"))
        parts.append(_path(smooth, x, y, f"line c-{one.colour}{' dashed' if one.dashed else ''}"))
        last_x, last_y = smooth[-1]
        parts.append(f'<circle class="dot c-{one.colour}" cx="{x(last_x):.1f}" cy="{y(last_y):.1f}" r="2.6"/>')
        labels.append(_apart(y(last_y) + 4, labels))
        parts.append(
            f'<text class="value c-{one.colour}" x="{x(last_x) + 6:.1f}" y="{labels[-1]:.1f}">{number(last_y)}</text>'
        )
        name = f"{one.name}, " if one.name else ""
        parts += [_hover(x(a), y(b), f"{name}{x_label} {number(a)}: {number(b)}") for a, b in points]
    return _svg(title, height, parts)


def scatter_chart(
    title: str, series: Sequence[Series], *, x_label: str, y_label: str, joined: bool = False, radius: float = 2.6
) -> str:
    """Points, with a hint each on hover; joined draws the way from one to the next."""
    height = 260.0
    x, y = _scales(series, height, legend=_has_legend(series), pad=0.03)
    parts = [_frame(x, y, x_label=x_label, y_label=y_label), _legend(series, dots=True)]
    soft = "" if joined else " soft"
    for one in series:
        if joined:
            parts.append(_path(one.points, x, y, f"line pale c-{one.colour}"))
        for index, (a, b) in enumerate(one.points):
            hint = one.hints[index] if one.hints else f"{number(a)}, {number(b)}"
            parts.append(
                f'<circle class="dot{soft} c-{one.colour}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="{radius}">'
                f"<title>{escape(hint)}</title></circle>"
            )
    return _svg(title, height, parts)


def reliability_chart(title: str, bins: Sequence[tuple[float, float, int]]) -> str:
    """Observed against predicted share, from (predicted, observed, count); the area of a dot is its count."""
    height = 260.0
    low = math.floor(10 * min(0.5, *(min(p, o) for p, o, _ in bins))) / 10
    x = scale([low, 1.0], _LEFT, WIDTH - _RIGHT)
    y = scale([low, 1.0], height - _BOTTOM, 24.0)
    parts = [_frame(x, y, x_label="predicted chance of being right", y_label="share that was right")]
    parts.append(_path([(low, low), (1.0, 1.0)], x, y, "line dashed c-reference"))
    parts.append(_path([(p, o) for p, o, _ in bins], x, y, "line pale c-reward"))
    largest = max(count for _, _, count in bins)
    for predicted, observed, count in bins:
        hint = f"{count} pairs: predicted {predicted:.2f}, right {observed:.2f}"
        parts.append(
            f'<circle class="dot soft c-reward" cx="{x(predicted):.1f}" cy="{y(observed):.1f}" '
            f'r="{2.5 + 7 * math.sqrt(count / largest):.1f}"><title>{hint}</title></circle>'
        )
    return _svg(title, height, parts)


def bar_chart(title: str, bars: Sequence[Bar], *, digits: int = 3) -> str:
    """Horizontal bars from 0 with 95 % intervals, each named and with its value."""
    height = _BAR_STEP * len(bars) + 26
    x = scale([0.0, *(b.high for b in bars), *(b.low for b in bars)], 66.0, WIDTH - 56, count=4)
    bottom = _BAR_STEP * len(bars) + 4
    parts = []
    for tick in x.ticks:
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="2" y2="{bottom:.1f}"/>')
        parts.append(
            f'<text class="tick" text-anchor="middle" x="{x(tick):.1f}" y="{bottom + 15:.1f}">{number(tick)}</text>'
        )
    for index, bar in enumerate(bars):
        top = 6 + index * _BAR_STEP
        middle = top + _BAR_HEIGHT / 2
        left, right = sorted((x(0.0), x(bar.value)))
        hint = f"{bar.name}: {bar.value:.{digits}f}, 95 % interval {bar.low:.{digits}f} to {bar.high:.{digits}f}"
        parts.append(
            f'<g><title>{escape(hint)}</title><text class="name" x="0" y="{middle + 4:.1f}">{escape(bar.name)}</text>'
            f'<rect class="bar c-{bar.colour}" rx="2" x="{left:.1f}" y="{top:.1f}" '
            f'width="{right - left:.1f}" height="{_BAR_HEIGHT:.0f}"/>'
            f'<path class="whisker" d="M{x(bar.low):.1f} {middle:.1f}H{x(bar.high):.1f}'
            f'M{x(bar.low):.1f} {middle - 4:.1f}v8M{x(bar.high):.1f} {middle - 4:.1f}v8"/>'
            f'<text class="value" x="{WIDTH - 50:.0f}" y="{middle + 4:.1f}">{bar.value:.{digits}f}</text></g>'
        )
    return _svg(title, height, parts)


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _scales(series: Sequence[Series], height: float, *, legend: bool, pad: float = 0.0) -> tuple[Scale, Scale]:
    xs = [a for one in series for a, _ in one.points]
    ys = [b for one in series for _, b in one.points]
    top = 42.0 if legend else 24.0
    return (
        scale(xs, _LEFT, WIDTH - _RIGHT, pad=pad),
        scale(ys, height - _BOTTOM, top, count=4, pad=pad or 0.02),
    )


def _frame(x: Scale, y: Scale, *, x_label: str, y_label: str) -> str:
    parts = [f'<text class="label" x="0" y="11">{escape(y_label)}</text>']
    for tick in y.ticks:
        zero = " zero" if tick == 0 else ""
        parts.append(
            f'<line class="grid{zero}" x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
            f'<text class="tick" text-anchor="end" x="{x.start - 7:.1f}" y="{y(tick) + 3.5:.1f}">{number(tick)}</text>'
        )
    for tick in x.ticks:
        parts.append(
            f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{y.start:.1f}" y2="{y.start + 4:.1f}"/>'
            f'<text class="tick" text-anchor="middle" x="{x(tick):.1f}" y="{y.start + 16:.1f}">{number(tick)}</text>'
        )
    parts.append(
        f'<text class="label" text-anchor="end" x="{x.end:.1f}" y="{y.start + 31:.1f}">{escape(x_label)}</text>'
    )
    return "".join(parts)


def _has_legend(series: Sequence[Series]) -> bool:
    return any(one.name for one in series)


def _legend(series: Sequence[Series], *, dots: bool = False) -> str:
    parts, left = [], _LEFT
    for one in series:
        if not one.name:
            continue
        if dots:
            mark, width = f'<circle class="dot c-{one.colour}" cx="{left + 4:.0f}" cy="26" r="4"/>', 13
        else:
            dashed = " dashed" if one.dashed else ""
            mark, width = f'<path class="line{dashed} c-{one.colour}" d="M{left:.0f} 26h16"/>', 22
        parts.append(f'{mark}<text class="name" x="{left + width:.0f}" y="30">{escape(one.name)}</text>')
        left += width + 6.4 * len(one.name) + 16
    return "".join(parts)


def _path(points: Sequence[Point], x: Scale, y: Scale, css: str) -> str:
    steps = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points)
    return f'<path class="{css}" d="M{steps}"/>'


def _hover(x: float, y: float, hint: str) -> str:
    return f'<circle class="hover" cx="{x:.1f}" cy="{y:.1f}" r="6"><title>{escape(hint)}</title></circle>'


def _apart(wanted: float, taken: Sequence[float]) -> float:
    """A height for a label that does not lie on one that is there already."""
    for other in taken:
        if abs(wanted - other) < 12:
            wanted = other - 12 if wanted <= other else other + 12
    return wanted


def _moving_mean(points: Sequence[Point]) -> list[Point]:
    """Mean over the neighbours on both sides, so that a rising curve is not drawn late."""
    reach = max(len(points) // 24, 1)
    smooth = []
    for index, (a, _) in enumerate(points):
        # As many on the left as on the right: a one-sided mean would bend the ends.
        near = min(reach, index, len(points) - 1 - index)
        window = [b for _, b in points[index - near : index + near + 1]]
        smooth.append((a, sum(window) / len(window)))
    return smooth


def _spread(count: int, most: int) -> list[int]:
    """At most `most` indices, evenly spread, with the first and the last."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * (1 - 1e-9))
