"""A story from what is at hand after a cut: the graph's layers and axes, the plan, the report, the scores."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from importlib import metadata
from math import prod

import numpy as np

from depgraph.axes import Axis
from depgraph.cutting.report import CutReport
from depgraph.inspecting import Inspection
from depgraph.layers import Layer, block_of
from depgraph.plan import Plan
from depgraph.scoring import Scores
from depgraph.story.parts import AxisCut, Dropped, LayerWidths, Story

PLACES = 64
PACKAGES = ("depgraph", "torch", "transformers", "numpy", "onnx", "onnxruntime")


def tell(plan: Plan, report: CutReport | None = None, scores: Scores | None = None) -> Story:
    """What a plan takes away and where; with the report of its cut, what was checked.

    `scores` are those that the plan was made by: axis name -> array [groups]. All other parts of a story are added with
    `story.with_(timings=..., tradeoff=..., making=...)`.
    """
    graph, found = plan.graph, Inspection(plan.graph)
    family = {axis.name: k for k, one in enumerate(found.families) for axis in one.axes}
    return Story(
        model=graph.name,
        before=report.before if report is not None else graph.dense_cost,
        after=report.after if report is not None else plan.cost(),
        form=report.form if report is not None else "",
        families=tuple(one.what for one in found.families),
        layers=tuple(_Layers(plan, found, family).all()),
        axes=tuple(_axes(plan, found, family, scores or {})),
        dropped=tuple(_dropped(plan)),
        check=report.check if report is not None else None,
        notes=(*plan.notes, *(report.notes if report is not None else ())),
    )


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """The versions of Python and of those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


class _Layers:
    """The layers of a graph with their widths before and after a plan."""

    def __init__(self, plan: Plan, found: Inspection, family: Mapping[str, int]) -> None:
        self.graph, self.found, self.family = plan.graph, found, family
        self.kept = plan.kept()
        self.gone = self.graph.left_out(plan.branches).parameters if plan.branches else frozenset[str]()
        self.values = {v.target: v for v in self.graph.capture.program.values.values() if v.kind == "parameter"}

    def all(self) -> Iterator[LayerWidths]:
        return (self._one(layer) for layer in self.found.anatomy.layers)

    def _one(self, layer: Layer) -> LayerWidths:
        gone = layer.target in self.gone
        after = 0 if gone else prod(self.kept.shape(self.values[layer.target]))
        sides = {
            "out": self._widths(layer.out, gone),
            "into": self._widths(layer.into, gone),
            "out_family": self._family(layer.out),
            "into_family": self._family(layer.into),
        }
        return LayerWidths(
            layer.name,
            block_of(layer.name),
            layer.op,
            (layer.params, after),
            gone=gone,
            **sides,  # type: ignore[arg-type]
        )

    def _widths(self, dim: int | None, gone: bool) -> tuple[int, int] | None:
        return None if dim is None else (self.found.anatomy.size(dim), 0 if gone else self.kept.size(dim))

    def _family(self, dim: int | None) -> int | None:
        """The family of the axis that reaches most of a dim."""
        names = self.graph.widths.axes_of(dim) if dim is not None else ()
        number = self.found.anatomy.class_of(dim) if dim is not None else 0
        reach = {name: int((self.graph[name].labels[number] >= 0).sum()) for name in names}
        return self.family[max(reach, key=reach.__getitem__)] if reach else None


def cut_of(axis: Axis, found: Inspection, family: int, removed: int) -> AxisCut:
    """What an axis is, and how many of its groups went."""
    said = found.descriptions[axis.name]
    return AxisCut(
        name=axis.name,
        what=str(said),
        block=block_of(f"{said.where}.") if said.where else "",
        family=family,
        groups=axis.size,
        removed=removed,
        fixed=int((~axis.prunable).sum()),
    )


def _axes(plan: Plan, found: Inspection, family: Mapping[str, int], scores: Scores) -> Iterator[AxisCut]:
    for axis in plan.graph.axes:
        gone = np.zeros(axis.size)
        gone[list(plan.removal.get(axis.name, ()))] = 1
        free, given = np.flatnonzero(axis.prunable), scores.get(axis.name)
        ranked = free[np.argsort(np.asarray(given)[free], kind="stable")] if given is not None else free[:0]
        yield replace(
            cut_of(axis, found, family[axis.name], int(gone.sum())),
            map=_means(gone),
            scores=_means(np.asarray(given)[ranked]) if given is not None else (),
            gone=_means(gone[ranked]),
        )


def _means(values: np.ndarray) -> tuple[float, ...]:
    """Means of up to `PLACES` stretches of an array, as even as can be, to six digits."""
    if not len(values):
        return ()
    parts = np.array_split(values.astype(np.float64), min(len(values), PLACES))
    return tuple(float(f"{part.mean():.6g}") for part in parts)


def _dropped(plan: Plan) -> Iterator[Dropped]:
    """The blocks and branches of a model that loses some of them."""
    if not plan.branches:
        return
    for kind, parts in (("block", plan.graph.blocks), ("branch", plan.graph.branches)):
        for part in parts:
            yield Dropped(part.name, kind, part.params, part.macs, part.name in plan.branches)
