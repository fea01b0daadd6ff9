"""One run of a captured program with some axes cut and others filled with zeros, on the original weights."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.fx import Node
from torch.fx.node import map_arg

from depgraph.cutting.rewriting import call_arguments, rewrite
from depgraph.cutting.slicing import positions, sliced_tensor, widened
from depgraph.graph import Program, Value
from depgraph.operators import operator_name
from depgraph.widths import Kept

if TYPE_CHECKING:
    from depgraph.cutting.script import Script

Masks = dict[str, list[tuple[int, np.ndarray]]]  # for each operand of an operator: dims, and where zeros are filled in
_WEIGHTED = frozenset(["linear", "mm", "matmul", "addmm", "conv1d", "conv2d", "conv3d", "embedding"])
_HEAVIER = 8  # from this ratio on it costs less to fit what a weight is multiplied with to the weight than to slice it


class Side:
    """Which axes are cut (`sliced`) and which are filled with zeros where an operator contracts over them (`zeroed`)."""

    def __init__(self, sliced: Kept, zeroed: Kept) -> None:
        self.sliced = sliced
        self.zeroed = zeroed
        self._gone: dict[int, np.ndarray] = {}

    def masks(self, program: Program) -> dict[str, Masks]:
        """For each operator and operand, the positions to fill with zeros, after slicing.

        One operand of a product is enough, the smallest one: what zeros are multiplied with doesn't matter.
        """
        found: dict[tuple[str, int], list[tuple[int, Value, int, frozenset[str]]]] = {}
        for c in program.relations.contractions if self.zeroed.masks else ():
            value = program.values[c.operand]
            axes = frozenset(self.zeroed.widths.axes_of(value.dim(c.dim))) & self.zeroed.masks.keys()
            if axes:
                size = math.prod(value.shape)
                found.setdefault((c.op, c.product), []).append((size, value, c.dim, axes))
        masks: dict[str, Masks] = {}
        for (op, _), operands in found.items():
            covered: frozenset[str] = frozenset()
            for _, value, dim, axes in sorted(operands, key=lambda entry: entry[0]):
                gone = self.gone(value.dim(dim))
                if len(gone) and not axes <= covered:
                    masks.setdefault(op, {}).setdefault(value.name, []).append((dim, gone))
                    covered |= axes
        return masks

    def gone(self, dim: int) -> np.ndarray:
        """Where in the sliced dim the indices stand that are zeroed."""
        number = self.zeroed.widths.class_of(dim)
        if number not in self._gone:
            stays, here = self.zeroed.of_class(number), self.sliced.of_class(number)
            size = self.sliced.size(dim)
            left = np.zeros(size, dtype=bool)
            left[slice(None) if stays is None else positions(here, stays)] = True
            self._gone[number] = np.flatnonzero(~left)
        return self._gone[number]

    def narrowed(self) -> frozenset[str]:
        """Names in the graph of the values that are smaller than in the original."""
        return frozenset(self.sliced.smaller()) if self.sliced.masks else frozenset()


class Called(NamedTuple):
    """An operator and what it is called with; with weights `whole`, of which the result must be cut."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    whole: bool = False

    def make(self) -> Any:
        """Call it."""
        args = self.args
        if self.target is torch.ops.aten.view_as_complex.default:  # asks for even strides, which a cut may make odd
            args = (args[0] if _has_even_strides(args[0]) else args[0].clone(memory_format=torch.contiguous_format),)
        return self.target(*args, **self.kwargs)


def _has_even_strides(tensor: torch.Tensor) -> bool:
    return not any(stride % 2 for stride in (*tensor.stride()[:-1], tensor.storage_offset()))


