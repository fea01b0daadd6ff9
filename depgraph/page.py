"""A model and its axes as one self-contained HTML page: bars for the widths of its layers, coloured by axis.

The picture, the list of axes and all texts are plain HTML and CSS; the script in `page.html` only adds the highlighting.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from html import escape
from importlib.resources import files
from itertools import groupby

import numpy as np

from depgraph.axes import Axis
from depgraph.classes import NONE
from depgraph.inspecting import Inspection, share_range
from depgraph.layers import Layer, block_of
from depgraph.report import METRICS
from depgraph.wording import counted

_LANES = 4  # axes that are drawn one above another in one bar
_ROWS = 60  # layers up to which every block stands open
_PLACE = re.compile(r"\{\{(\w+)\}\}")


def html_page(found: Inspection) -> str:
    """The page as text; it needs nothing from the network."""
    return _Page(found).text()


@dataclass(frozen=True)
class _Part:
    """A stretch of a bar: the axis that reaches it, and where it begins and ends as shares of the dim."""

    axis: int
    begin: float
    end: float


class _Page:
    def __init__(self, found: Inspection) -> None:
        self.found = found
        self.graph = found.graph
        self.number = {axis.name: k for k, axis in enumerate(found.graph.axes)}
        self.family = {axis.name: k for k, family in enumerate(found.families) for axis in family.axes}

    def text(self) -> str:
        cost, layers = self.graph.dense_cost, self.found.anatomy.layers
        totals = [f"<li><b>{getattr(cost, metric):,}</b> {word}</li>" for metric, word in METRICS.items()]
        totals += [f"<li><b>{len(layers):,}</b> layers</li>", f"<li><b>{len(self.number):,}</b> axes</li>"]
        parts = {
            "title": escape(self.graph.name),
            "style": style(),
            "colours": colours(len(self.found.families)),
            "totals": "".join(totals),
            "note": f'<p class="hint">{escape(self.graph.note)}.</p>' if self.graph.note else "",
            "picture": "".join(self._blocks()),
            "axes": "".join(self._family(k) for k in range(len(self.found.families))) or "<li>none</li>",
            "fixed": "".join(self._fixed()) or "<li>nothing</li>",
        }
        return filled(files("depgraph").joinpath("page.html").read_text(encoding="utf-8"), parts)

    # The picture

    @cached_property
    def _widest(self) -> int:
        """The widest dim that an axis reaches: the length of a whole bar."""
        anatomy, widths = self.found.anatomy, self.graph.widths
        dims = [d for layer in anatomy.layers for d in (layer.out, layer.into) if d is not None]
        reached = [anatomy.size(d) for d in dims if widths.axes_of(d)] or [anatomy.size(d) for d in dims]
        return max(reached, default=1)

    def _blocks(self) -> Iterator[str]:
        layers, seen = self.found.anatomy.layers, set[object]()
        for block, held in groupby(layers, key=lambda layer: block_of(layer.name)):
            rows = list(held)
            if not block or len(rows) == 1:
                yield from (self._row(layer, layer.name) for layer in rows)
                continue
            shape = tuple((y.name.removeprefix(block), self._size(y.out), self._size(y.into)) for y in rows)
            shown = " open" if len(layers) <= _ROWS or shape not in seen else ""
            seen.add(shape)
            params = f"{len(rows)} layers, {sum(y.params for y in rows):,} parameters"
            cells = "".join(self._cell(layer) for layer in rows)
            inner = "".join(self._row(layer, layer.name.removeprefix(f"{block}.")) for layer in rows)
            head = f'<span class="n">{broken(block)}</span><span class="cells" aria-hidden="true">{cells}</span>'
            summary = f'<summary>{head}<span class="w">{params}</span></summary>'
            yield f'<li class="block"><details{shown}>{summary}<ol>{inner}</ol></details></li>\n'

    def _row(self, layer: Layer, name: str) -> str:
        out, into = self._bar(layer.out, "out"), self._bar(layer.into, "in")
        sizes = f"{self._size(layer.out)} ← {self._size(layer.into)}"
        tip = f"{layer.name}: {layer.op}, {layer.params:,} parameters, {layer.macs:,} MACs"
        main = self._main(layer)
        attributes = f' data-a="{main}"' if main is not None else ""
        return (
            f'<li class="layer" tabindex="-1"{attributes} title="{escape(tip)}"><span class="n">{broken(name)}</span>'
            f'<span class="bars">{out}{into}</span><span class="w">{sizes}</span></li>\n'
        )

    def _bar(self, dim: int | None, side: str) -> str:
        """One bar: a lane for each axis where several share the dim, hatched where none reaches it."""
        if dim is None:
            return f'<span class="bar {side} none"></span>'
        size = self.found.anatomy.size(dim)
        lanes = _lanes(self._parts(dim))
        drawn = "".join(self._part(part, k, len(lanes)) for k, lane in enumerate(lanes) for part in lane)
        long = " long" if size > self._widest else ""
        why = "" if lanes else f' data-why="{escape(self.found.why(dim))}"'
        width = max(100 * min(size / self._widest, 1), 1)
        return f'<span class="bar {side}{long}" style="width:{width:.3g}%"{why}>{drawn}</span>'

    def _part(self, part: _Part, lane: int, lanes: int) -> str:
        place = "" if lanes == 1 else f"top:{100 * lane / lanes:.3g}%;height:{100 / lanes:.3g}%;"
        if part.begin > 0 or part.end < 1:
            place += f"left:{100 * part.begin:.4g}%;width:{100 * (part.end - part.begin):.4g}%"
        return f'<i class="f{self._family_of(part.axis)}" data-a="{part.axis}"{_style(place)}></i>'

    def _parts(self, dim: int) -> list[_Part]:
        """The axes along a dim, those that reach most of it and little else first."""
        number, found = self.found.anatomy.class_of(dim), []
        for name in sorted(self.graph.widths.axes_of(dim), key=lambda name: len(self.graph[name].members)):
            labels = self.graph[name].labels[number]
            on = np.flatnonzero(labels != NONE)
            found.append(_Part(self.number[name], on[0] / len(labels), (on[-1] + 1) / len(labels)))
        return sorted(found, key=lambda part: (part.begin - part.end, part.begin))

    def _cell(self, layer: Layer) -> str:
        main, size = self._main(layer), self.found.anatomy.size(layer.out) if layer.out is not None else 0
        height = f"height:{max(100 * min(size / self._widest, 1), 12):.3g}%"
        if main is None:
            return f"<b{_style(height)}></b>"
        return f'<b class="f{self._family_of(main)}" data-a="{main}"{_style(height)}></b>'

    def _main(self, layer: Layer) -> int | None:
        """The axis that a layer is shown for: that of its outputs, or else of its inputs."""
        for dim in (layer.out, layer.into):
            parts = self._parts(dim) if dim is not None else []
            if parts:
                return parts[0].axis
        return None

    def _size(self, dim: int | None) -> str:
        return "–" if dim is None else f"{self.found.anatomy.size(dim):,}"

    def _family_of(self, axis: int) -> int:
        return self.family[self.graph.axes[axis].name]

    # The lists beside it

    def _family(self, k: int) -> str:
        family = self.found.families[k]
        axes = "".join(self._axis(axis) for axis in family.axes)
        if len(family.axes) == 1:
            return f'<li class="family f{k}"><ul>{axes}</ul></li>\n'
        head = f'<b class="swatch"></b>{broken(family.what)} <b class="times">×{len(family.axes)}</b>'
        return f'<li class="family f{k}"><details><summary>{head}</summary><ul>{axes}</ul></details></li>\n'

    def _axis(self, axis: Axis) -> str:
        saving, dense = self.found.savings[axis.name], self.graph.dense_cost
        free, said = int(axis.prunable.sum()), str(self.found.descriptions[axis.name])
        least = self.graph.widths.least(axis.name)
        most = f"all but {'one' if least == 1 else least} may go"
        may = most if free == axis.size else f"{min(free, axis.size - least) or 'none'} may go"
        facts = [
            ("groups", f"{axis.size:,}, {may}"),
            ("one saves", f"{share_range(dense, [saving.one])} of parameters / MACs"),
            ("all save", f"{share_range(dense, [saving.all])}"),
            ("check", "exact" if axis.exact else f"mixed: {', '.join(axis.mixed_by)}"),
        ]
        facts += [("fixed", why) for why in dict.fromkeys(map(str, axis.reasons.values()))]
        listed = "".join(f"<dt>{name}</dt><dd>{broken(text)}</dd>" for name, text in facts)
        number = self.number[axis.name]
        return (
            f'<li class="axis" id="a{number}" data-a="{number}"><button type="button"><b class="swatch"></b>'
            f"{broken(said)}</button><code>{broken(axis.name)}</code><dl>{listed}</dl></li>\n"
        )

    def _fixed(self) -> Iterator[str]:
        for fixed in self.found.fixed:
            dims = ", ".join(map(broken, fixed.dims))
            count = counted(fixed.count, "dim", "dims")
            yield f"<li>{escape(fixed.heading)} <small>({count}: <code>{dims}</code>)</small></li>\n"
        for operator, places in self.graph.unknown.items():
            where = ", ".join(dict.fromkeys(places))
            yield f"<li>no rule for <code>{escape(operator)}</code> <small>({escape(where)})</small></li>\n"


def _lanes(parts: Iterable[_Part]) -> list[list[_Part]]:
    """Parts that overlap one above another, others side by side."""
    lanes: list[list[_Part]] = []
    for part in parts:
        free = (lane for lane in lanes if all(p.end <= part.begin or part.end <= p.begin for p in lane))
        lane = next(free, None)
        if lane is None and len(lanes) < _LANES:
            lanes.append([part])
        else:
            (lanes[-1] if lane is None else lane).append(part)
    return lanes


def style() -> str:
    """The rules that all pages share."""
    return files("depgraph").joinpath("page.css").read_text(encoding="utf-8").rstrip()


def filled(template: str, parts: Mapping[str, str]) -> str:
    """A template with its places, such as `{{title}}`, filled."""
    return _PLACE.sub(lambda match: parts[match[1]], template)


def colours(count: int) -> str:
    """The colours of families of axes, `.f0` and on: hues by the golden angle, so that neighbours differ."""
    hues = (f"{k * 137.508 % 360:.0f} var(--s) calc(var(--l) + {k // 8 % 3 * 8}%)" for k in range(count))
    return "".join(f".f{k}{{--c:hsl({hue})}}" for k, hue in enumerate(hues))


def broken(text: str) -> str:
    """Escaped, and free to break after a dot."""
    return escape(text).replace(".", ".<wbr>")


def _style(text: str) -> str:
    return f' style="{text}"' if text else ""
