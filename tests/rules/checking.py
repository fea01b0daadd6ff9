"""Tries what a rule says about an operator against the operator itself.

Every tensor of a sample is taken for a parameter, so that the library's own coupling finds the axes of this one call.
For each axis some groups are removed: the operator on the narrowed inputs must give what it gives on the whole inputs,
seen at the kept indices, when the removed indices hold NaN there (zeros where the rule says they are summed). An axis
that the rule calls mixed has no such equality: there two groups change places, in all inputs and in the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from depgraph import rules
from depgraph.axes import Axis, build_axes
from depgraph.capture.lowering import op_of
from depgraph.classes import NONE, Classes
from depgraph.cutting.rewriting import rewrite
from depgraph.graph import Program, Value
from depgraph.operators import is_pointwise
from depgraph.widths import Kept, Widths
from tests.rules.sample import Sample, T


@dataclass
class Tried:
    """A sample called once and lowered: its graph node, its tensors by node name, its values by label, its axes."""

    sample: Sample
    graph: Graph = field(default_factory=Graph)
    program: Program = field(default_factory=Program)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    labels: dict[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        operator = self.sample.operator
        declared = [a.name for a in operator._schema.arguments]
        args = tuple(self._argument(name, a) for name, a in zip(declared, self.sample.args, strict=False))
        kwargs = {name: self._argument(name, a) for name, a in self.sample.kwargs.items()}
        self.operator: Any = operator
        self.node: Node = self.graph.call_function(operator, args, kwargs)
        self.results = self.call(self.tensors, {})
        self.node.meta["val"] = self._raw
        self.outputs = [self._output(k, result) for k, result in enumerate(self.results)]
        self._lower()
        self.classes = Classes.of(self.program)
        self.axes = build_axes(self.program, self.classes)
        self.widths = Widths(self.program, self.classes, self.axes)

    def _argument(self, label: str, given: Any) -> Any:
        if isinstance(given, list):
            return [self._argument(f"{label}{k}", item) for k, item in enumerate(given)]
        if not isinstance(given, T):
            return given
        node = self.graph.placeholder(label)
        tensor = node.meta["val"] = self.tensors[node.name] = given.make()
        self.labels[label] = self._value(node.name, label, tensor)
        return node

    def _value(self, name: str, label: str, tensor: torch.Tensor) -> Value:
        return self.program.add(name, "parameter", tuple(tensor.shape), itemsize=tensor.dtype.itemsize, target=label)

    def _output(self, k: int, result: torch.Tensor) -> Value:
        many = isinstance(self._raw, (tuple, list))
        label = f"out{k}" if many else "out"
        self.labels[label] = self._value(f"{self.node.name}:{k}" if many else self.node.name, label, result)
        return self.labels[label]

    def _lower(self) -> None:
        op = op_of(self.node, SimpleNamespace(program=self.program, constants={}))  # type: ignore[arg-type]
        op.outputs = self.outputs
        pointwise = is_pointwise(self.sample.operator)
        rule = rules.lookup(op.target) or (rules.lookup("aten.where") if pointwise else None)
        assert rule is not None, f"no rule for {op.target}"
        rule(op)

    def call(self, tensors: dict[str, torch.Tensor], changes: dict[str, Any], target: Any = None) -> list[torch.Tensor]:
        """The tensor results of the operator on `tensors` with some of its other arguments changed."""

        def load(item: Any) -> Any:
            return tensors[item.name].clone() if isinstance(item, Node) else item

        operator = self.operator if target is None else target
        declared = operator._schema.arguments
        named = changes if target else {
            **dict(zip([a.name for a in declared], self.node.args, strict=False)), **self.node.kwargs, **changes
        }  # fmt: skip
        named = pytree.tree_map(load, named, is_leaf=lambda x: isinstance(x, Node))
        keyword = {a.name: named[a.name] for a in declared if a.kwarg_only and a.name in named}
        args = []
        for a in declared:
            if not a.kwarg_only:
                args.append(named.get(a.name, a.default_value))
        self._raw = operator(*args, **keyword)
        found = self._raw if isinstance(self._raw, (tuple, list)) else [self._raw]
        return [r for r in found if isinstance(r, torch.Tensor)]

    def dims(self) -> Iterator[tuple[str, Value, int]]:
        """The names of all dims that could be narrowed."""
        for label, value in self.labels.items():
            for d, size in enumerate(value.shape):
                if size > 1:
                    yield f"{label}.{d}", value, d

    def reaching(self, value: Value, d: int) -> list[Axis]:
        """The axes that reach a dim and have a group there that may go."""
        number = int(self.classes.of_dim[value.dim(d)])
        axes = [axis for axis in self.axes if number in axis.labels]
        return [a for a in axes if (n := a.labels[number][a.labels[number] != NONE]).size and a.prunable[n].any()]


def said(tried: Tried) -> tuple[str, str, str]:
    """What the rule says, in the form of `Sample.fixed`, `mixed` and `tied`."""
    fixed, mixed, tied = [], [], []
    for name, value, d in tried.dims():
        axes = tried.reaching(value, d)
        if not axes:
            fixed.append(name)
            continue
        if not all(axis.exact for axis in axes):
            mixed.append(name)
        number = int(tried.classes.of_dim[value.dim(d)])
        apart = len(np.unique(np.stack([axis.labels[number] for axis in axes]), axis=1).T)
        if apart < value.shape[d]:
            tied.append(f"{name}:{apart}")
    everything = len(fixed) == sum(1 for _ in tried.dims())
    return "*" if fixed and everything else " ".join(fixed), " ".join(mixed), " ".join(tied)


def check(tried: Tried) -> None:
    """Raises AssertionError where the operator doesn't do what its rule says."""
    for removal in removals(tried):
        try:
            check_removal(tried, removal)
        except Exception as error:
            raise AssertionError(f"without {removal}: {error}") from error
    for axis in tried.axes:
        if not axis.exact:
            check_exchange(tried, axis)


