"""Where it went: the widths of layers as bars, and a map of blocks by kinds of axes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from itertools import groupby

from depgraph.page import broken
from depgraph.story.kinds import kinds_of
from depgraph.story.parts import AxisCut, LayerWidths, Story
from depgraph.story.svg import strip

_ROWS = 60  # layers up to which every block stands open
Widths = tuple[int, int]


def widths_section(story: Story) -> str:
    """A row for every layer, blocks to fold: a bar is as long as the width was and filled as far as it is kept."""
    if not story.layers:
        return ""
    widest = max((w[0] for y in story.layers for w in _sides(y) if w[0] != w[1]), default=0)
    widest = widest or max((w[0] for y in story.layers for w in _sides(y)), default=1)
    shown = "".join(_block(block, list(held), (widest, len(story.layers) <= _ROWS)) for block, held in _grouped(story))
    return (
        '<p class="hint">In order of execution; the upper bar is the width of the output, the thin one that of the input. Filled is '
        "what is left, hatched what went. Layers that are alike in what they are coupled to share a colour; grey can't be narrowed. "
        f"A whole bar is {widest:,} wide. Beside a block are its parameters.</p><ol>{shown}</ol>"
    )


def _grouped(story: Story) -> Iterator[tuple[str, Iterator[LayerWidths]]]:
    return groupby(story.layers, key=lambda layer: layer.block)


def _sides(layer: LayerWidths) -> Iterator[Widths]:
    return (side for side in (layer.out, layer.into) if side is not None)


def _block(block: str, rows: list[LayerWidths], how: tuple[int, bool]) -> str:
    widest, opened = how
    if not block or len(rows) == 1:
        return "".join(_row(layer, layer.name, widest) for layer in rows)
    before, after = (sum(y.params[k] for y in rows) for k in (0, 1))
    gone = ' class="left"' if all(y.gone for y in rows) else ""
    cells = "".join(_cell(layer, widest) for layer in rows)
    inner = "".join(_row(layer, layer.name.removeprefix(f"{block}."), widest) for layer in rows)
    counts = _change((before, after))
    return (
        f'<li class="block"><details{" open" if opened else ""}><summary><span class="n"><span{gone}>{broken(block)}</span></span>'
        f'<span class="cells" aria-hidden="true">{cells}</span><span class="w">{counts}</span></summary><ol>{inner}</ol></details></li>\n'
    )


def _row(layer: LayerWidths, name: str, widest: int) -> str:
    tip = f"{layer.name}: {layer.op}, {layer.params[0]:,} → {layer.params[1]:,} parameters"
    bars = _bar(layer.out, layer.out_family, ("out", widest)) + _bar(layer.into, layer.into_family, ("in", widest))
    words = "left out" if layer.gone else f"{_change(layer.out)} ← {_change(layer.into)}"
    return (
        f'<li class="layer{" gone" if layer.gone else ""}" title="{escape(tip)}"><span class="n">{broken(name)}</span>'
        f'<span class="bars">{bars}</span><span class="w">{words}</span></li>\n'
    )


def _bar(side: Widths | None, family: int | None, how: tuple[str, int]) -> str:
    place, widest = how
    if side is None:
        return f'<span class="bar {place} none"></span>'
    colour = f" f{family}" if family is not None else ""
    left = f'<i style="width:{100 * side[1] / max(side[0], 1):.4g}%"></i>' if side[1] else ""
    return (
        f'<span class="bar {place}{colour}" style="width:{max(100 * min(side[0] / widest, 1), 1):.3g}%">{left}</span>'
    )


def _change(side: Widths | None) -> str:
    if side is None:
        return "–"
    return f"{side[0]:,}" if side[0] == side[1] else f"{side[0]:,}→{side[1]:,}"


def _cell(layer: LayerWidths, widest: int) -> str:
    before, after = layer.out or (0, 0)
    family = f' class="f{layer.out_family}"' if layer.out_family is not None else ""
    height = max(100 * min(before / widest, 1), 12)
    filled = f'<i style="height:{100 * after / before:.3g}%"></i>' if before and after else ""
    return f'<b{family} style="height:{height:.3g}%">{filled}</b>'


def map_section(story: Story) -> str:
    """A table: a row for every block, a column for axes alike but for numbers in their names, strips of groups in the cells."""
    touched = {axis.family for axis in story.axes if axis.removed}
    axes = [axis for axis in story.axes if axis.family in touched]
    if not axes and not story.dropped:
        return ""
    columns, alone = {}, []
    for kind, held in kinds_of(story, axes).items():
        if len(held) > 1 and all(axis.block for axis in held):
            columns[kind] = held
        else:
            alone += held
    return (
        '<p class="hint">A strip has the groups of an axis (heads, neurons, channels) in order, several to a cell where there are more '
        "than 64: full cells stay, empty ones went, pale ones went in part.</p>"
        + _alone(alone)
        + (_by_block(story, columns) if columns or story.dropped else "")
    )


def _alone(axes: list[AxisCut]) -> str:
    """Axes that lie in no block, or are the only ones of their kind: a line each."""
    rows = "".join(f"<tr><th>{broken(axis.what)}</th><td>{_strip(axis)}</td></tr>\n" for axis in axes)
    return f'<table class="map">{rows}</table>' if rows else ""


def _by_block(story: Story, columns: Mapping[str, list[AxisCut]]) -> str:
    order = dict.fromkeys(layer.block for layer in story.layers if layer.block)
    order |= dict.fromkeys(axis.block for held in columns.values() for axis in held)
    gone = {part.name for part in story.dropped if part.gone}
    rows = []
    for block in order:
        cells = ["".join(_strip(axis) for axis in held if axis.block == block) for held in columns.values()]
        chips = "".join(f' <span class="chip left">{broken(n)}</span>' for n in _within(block, gone))
        if any(cells) or chips or block in gone:
            left = ' class="left"' if block in gone else ""
            named = f"{broken(block)}{' left out' if block in gone else ''}{chips}"
            rows.append(f'<tr{left}><td class="n">{named}</td>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>\n')
    heads = "".join(f"<th>{broken(_short(kind))}</th>" for kind in columns)
    return f'<table class="map"><tr><th class="n"></th>{heads}</tr>{"".join(rows)}</table>'


def _short(what: str) -> str:
    return what if len(what) < 90 else f"{what[:88]}…"


def _within(block: str, gone: set[str]) -> list[str]:
    """What was left out within a block, by its name there."""
    return [name.removeprefix(f"{block}.") for name in sorted(gone) if name.startswith(f"{block}.")]


def _strip(axis: AxisCut) -> str:
    tip = f"{axis.what}: {axis.groups:,} groups, {axis.removed:,} went"
    return f'<div class="f{axis.family}" title="{escape(tip)}">{strip(axis.map)}</div>'
