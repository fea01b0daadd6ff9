"""Would a model that is built anew from an edited config, and given the cut weights, compute what the cut model computes?

Equal shapes of parameters don't say so: six heads of twelve have the shapes of eight of nine, and scales, rotary tables and
embedding factors follow sizes. So the model of the edited config is captured and its program compared with the original's:
the same operators, every activation of the size that the cut leaves, the same numbers, the same tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from depgraph.capture.capturing import Capture, capture
from depgraph.cutting.recounting import counts_indices
from depgraph.cutting.slicing import sliced_tensor
from depgraph.widths import Kept

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

_MANY = 1e-6


@dataclass(frozen=True)
class Repeated:
    """A model that was built anew, and its program, or `why` there is none that could be compared.

    `numbers` names the first operator that computes with other numbers than in the original.
    """

    model: nn.Module
    capture: Capture | None
    why: str = ""
    numbers: str = ""

    @classmethod
    def of(cls, graph: DependencyGraph, model: nn.Module) -> Repeated:
        """Capture `model` on the example inputs of the graph."""
        args, kwargs = pytree.tree_map(_on_cpu, (graph.args, graph.kwargs))
        try:
            again = capture(model, args, kwargs)
        except Exception as error:
            return cls(model, None, f"it doesn't run: {error}")
        before, after = (list(c.exported.graph.nodes) for c in (graph.capture, again))
        if [(n.op, str(n.target)) for n in before] != [(n.op, str(n.target)) for n in after]:
            return cls(model, None, "it runs other operators")
        other = (old.name for old, new in zip(before, after, strict=True) if [*_numbers(old)] != [*_numbers(new)])
        return cls(model, again, "", next(other, ""))

    def difference(self, graph: DependencyGraph, kept: Kept) -> str:
        """In what the model isn't that of the graph cut to `kept`; empty where it is in nothing."""
        if self.capture is None:
            return self.why
        if why := self.sizes(graph, kept):
            return why
        if self.numbers:
            return f"{self.numbers} is given other numbers"
        return _other_table(graph, self.model, self.capture, kept)

    def sizes(self, graph: DependencyGraph, kept: Kept) -> str:
        """The first activation whose size isn't what the cut leaves."""
        assert self.capture is not None
        nodes = zip(graph.capture.exported.graph.nodes, self.capture.exported.graph.nodes, strict=True)
        for old, new in nodes:
            value = graph.capture.program.values.get(old.name)
            shape = getattr(new.meta.get("val"), "shape", None)
            if value is not None and shape is not None and tuple(shape) != kept.shape(value):
                return f"{old.name} has shape {tuple(shape)}, the cut leaves {kept.shape(value)}"
        return ""


def _on_cpu(item: Any) -> Any:
    return item.cpu() if isinstance(item, torch.Tensor) and not item.is_meta else item


def _numbers(node: Node) -> Iterator[Any]:
    """The numbers that an operator computes with, as opposed to sizes and positions."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return
    for k, argument in enumerate(schema.arguments):
        given = node.args[k] if k < len(node.args) else node.kwargs.get(argument.name)
        if argument.name == "max" and counts_indices(node):
            continue
        kind = str(argument.type).removeprefix("Optional[").removesuffix("]")
        if kind in ("Tensor", "Scalar", "number", "float") and isinstance(given, (int, float, complex)):
            yield given


def _other_table(graph: DependencyGraph, model: nn.Module, again: Capture, kept: Kept) -> str:
    """The first buffer that no checkpoint holds, or constant of the code, whose values aren't those of the cut model."""
    unsaved = set(graph.capture.exported.graph_signature.non_persistent_buffers)
    values = {v.target: v for v in graph.capture.program.values.values() if v.target}
    for name in getattr(graph.model, "_keys_to_ignore_on_save", None) or ():
        if name in values and kept.shape(values[name]) != values[name].shape:
            return f"{name} isn't saved, but made anew"
    mine: Mapping[str, Any] = {**graph.capture.exported.constants, **_buffers(graph.model, unsaved)}
    theirs: Mapping[str, Any] = {**again.exported.constants, **_buffers(model, unsaved)}
    for name, old in mine.items():
        new = theirs.get(name)
        if not isinstance(old, torch.Tensor) or name not in values:
            continue
        if new is None:
            return f"it has no {name}"
        if not old.is_meta and not new.is_meta and not _same(sliced_tensor(old.detach(), kept, values[name]), new):
            return f"{name} holds other values"
    return ""


def _buffers(model: nn.Module, names: set[str]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.named_buffers(remove_duplicate=False) if name in names}


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return bool(torch.equal(a.cpu(), b.cpu()))
    return bool(torch.allclose(a.cpu().double(), b.cpu().double(), rtol=_MANY, atol=_MANY, equal_nan=True))
