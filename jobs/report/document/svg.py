"""A chart as SVG: lines with bands over epochs; colours come from the page's style sheet, for light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from jobs.report.document.content import Chart, Line

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 12, 34  # margins


def svg(chart: Chart, identity: str) -> Markup:
    """The chart; `identity` tells its ids from those of others on the page."""
    points = [point for line in chart.lines for point in line.points]
    xs = [point.x for point in points]
    ys = [value for point in points for value in (point.y, point.low, point.high) if value is not None]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    frame = _Frame(min(*xs, x_ticks[0]), max(*xs, x_ticks[-1]), min(*ys, y_ticks[0]), max(*ys, y_ticks[-1]))
    parts = [
        Markup('<svg viewBox="0 0 {} {}" role="img" aria-labelledby="{}-t {}-d">').format(WIDTH, HEIGHT, identity, identity),
        Markup('<title id="{}-t">{}</title><desc id="{}-d">{}</desc>').format(
            identity, chart.title, identity, chart.description
        ),
    ]
    for tick in y_ticks:
        y = frame.y(tick)
        parts.append(Markup('<path class="grid" d="M{} {}H{}"/>').format(LEFT, y, WIDTH - RIGHT))
        parts.append(Markup('<text x="{}" y="{}" class="end">{}</text>').format(LEFT - 5, y + 4, f"{tick:g}"))
    for tick in x_ticks:
        parts.append(Markup('<text x="{}" y="{}" class="middle">{}</text>').format(frame.x(tick), HEIGHT - 18, f"{tick:g}"))
    parts.append(Markup('<path class="axis" d="M{} {}V{}H{}"/>').format(LEFT, TOP, HEIGHT - BOTTOM, WIDTH - RIGHT))
    parts.append(Markup('<text x="{}" y="{}" class="middle">epoch</text>').format((LEFT + WIDTH) // 2, HEIGHT - 4))
    parts += [_band(line, frame) for line in chart.lines] + [_line(line, frame) for line in chart.lines]
    return Markup("").join([*parts, Markup("</svg>")])


class _Frame:
    """From values to places in the picture, rounded to a tenth of a unit."""

    def __init__(self, left: float, right: float, low: float, high: float) -> None:
        self._left, self._width = left, right - left or 1.0
        self._low, self._height = low, high - low or 1.0

    def x(self, value: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (value - self._left) / self._width, 1)

    def y(self, value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self._low) / self._height, 1)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from at most `low` to at least `high`."""
    span = high - low or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= span / count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)


def _band(line: Line, frame: _Frame) -> Markup:
    ends = [(point.x, point.low, point.high) for point in line.points if point.low is not None and point.high is not None]
    if not ends:
        return Markup("")
    above = [(frame.x(x), frame.y(high)) for x, _, high in ends]
    below = [(frame.x(x), frame.y(low)) for x, low, _ in reversed(ends)]
    return Markup('<path class="band {}" d="{}Z"/>').format(style(line), _path([*above, *below]))


def _line(line: Line, frame: _Frame) -> Markup:
    places = [(frame.x(point.x), frame.y(point.y)) for point in line.points]
    dots = [Markup('<circle class="dot {}" cx="{}" cy="{}" r="2.5"/>').format(style(line), *each) for each in places]
    few = len(places) <= (1 if line.dashed else 12)  # where was measured
    path = Markup('<path class="line {}{}" d="{}"/>').format(style(line), " dashed" if line.dashed else "", _path(places))
    return path + Markup("").join(dots if few else [])


def style(line: Line) -> str:
    """The class of a line: its colour."""
    return "chance" if line.colour < 0 else f"c{line.colour}"
