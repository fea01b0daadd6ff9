"""Which sizes of its inputs a graph form is fixed to: it and the original are run on inputs of other sizes.

A capture says which sizes it takes for numbers, not which of them the model's code would take otherwise (the width of a
weight, say), nor where a number in the graph came from a size. So both are given other sizes. Before the cut, a capture must
compute what the model does (`wrong_sizes`); after it, what the graph needs and the model doesn't is noted (`fixed_sizes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from depgraph.cutting.comparing import TOLERANCE, difference
from depgraph.cutting.draws import same_draws
from depgraph.cutting.rerunning import Inputs, rerun

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

FIXED = "the graph form is fixed to the example inputs' sizes: the model can't be captured with dynamic ones"
_MOST_TRIES = 48
Dims = frozenset[tuple[int, int]]  # which dim of which of the flattened inputs


class TakenInput(NamedTuple):
    """An input tensor as a capture takes it: numbers for sizes, and symbols where any size will do."""

    name: str
    shape: tuple[int | torch.SymInt, ...]


Taken = dict[int, TakenInput]  # by the place among the flattened inputs


def fixed_sizes(graph: DependencyGraph, model: nn.Module, inputs: Taken | None) -> tuple[str, ...]:
    """A note for every size of an input that the graph form needs and the original doesn't.

    `inputs` are the captured ones, None where no size was captured as a symbol. Of sizes past the first few dozen it is
    believed what the capture says.
    """
    if inputs is None:
        return (FIXED,)
    trial = _Trial(graph, model)
    return tuple(
        f"the graph form takes only size {trial.leaves[place].shape[d]} of dimension {d} of input {given.name!r}, where the "
        "original takes others: cut for the size that you need, or with form='module'"
        for place, given in inputs.items()
        for d, size in enumerate(given.shape)
        if trial.is_fixed(size, list(_together(inputs, place, d)))
    )


def wrong_sizes(graph: DependencyGraph, whole: nn.Module, inputs: Taken) -> Dims:
    """The open dims of the inputs at other sizes of which a capture of the original, not cut, doesn't compute what it does."""
    trial = _Trial(graph, whole)
    wrong: Dims = frozenset()
    for place, given in inputs.items():
        for d, size in enumerate(given.shape):
            dims = next(_together(inputs, place, d))
            if _symbols(size) and (place, d) not in wrong and trial.differs(dims):
                wrong |= dims
    return wrong


def _together(inputs: Taken, place: int, d: int) -> Iterator[Dims]:
    """The dims to change with one: those that share a symbol; else those of its size at its place, or it alone."""
    size = inputs[place].shape[d]
    every = [((p, k), other) for p, given in inputs.items() for k, other in enumerate(given.shape)]
    if _symbols(size):
        yield frozenset(dim for dim, other in every if _symbols(other) & _symbols(size))
        return
    yield frozenset(dim for dim, other in every if dim[1] == d and not _symbols(other) and other == size)
    yield frozenset([(place, d)])


def _symbols(size: Any) -> set[Any]:
    """None for a number, and for what was a symbol until the capture found that it must be one number."""
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


def _doubled(tensor: Tensor, d: int) -> Tensor:
    return torch.cat([tensor, tensor], d)


def _longer(tensor: Tensor, d: int) -> Tensor:
    return torch.cat([tensor, tensor.narrow(d, 0, min(3, tensor.shape[d]))], d)


def _halved(tensor: Tensor, d: int) -> Tensor:
    return tensor.narrow(d, 0, tensor.shape[d] // 2)


Vary = Callable[[Tensor, int], Tensor]


@dataclass
class _Trial:
    """Runs the original and its graph form on varied inputs, each variation once."""

    graph: DependencyGraph
    model: nn.Module
    known: dict[Dims, bool | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.leaves, self.spec = pytree.tree_flatten((self.graph.args, self.graph.kwargs))
        self.usual = [self._run(model, self.leaves) for model in (self.graph.model, self.model)]

    def is_fixed(self, size: Any, ways: list[Dims]) -> bool:
        """Is the size of these dims the only one that the graph form takes, and not the original?"""
        for dims in ways:
            if dims not in self.known and len(self.known) >= _MOST_TRIES:
                return not _symbols(size)
            if dims not in self.known:
                self.known[dims] = self._fixed(dims)
            if self.known[dims] is not None:
                return bool(self.known[dims])
        return False

    def differs(self, dims: Dims) -> bool:
        """Does the model give other numbers than the original at other sizes of these dims?"""
        return any(self._differs(dims, vary) for vary in (_doubled, _longer, _halved))

    def _differs(self, dims: Dims, vary: Vary) -> bool:
        leaves = self._varied(dims, vary)
        expected = None if leaves is None else self._run(self.graph.model, leaves)
        if leaves is None or expected is None:
            return False
        got = self._run(self.model, leaves)
        if got is None or any(t.is_meta for t in expected):  # without data there are shapes only
            return [t.shape for t in got or []] != [t.shape for t in expected]
        tolerance = max((TOLERANCE.get(t.dtype, 1e-4) for t in expected), default=1e-4)
        return not difference(got, expected) <= tolerance

    def _fixed(self, dims: Dims) -> bool | None:
        """None where the original takes no other size that was tried."""
        for vary in (_doubled, _halved):
            leaves = self._varied(dims, vary)
            whole = None if leaves is None else self._run(self.graph.model, leaves)
            if leaves is not None and whole is not None:
                cut = self._run(self.model, leaves)
                return cut is None or not self._alike(whole, cut, dims, vary)
        return None

    def _varied(self, dims: Dims, vary: Vary) -> list[Any] | None:
        leaves = list(self.leaves)
        for place, d in dims:
            if leaves[place].shape[d] < 2 and vary is _halved:
                return None
            leaves[place] = vary(leaves[place], d)
        return leaves

    def _run(self, model: nn.Module, leaves: list[Any]) -> list[Tensor] | None:
        """The outputs; None where the model doesn't run."""
        inputs: Inputs = pytree.tree_unflatten(leaves, self.spec)
        try:
            with same_draws():
                return rerun(self.graph, model, inputs)
        except Exception:
            return None

    def _alike(self, whole: list[Tensor], cut: list[Tensor], dims: Dims, vary: Vary) -> bool:
        """Have the outputs of both changed their shapes in the same way and, with twice the batch, kept their rows?"""
        before, after = (run or [] for run in self.usual)
        shapes = [[tuple(t.shape) for t in outputs] for outputs in (before, whole, after, cut)]
        if not all(_in_step(*four) for four in zip(*shapes, strict=False)):
            return False
        twice = vary is _doubled and all(d == 0 for _, d in dims)
        return not (twice and _same_rows(before, whole)) or _same_rows(after, cut)


def _in_step(before: Any, whole: Any, after: Any, cut: Any) -> bool:
    """Have all sizes grown alike?"""
    if not len(before) == len(whole) == len(after) == len(cut):
        return False
    return all(a * d == b * c for a, b, c, d in zip(before, whole, after, cut, strict=True))


def _same_rows(once: list[Tensor], twice: list[Tensor]) -> bool:
    """Are the outputs for a batch and the same batch again those for the batch, twice?"""
    pairs = [
        (a, b) for a, b in zip(once, twice, strict=False) if a.ndim and b.shape[0] == 2 * a.shape[0] and not a.is_meta
    ]
    tolerance = max((TOLERANCE.get(a.dtype, 1e-4) for a, _ in pairs), default=0.0)
    return difference([b for _, b in pairs], [_doubled(a, 0) for a, _ in pairs]) <= tolerance
