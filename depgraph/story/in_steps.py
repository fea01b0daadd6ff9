"""A story of a model that was pruned in steps: its layers and axes before the first and after the last, and every step."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

from depgraph.axes import Axis
from depgraph.cutting.report import Check
from depgraph.dependency import DependencyGraph
from depgraph.inspecting import Inspection
from depgraph.layers import Anatomy, Layer, block_of
from depgraph.story.parts import AxisCut, LayerWidths, Stage, Story
from depgraph.story.telling import cut_of
from depgraph.widths import Cost


class Done(Protocol):
    """A step that is done, such as an `importance.schedule.Step`: what it was to keep, by metric, and what it left."""

    @property
    def number(self) -> int: ...

    @property
    def keep(self) -> dict[str, float]: ...

    @property
    def cost(self) -> Cost: ...

    @property
    def check(self) -> Check | None: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    def left(self, before: Cost) -> dict[str, float]: ...


def tell_steps(graph: DependencyGraph, model: Any, steps: Iterable[Done]) -> Story:
    """What steps took away from the model of a graph, of which `model` is left; parts are added as to that of `tell`.

    Which groups went isn't told, as each step numbers anew those that are left. Raises as `depgraph.trace` does.
    """
    found, after, done = Inspection(graph), graph.again(model), list(steps)
    family = {axis.name: k for k, one in enumerate(found.families) for axis in one.axes}
    checks = [step.check for step in done if step.check is not None]
    return Story(
        model=graph.name,
        before=graph.dense_cost,
        after=done[-1].cost,
        form="in steps",
        families=tuple(one.what for one in found.families),
        layers=tuple(_layers(found.anatomy, Anatomy(after), family)),
        axes=tuple(_axes(found, after.axes, family)),
        check=max(checks, key=lambda check: check.error, default=None),
        steps=stages(done, graph.dense_cost),
        notes=tuple(dict.fromkeys(note for step in done for note in step.notes)),
    )


def stages(steps: Iterable[Done], dense: Cost) -> tuple[Stage, ...]:
    """The steps as a report lists them."""
    return tuple(_stage(step, dense) for step in steps)


def _stage(step: Done, dense: Cost) -> Stage:
    error = None if step.check is None else step.check.error
    return Stage(step.number, dict(step.keep), step.left(dense), error)


def _layers(before: Anatomy, after: Anatomy, family: Mapping[str, int]) -> Iterator[LayerWidths]:
    """The layers that are there before, with their widths then and now."""
    now = {layer.name: layer for layer in after.layers}
    for layer in before.layers:
        left = now.get(layer.name)
        yield LayerWidths(
            layer.name,
            block_of(layer.name),
            layer.op,
            (layer.params, left.params if left is not None else 0),
            _widths((before, layer.out), (after, left.out if left is not None else None)),
            _widths((before, layer.into), (after, left.into if left is not None else None)),
            _family(before, layer, "out", family),
            _family(before, layer, "into", family),
            gone=left is None,
        )


def _widths(before: tuple[Anatomy, int | None], after: tuple[Anatomy, int | None]) -> tuple[int, int] | None:
    sizes = [None if dim is None else anatomy.size(dim) for anatomy, dim in (before, after)]
    return None if sizes[0] is None else (sizes[0], sizes[1] or 0)


def _family(anatomy: Anatomy, layer: Layer, side: str, family: Mapping[str, int]) -> int | None:
    """The family of the first axis that reaches a side."""
    dim = getattr(layer, side)
    names = anatomy.graph.widths.axes_of(dim) if dim is not None else ()
    return family[names[0]] if names else None


def _axes(found: Inspection, after: Iterable[Axis], family: Mapping[str, int]) -> Iterator[AxisCut]:
    """The axes of before; one that has no counterpart under its name, or the only one of it, isn't told."""
    now: dict[str, list[int]] = {}
    for axis in after:
        now.setdefault(_stem(axis.name), []).append(axis.size)
    for axis in found.graph.axes:
        left = now.get(_stem(axis.name), [])
        if len(left) != 1 or left[0] > axis.size:
            continue
        gone = axis.size - left[0]
        share = float(f"{gone / max(axis.size, 1):.6g}")
        yield replace(cut_of(axis, found, family[axis.name], gone), map=(share,))


def _stem(name: str) -> str:
    """The name without the range of indices that it is of, which a cut changes."""
    return re.sub(r"\[\d+:\d+\]", "", name)
