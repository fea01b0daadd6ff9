"""Small HTML tables: cells that start with `#` are numbers, and stand at the right."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

from depgraph.story.parts import Timing


class Row(NamedTuple):
    """A row: its cells as HTML, and classes."""

    cells: Sequence[str]
    style: str = ""


def table(head: Sequence[str], rows: Iterable[Row], style: str = "") -> str:
    """A table that scrolls sideways where the window is narrow."""
    top = f"<tr>{''.join(_cell('th', text) for text in head)}</tr>" if head else ""
    body = "".join(f"<tr{_class(row.style)}>{''.join(_cell('td', text) for text in row.cells)}</tr>\n" for row in rows)
    return f'<div class="scroll"><table{_class(style)}>{top}{body}</table></div>'


def rows_of(facts: Mapping[str, str]) -> list[Row]:
    """A row for every fact that is known."""
    return [Row((f"<small>{escape(name)}</small>", escape(value))) for name, value in facts.items() if value]


def number(value: float | None) -> str:
    """A figure with four digits; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:#.4g}".rstrip(".")


def times_table(timings: Sequence[Timing]) -> str:
    """Dense beside pruned, as numbers and bars; how far a prediction of the ratio was from what was measured."""
    longest = max((ms for t in timings for ms in (t.dense_ms, t.pruned_ms) if ms), default=1.0)
    head = ("what", "", "#threads", "#dense ms", "#pruned ms", "#times as fast", "")
    return table(head, [Row(_timing(t, longest)) for t in timings], "times") + "".join(_misses(timings))


def _timing(timing: Timing, longest: float) -> tuple[str, ...]:
    bars = "".join(
        f'<span class="hbar {style}" style="width:{100 * ms / longest:.2f}%"></span>'
        for style, ms in (("dense", timing.dense_ms), ("", timing.pruned_ms))
        if ms
    )
    faster = f"{timing.speedup:.2f}" if timing.speedup else "–"
    shown = (f"#{timing.threads}", f"#{number(timing.dense_ms)}", f"#{number(timing.pruned_ms)}", f"#{faster}")
    return escape(timing.what), escape(timing.kind), *shown, f"~{bars}"


def _misses(timings: Sequence[Timing]) -> Iterable[str]:
    predicted = {t.what: t.speedup for t in timings if t.kind == "predicted" and t.speedup}
    for timing in timings:
        if timing.kind == "measured" and timing.speedup and timing.what in predicted:
            off = predicted[timing.what] / timing.speedup - 1
            way = "more" if off > 0 else "less"
            yield f'<p class="hint">{escape(timing.what)}: the speed-up predicted is {abs(off):.1%} {way} than that measured.</p>'


def _cell(tag: str, text: str) -> str:
    kind = {"#": "r", "~": "x"}.get(text[:1], "")
    return f"<{tag}{_class(kind)}>{text[1:] if kind else text}</{tag}>"


def _class(names: str) -> str:
    return f' class="{names}"' if names else ""
