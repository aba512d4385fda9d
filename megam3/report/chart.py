"""Line charts as inline SVG: no script, no font, no file beside the page.

Colours are CSS classes (`line-0` …), so that the page's light and dark styles decide them; widths scale with
the page, since only a viewBox is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from megam3.report.record import Point
from megam3.report.text import figure, safe

NUM_COLOURS = 6
"""The page's style has as many; further lines repeat them with another dash."""
MAX_POINTS = 300
"""About one a pixel of a phone; a longer line is drawn as means of equal parts."""
WIDTH, HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 8, 8, 24
_DASHES = ("", "6 3", "2 3")
_LOG_RATIO = 1000.0


@dataclass(frozen=True)
class Line:
    """One line and what it is called; `index` picks colour and dash."""

    label: str
    index: int
    points: Sequence[Point]


@dataclass(frozen=True, kw_only=True)
class _Axes:
    first: float
    last: float
    low: float
    high: float
    is_log: bool

    def x(self, step: float) -> float:
        share = (step - self.first) / (self.last - self.first)
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high, value = (
            (math.log10(self.low), math.log10(self.high), math.log10(value))
            if self.is_log
            else (self.low, self.high, value)
        )
        return HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    bounds: tuple[float, float] | None = None,
    may_be_log: bool = False,
) -> str:
    """A figure with one SVG: `lines` over steps, and the last value of each in words.

    `bounds` fixes the vertical axis. `may_be_log` allows a logarithmic one, taken when all are positive and
    they span three orders of magnitude.
    """
    drawn = [Line(line.label, line.index, thin(line.points)) for line in lines if line.points]
    if not drawn:
        return ""
    axes = _axes(drawn, bounds, may_be_log)
    body = [*_grid(axes), *(_path(line, axes) for line in drawn)]
    last = ", ".join(
        f'<span class="key-{line.index % NUM_COLOURS}">{safe(line.label)}</span> '
        f"{figure(line.points[-1].value)}"
        for line in lines
        if line.points
    )
    scale = " (logarithmic)" if axes.is_log else ""
    return (
        f'<figure><figcaption><b>{safe(title)}</b>{scale}<br><span class="last">{last}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{safe(title)} over steps">'
        f"{''.join(body)}</svg></figure>"
    )


def thin(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """At most `most` points: means of neighbours, of step and value alike.

    >>> thin([Point(1, 2.0), Point(3, 4.0), Point(5, 6.0), Point(7, 10.0)], most=2)
    [Point(step=2, value=3.0), Point(step=6, value=8.0)]
    """
    if len(points) <= most:
        return list(points)
    cuts = [len(points) * part // most for part in range(most + 1)]
    parts = [points[start:stop] for start, stop in pairwise(cuts)]
    return [
        Point(
            sum(point.step for point in part) // len(part),
            sum(point.value for point in part) / len(part),
        )
        for part in parts
    ]


def _axes(lines: Sequence[Line], bounds: tuple[float, float] | None, may_be_log: bool) -> _Axes:
    steps = [point.step for line in lines for point in line.points]
    values = [point.value for line in lines for point in line.points]
    low, high = bounds or (min(values), max(values))
    is_log = may_be_log and bounds is None and low > 0 and high / low >= _LOG_RATIO
    if low == high:  # a flat line lies in the middle
        spread = abs(low) / 2 or 1.0
        low, high = low - spread, high + spread
    first, last = min(steps), max(steps)
    return _Axes(
        first=first if first < last else first - 1,
        last=last if first < last else last + 1,
        low=low,
        high=high,
        is_log=is_log,
    )


def _grid(axes: _Axes) -> list[str]:
    """Horizontal lines with their values, and steps below."""
    parts = []
    for value in _ticks(axes):
        y = axes.y(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 4}" y="{y + 4:.1f}" text-anchor="end">{figure(value)}</text>')
    middle = round((axes.first + axes.last) / 2)
    for step, anchor in ((axes.first, "start"), (middle, "middle"), (axes.last, "end")):
        x = axes.x(step)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{step:,.0f}</text>')
    return parts


def _ticks(axes: _Axes) -> list[float]:
    """Round values inside the axis: powers of ten, or multiples of 1, 2 or 5 times one."""
    if axes.is_log:
        powers = range(math.ceil(math.log10(axes.low)), math.floor(math.log10(axes.high)) + 1)
        every = max(1, len(powers) // 4)
        return [10.0**power for power in powers[::every]]
    rough = (axes.high - axes.low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    unit = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    # the slack keeps an axis' own ends when a division leaves them a rounding error outside
    first = math.ceil(axes.low / unit - 1e-6)
    return [unit * number for number in range(first, math.floor(axes.high / unit + 1e-6) + 1)]


def _path(line: Line, axes: _Axes) -> str:
    at = [(axes.x(point.step), axes.y(point.value)) for point in line.points]
    d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
    dash = _DASHES[line.index // NUM_COLOURS % len(_DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    name = f"line-{line.index % NUM_COLOURS}"
    last = line.points[-1]
    # a single point has a line of no length: the dot is what shows
    return (
        f'<path class="line {name}"{dashed} d="{d}"/>'
        f'<circle class="{name}" cx="{at[-1][0]:.1f}" cy="{at[-1][1]:.1f}" r="3">'
        f"<title>{safe(line.label)}, step {last.step:,}: {figure(last.value)}</title></circle>"
    )
