"""Pictures of depth: which sublayers and blocks go, from the input (left) to the output, and curves over what is removed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depgraph.errors import DataError, PlanError
from depgraph.files import replacing

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

_STAYS, _GOES = "#3b6ea5", "#f2f2f2"
_ORDER = ("attention", "mlp", "convolution", "other")
_TITLES = {"attention": "attention", "mlp": "MLP", "convolution": "convolution", "other": "other"}


def plot_depth(graph: DependencyGraph, gone: Sequence[str], path: str | os.PathLike[str]) -> None:
    """A column for each block by depth, a row for each kind of branch; empty where a branch is left out.

    Raises PlanError: the model has no branches. DataError: matplotlib is missing, or the file can't be written.
    """
    if not graph.branches:
        raise PlanError(f"{graph.name} has no branches to draw")
    columns, kinds = _columns(graph), [k for k in _ORDER if any(b.kind == k for b in graph.branches)]
    inside = {name for block in graph.blocks if block.name in gone for name in block.branches}
    with _figure(path, (max(4.0, 1.4 + 0.3 * (max(columns.values()) + 1)), 1.2 + 0.45 * len(kinds))) as axes:
        for branch in graph.branches:
            goes = branch.name in gone or branch.name in inside
            x, y = columns[branch.name], kinds.index(branch.kind)
            axes.add_patch(_box(x, y, _GOES if goes else _STAYS))
            if goes:
                axes.plot([x - 0.25, x + 0.25], [y - 0.25, y + 0.25], color="#b03030", lw=1.2)
                axes.plot([x - 0.25, x + 0.25], [y + 0.25, y - 0.25], color="#b03030", lw=1.2)
        axes.set_xlim(-0.7, max(columns.values()) + 0.7)
        axes.set_ylim(len(kinds) - 0.4, -0.6)
        axes.set_yticks(range(len(kinds)), [_TITLES[kind] for kind in kinds])
        axes.set_xlabel("depth: block, from the input to the output")
        number = sum(b.name in gone or b.name in inside for b in graph.branches)
        axes.set_title(f"{graph.name}: {number} of {len(graph.branches)} branches left out", fontsize=9)


def plot_curve(values: Sequence[float], names: Sequence[str], path: str | os.PathLike[str], label: str) -> None:
    """Values [removed + 1] against how many parts are removed; `names` [removed] says which went at each step.

    Raises DataError: matplotlib is missing, or the file can't be written.
    """
    with _figure(path, (max(4.5, 1.5 + 0.35 * len(values)), 3.4)) as axes:
        axes.plot(range(len(values)), values, marker="o", color=_STAYS)
        axes.set_xticks(range(len(values)), ["whole", *names], rotation=60, ha="right", fontsize=7)
        axes.set_xlabel("removed, one after the other")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)


def _columns(graph: DependencyGraph) -> dict[str, int]:
    """The column of each branch: its block's place, or the next one where its kind has been drawn already."""
    owner = {name: block.name for block in graph.blocks for name in block.branches}
    columns, taken, place, last = dict[str, int](), set[tuple[int, str]](), -1, ""
    for branch in graph.branches:
        here = owner.get(branch.name, branch.name.rpartition(".")[0])
        if here != last or (place, branch.kind) in taken:
            place, last = place + 1, here
        taken.add((place, branch.kind))
        columns[branch.name] = place
    return columns


def _box(x: int, y: int, color: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.4, y - 0.4), 0.8, 0.8, facecolor=color, edgecolor="#707070", linewidth=0.8)


@contextmanager
def _figure(path: str | os.PathLike[str], size: tuple[float, float]) -> Iterator[Any]:
    """Axes to draw on; the picture is written in the end, under a temporary name first."""
    target = Path(path)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DataError(
            f"drawing {target} needs matplotlib, which isn't installed: pip install 'depgraph[plot]'"
        ) from None
    figure = Figure(figsize=size, layout="constrained")
    yield figure.add_subplot()
    try:
        with replacing(target) as temporary:
            figure.savefig(temporary, dpi=150, format=target.suffix[1:] or "png")
    except ValueError as error:
        raise DataError(f"the picture can't be written to {target}: {error}") from error
