"""Plots as inline SVG: axes with round ticks, lines and points. Colours come from the page's style."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from html import escape

Point = tuple[float, float]
_TICKS = 4
_STEPS = (1, 2, 2.5, 5, 10)
_PAPER = (
    "svg{--s:58%;--l:44%;font:10px sans-serif}text{fill:#5c6670}rect{fill:var(--c)}.paper{fill:#fff}"
    ".frame{fill:none;stroke:#5c6670}.grid{stroke:#d9dee3}"
    ".line{fill:none;stroke:var(--c);stroke-width:1}.line.front{stroke:#1b1f24;stroke-width:5;opacity:.22}"
    ".line.level{stroke:#5c6670;stroke-dasharray:4 3}.dot{fill:var(--c)}.dot.ring{fill:none;stroke:#1b1f24;stroke-width:1.8}"
)


@dataclass(frozen=True)
class Scale:
    """Maps [low, high] to [start, end]; by the logarithm where `log`, which takes numbers above 0 only."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, here = (self._moved(x) for x in (self.low, self.high, value))
        return self.start + (here - low) / (high - low) * (self.end - self.start)

    def _moved(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def at(self, place: float) -> float:
        """The value that is mapped to a place."""
        low, high = self._moved(self.low), self._moved(self.high)
        found = low + (place - self.start) / (self.end - self.start) * (high - low)
        return 10**found if self.log else found

    def ticks(self) -> list[float]:
        """Round numbers within, about four of them."""
        if not self.log:
            return _round_steps(self.low, self.high)
        decades = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
        every = max(1, math.ceil(len(decades) / _TICKS))
        return [10.0**n for n in decades][::every] if len(decades) > 1 else _round_steps(self.low, self.high)


def scale(values: Iterable[float], start: float, end: float, *, log: bool = False) -> Scale:
    """A scale for all of some values; one wider than a single value where they are alike."""
    found = [value for value in values if math.isfinite(value) and (value > 0 or not log)] or [1.0]
    low, high = min(found), max(found)
    if low == high:
        low, high = (low / 2, high * 2) if log else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
    return Scale(low, high, start, end, log)


@dataclass
class Plot:
    """A picture of `width` x `height` units with a frame, to which lines and points are added."""

    x: Scale
    y: Scale
    labels: tuple[str, str]
    title: str = ""
    width: int = 340
    height: int = 200
    percent_x: bool = False
    marks: list[str] = field(default_factory=list)

    def line(self, points: Sequence[Point], style: str, title: str = "") -> None:
        """A line through points; `style` are classes of the page, `title` is shown on hover."""
        if len(points) > 1:
            path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
            self.marks.append(f'<polyline class="line {style}" points="{path}">{_title(title)}</polyline>')

    def dot(self, point: Point, style: str, title: str = "", radius: float = 3) -> None:
        """A point."""
        x, y = self.x(point[0]), self.y(point[1])
        self.marks.append(
            f'<circle class="dot {style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}">{_title(title)}</circle>'
        )

    def level(self, value: float, style: str, title: str) -> None:
        """A horizontal line across the picture."""
        if self.y.low <= value <= self.y.high:
            self.line([(self.x.low, value), (self.x.high, value)], style, title)

    def text(self) -> str:
        """The picture as an `svg` element."""
        left, right, top, bottom = self.x.start, self.x.end, self.y.end, self.y.start
        parts = [f'<path class="frame" d="M{left:.1f} {top:.1f}V{bottom:.1f}H{right:.1f}"/>']
        for tick in self.x.ticks():
            at, shown = self.x(tick), f"{100 * tick:g}%" if self.percent_x else short(tick)
            parts.append(f'<text x="{at:.1f}" y="{bottom + 13:.1f}" text-anchor="middle">{shown}</text>')
        ticks = self.y.ticks()
        for tick, shown in zip(ticks, apart(ticks), strict=True):
            at = self.y(tick)
            parts.append(f'<path class="grid" d="M{left:.1f} {at:.1f}H{right:.1f}"/>')
            parts.append(f'<text x="{left - 4:.1f}" y="{at + 3:.1f}" text-anchor="end">{shown}</text>')
        across, up = self.labels
        parts.append(
            f'<text class="label" x="{right:.1f}" y="{bottom + 26:.1f}" text-anchor="end">{escape(across)}</text>'
        )
        parts.append(f'<text class="label" x="{left - 4:.1f}" y="{top - 7:.1f}">{escape(up)}</text>')
        name = escape(self.title or f"{up} by {across}")
        head = f'<svg class="plot" viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{name}">'
        return "".join([head, *parts, *self.marks, "</svg>"])


def plot(
    points: Iterable[Point], labels: tuple[str, str], *, log: bool = False, size: tuple[int, int] = (340, 200)
) -> Plot:
    """An empty picture with scales for some points; `labels` are those of x and y, `log` is of y."""
    found, (width, height) = list(points), size
    x = scale((p[0] for p in found), 46, width - 16)
    y = scale((p[1] for p in found), height - 36, 24, log=log)
    y = replace(y, start=height - 32, low=y.at(height - 32), high=y.at(20), end=20)
    return Plot(x, y, labels, width=width, height=height)


def standalone(picture: Plot, names: Sequence[str], colours: str) -> str:
    """A plot as a file of its own, with a legend of names of colours `.f0` and on."""
    rows = "".join(
        f'<rect class="f{k}" x="{picture.width}" y="{14 + 16 * k}" width="10" height="10"/>'
        f'<text x="{picture.width + 15}" y="{23 + 16 * k}">{escape(name)}</text>'
        for k, name in enumerate(names)
    )
    width, height = picture.width + 130, max(picture.height, 30 + 16 * len(names))
    begin = f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * width}" height="{2 * height}" viewBox="0 0 {width} {height}">'
    inner = picture.text().partition(">")[2]
    return f'{begin}<style>{_PAPER}{colours}</style><rect class="paper" width="100%" height="100%"/>{rows}{inner}\n'