class SideRun:
    """A side while its program runs: what every node made, and what each operator must be called with.

    Tensors of the model stay whole in `env`; they are cut where they are used.
    """

    def __init__(self, side: Side, program: Program, script: Script) -> None:
        self.values = program.values
        self.plain = script.plain
        self.cheaper = script.cheaper
        self.sliced = side.sliced
        self.masks = side.masks(program)
        self.narrowed = side.narrowed()
        self.cutting: set[Node] = set()
        for node in script.nodes if self.narrowed else ():
            if not self.narrowed.isdisjoint(_results(node)):
                self.cutting.update((node, *node.users))
        self.env: dict[Node, Any] = {}
        self.copies: dict[
            Node, tuple[Any, ...]
        ] = {}  # of views whose positions no view has any more: what was copied, dim, index
        self.stored: set[Node] = set()

    def differs(self, node: Node) -> bool:
        """Is `node` called otherwise than in the original, even when it is given the same?"""
        return node in self.cutting or node.name in self.masks

    def call(self, node: Node) -> Called:
        """What `node` is called with."""
        masks, target = self.masks.get(node.name), self.cheaper.get(node, node.target)
        if masks is None and node not in self.cutting:
            args, kwargs = filled(node, self.env, node in self.plain)
            return Called(target, args, kwargs)  # type: ignore[arg-type]
        args, kwargs = node.args, node.kwargs
        cuts = node in self.cutting and target is not operator.getitem
        whole = cuts and self._is_heavy(node)
        changed = rewrite(node, self.values, self.sliced) if cuts and not whole else None
        if changed is not None:
            target = changed.target or target
            args, kwargs = call_arguments(changed)
        take = self._whole if whole else self.cut

        def load(item: Node) -> Any:
            made = take(item)
            return made if masks is None else self._masked(made, item, masks, whole)

        return Called(target, map_arg(args, load), map_arg(kwargs, load), whole)  # type: ignore[arg-type]

    def cut(self, node: Node) -> Any:
        """What a node made, without what is gone."""
        made = self.env[node]
        if node in self.stored and node.name in self.narrowed:
            return sliced_tensor(made, self.sliced, self.values[node.name])
        return made

    def hold(self, node: Node, tensor: torch.Tensor) -> None:
        """Let a placeholder that is written to have memory of its own, cut at once: writes must reach what is read later."""
        self.env[node] = tensor
        made = self.cut(node)
        self.env[node] = tensor.clone() if made is tensor else made
        self.stored.discard(node)

    def write_back(self, view: Node) -> None:
        """Let what was written to a copy in the place of a view reach what it was taken from."""
        if view in self.copies and view in self.env:
            base, dim, index = self.copies[view]
            base.index_copy_(dim, index, self.env[view])

    def _whole(self, node: Node) -> Any:
        """What a node made, at its full size."""
        made = self.env[node]
        if node in self.stored or not isinstance(made, torch.Tensor):
            return made
        return widened(made, self.sliced, self.values[node.name])

    def _masked(self, made: Any, node: Node, masks: Masks, whole: bool) -> Any:
        """An operand filled with zeros where groups are gone."""
        value = self.values.get(node.name)
        for dim, gone in masks.get(value.name, ()) if value is not None else ():
            here = self.sliced.of(value, dim) if whole else None  # type: ignore[arg-type]
            at = gone if here is None else here[gone]
            made = made.index_fill(dim, torch.from_numpy(at).to(made.device), 0)
        return made

    def _is_heavy(self, node: Node) -> bool:
        """Is a weight that would be sliced far larger than what it is multiplied with and what comes out?

        Then the product is taken with the whole weight: zeros where indices had gone add nothing, and what comes out for
        such is dropped.
        """
        if operator_name(node.target) not in _WEIGHTED:
            return False
        stored = [self.values[n.name] for n in node.all_input_nodes if n in self.stored]
        moving = [self.values[n.name] for n in (node, *node.all_input_nodes) if n not in self.stored]
        large = max(stored, key=lambda v: math.prod(v.shape), default=None)
        if large is None or large.name not in self.narrowed:
            return False
        return math.prod(large.shape) > _HEAVIER * sum(math.prod(v.shape) for v in moving)


def filled(node: Node, env: Mapping[Node, Any], plain: bool) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """A node's arguments with what nodes made in their place; a `plain` one has them nowhere within a list or the like."""
    if not plain:
        return map_arg(node.args, env.__getitem__), map_arg(node.kwargs, env.__getitem__)
    args = tuple([env[one] if type(one) is Node else one for one in node.args])
    kwargs = node.kwargs
    return args, {k: env[one] if type(one) is Node else one for k, one in kwargs.items()} if kwargs else kwargs


def _results(node: Node) -> list[str]:
    """Names of the values that a node makes."""
    made = node.meta.get("val")
    return [f"{node.name}:{k}" for k in range(len(made))] if isinstance(made, (tuple, list)) else [node.name]