def removals(tried: Tried) -> Iterator[dict[str, list[int]]]:
    """For each axis alone its first group that may go, then every other one; then something of all axes at once."""
    some = {}
    for axis in tried.axes:
        free = np.flatnonzero(axis.prunable).tolist()
        if not free:
            continue
        yield {axis.name: free[:1]}
        most = free[1::2]
        if most:
            yield {axis.name: most}
        some[axis.name] = free[-1:]
    for chosen in ([a.name for a in tried.axes if a.exact], [a.name for a in tried.axes]):
        together = {name: some[name] for name in chosen if name in some}
        if len(together) > 1:
            yield together


def check_removal(tried: Tried, removal: dict[str, list[int]]) -> None:
    """The operator on narrowed inputs gives the narrowed result."""
    kept = tried.widths.at(removal)
    exact = all(tried.widths.axes[name].exact for name in removal)
    narrow, whole = {}, {}
    for label, value in tried.labels.items():
        if label in _argument_labels(tried):
            tensor = tried.tensors[value.name]
            narrow[value.name] = _narrowed(tensor, value, kept)
            whole[value.name] = _poisoned(tried, tensor, value, kept) if exact else tensor
    results = tried.call(narrow, *_changes(tried, kept))
    expected = tried.call(whole, {})
    for value, result, reference in zip(tried.outputs, results, expected, strict=True):
        assert tuple(result.shape) == kept.shape(value), (
            f"{value.name} has shape {tuple(result.shape)}, not {kept.shape(value)}"
        )
        if exact:
            torch.testing.assert_close(
                result, _narrowed(reference, value, kept), rtol=1e-9, atol=1e-9, check_stride=False
            )


def _argument_labels(tried: Tried) -> list[str]:
    return [label for label in tried.labels if tried.labels[label].name in tried.tensors]


def _changes(tried: Tried, kept: Kept) -> tuple[dict[str, Any], Any]:
    if tried.sample.cut is not None:
        return tried.sample.cut(lambda label: kept.shape(tried.labels[label])), None
    sized = rewrite(tried.node, tried.program.values, kept)
    return ({}, None) if sized is None else (sized.changes, sized.target)


def _narrowed(tensor: torch.Tensor, value: Value, kept: Kept) -> torch.Tensor:
    for d in range(tensor.ndim):
        indices = kept.of(value, d)
        if indices is not None:
            tensor = tensor.index_select(d, torch.from_numpy(indices))
    return tensor


def _poisoned(tried: Tried, tensor: torch.Tensor, value: Value, kept: Kept) -> torch.Tensor:
    """The sample's poison, NaN by default, at the removed indices; zeros instead along the dims that the operator sums."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    summed = {c.dim for c in tried.program.relations.contractions if c.operand == value.name}
    for zeroed in (False, True):
        for d in range(tensor.ndim):
            indices = kept.of(value, d)
            if indices is not None and (d in summed) is zeroed:
                gone = np.setdiff1d(np.arange(value.shape[d]), indices)
                tensor = tensor.index_fill(d, torch.from_numpy(gone), 0.0 if zeroed else tried.sample.poison)
    return tensor


def check_exchange(tried: Tried, axis: Axis) -> None:
    """Two groups of an axis that is mixed change places in the inputs, and so they do in the results."""
    free = np.flatnonzero(axis.prunable)
    a, b = int(free[0]), int(free[-1])
    orders = {}
    for value in tried.labels.values():
        for d in range(len(value.shape)):
            labels = axis.labels.get(int(tried.classes.of_dim[value.dim(d)]))
            if labels is None:
                continue
            order, one, other = np.arange(len(labels)), np.flatnonzero(labels == a), np.flatnonzero(labels == b)
            order[one], order[other] = other, one
            orders[value.name, d] = torch.from_numpy(order)

    def exchanged(tensor: torch.Tensor, value: Value) -> torch.Tensor:
        labels = None if value.domain is None else axis.labels.get(int(tried.classes.of_dim[value.domain]))
        if labels is not None:  # numbers that are indices of the axis: the two change places among them too
            first, last = np.flatnonzero(labels == a)[0], np.flatnonzero(labels == b)[0]
            tensor = torch.where(tensor == first, last, torch.where(tensor == last, first, tensor))
        for d in range(tensor.ndim):
            if (value.name, d) in orders:
                tensor = tensor.index_select(d, orders[value.name, d])
        return tensor

    inputs = {v.name: exchanged(tried.tensors[v.name], v) for v in tried.labels.values() if v.name in tried.tensors}
    for value, result, before in zip(tried.outputs, tried.call(inputs, {}), tried.results, strict=True):
        torch.testing.assert_close(result, exchanged(before, value), rtol=1e-9, atol=1e-9, check_stride=False)