def spans_decades(values: Iterable[float]) -> bool:
    """Are all values above 0 and far apart, so that they are better drawn by their logarithms?"""
    found = list(values)
    return bool(found) and min(found) > 0 and max(found) / min(found) > 30


def strip(shares: Sequence[float]) -> str:
    """A row of cells in order, one for each share: filled as far as it is kept, in up to four shades of what is gone."""
    cells: dict[int, list[str]] = {}
    for level, begin, end in _runs([round(4 * share) for share in shares]):
        cells.setdefault(level, []).append(f"M{begin} 0h{end - begin}v1h{begin - end}z")
    paths = "".join(f'<path class="k{level}" d="{"".join(where)}"/>' for level, where in sorted(cells.items()))
    lines = "".join(f"M{k} 0v1" for k in range(1, len(shares))) if len(shares) <= 32 else ""
    ruled = f'<path class="cut" d="{lines}"/>' if lines else ""
    return f'<svg class="strip" viewBox="0 0 {len(shares)} 1" preserveAspectRatio="none" aria-hidden="true">{paths}{ruled}</svg>'


def apart(values: list[float]) -> list[str]:
    """Numbers in few characters, in as many as tell them apart."""
    said = [short(value) for value in values]
    digits = 4
    while len(set(said)) < len(values) and digits < 10:
        said = [f"{value:.{digits}g}" for value in values]
        digits += 1
    return said


def short(value: float) -> str:
    """A number in few characters: `1.2k`, `0.03`, `1e-09`."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}" if abs(value) < 1e13 else f"{value:.0e}"
    return "0" if value == 0 else f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.0e}"


def _runs(levels: Sequence[int]) -> Iterable[tuple[int, int, int]]:
    """Stretches of equal levels: (level, begin, end)."""
    begin = 0
    for k in range(1, len(levels) + 1):
        if k == len(levels) or levels[k] != levels[begin]:
            yield levels[begin], begin, k
            begin = k


def _round_steps(low: float, high: float) -> list[float]:
    raw = (high - low) / _TICKS
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * s for s in _STEPS if base * s >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [(first + k) * step for k in range(count)]


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""
