"""Decisions: what a forward takes from the values of its tensors. They are made once, and taken again in the same order.

A number that the code asks for, how many boxes pass a threshold, which entries are the largest: control flow and sizes
follow from these. While a forward is captured they are written down; while another one is *following*, each is answered
with what was written down, so that both take the same way and compute what can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from depgraph.capture import proxies
from depgraph.capture.frames import where
from depgraph.errors import CheckError

_aten = torch.ops.aten
_BY_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_COMPARISONS = frozenset(["gt", "lt", "ge", "le"])
_INDICES = frozenset(["argsort", "argmax", "argmin", "multinomial", "searchsorted", "bucketize"])
_CHOICES = frozenset(
    [
        _aten.topk.default,
        _aten.sort.default,
        _aten.sort.stable,
        _aten.max.dim,
        _aten.min.dim,
        _aten.kthvalue.default,
        _aten.median.dim,
        _aten.nanmedian.dim,
        _aten.mode.default,
    ]
)
_TAKEN_APART = frozenset(
    [
        _aten.is_nonzero.default,
        _aten.nonzero_numpy.default,
        _aten.where.default,
        _aten.argwhere.default,
        _aten.one_hot.default,
        _aten.repeat_interleave.self_Tensor,
    ]
)
_HANDED_OVER = frozenset([Tensor.tolist, Tensor.numpy, Tensor.__array__])
_SCATTERS = {
    _aten.masked_scatter.default: _aten.index_put.default,
    _aten.masked_scatter_.default: _aten.index_put_.default,
}
WEIGHTS, DRAWS = -1, -2
_TORCH = ("aten", "prims", "prim")


class NotFollowed(CheckError):
    """A forward asks for other decisions than the one that is followed."""


@dataclass(frozen=True)
class Decision:
    """What an operator gave: a number, a tensor, or several.

    `inputs` are the positions of the model's inputs that it depends on, `WEIGHTS` for the floating tensors that it holds,
    `DRAWS` for random numbers. What depends on neither of the last two is the same each time.
    """

    operator: str
    where: str
    result: Any
    inputs: frozenset[int] = frozenset()


class Asked(NamedTuple):
    """Node `node` of the graph is asked by `operator` for values: along dim `dim`, or whole (None).

    `gives` names the constant of the graph that holds the answer, where it is one tensor; `module` runs the operator.
    """

    node: str
    dim: int | None
    operator: str
    where: str
    gives: str = ""
    module: str = ""


@dataclass
class Decisions:
    """The decisions of one forward, in the order in which they were made.

    `exporting` says whether the code was told that it is being exported (`torch.compiler.is_exporting()`), `among` whether
    choices among values (top-k, sort, argmax), whose sizes are known beforehand, are decisions too. `asked` are the tensors
    by whose order the code goes from then on, `noticed` says of each floating tensor by which something was decided whether
    it depends on inputs, weights or draws.
    """

    made: list[Decision] = field(default_factory=list)
    exporting: bool = True
    among: bool = True
    asked: list[Asked] = field(default_factory=list)
    noticed: list[bool] = field(default_factory=list)

    def told(self) -> AbstractContextManager[None]:
        """Within, the code is told the same."""
        return proxies.exporting_flags() if self.exporting else nullcontext()

    @property
    def inputs(self) -> tuple[int, ...]:
        """The positions of the model's inputs by whose values something was decided, `DRAWS` among them."""
        return tuple(sorted(frozenset[int]().union(*(decision.inputs for decision in self.made)) - {WEIGHTS}))

    @property
    def settled(self) -> bool:
        """Are they the same whatever the inputs and the weights hold, as long as the sizes stay?"""
        return not any(decision.inputs for decision in self.made)


def at_places(decisions: Decisions) -> str:
    """Where the code asks for values, as part of a sentence."""
    places = list(dict.fromkeys(decision.where for decision in decisions.made if decision.where))
    listed = ", ".join(places if len(places) <= 4 else [*places[:3], f"{len(places) - 3} more places"])
    return f" at {listed}" if places else ""


class Deciding(proxies.OperatorMode):
    """Sends every operator to `write`, and what depends on values to `decide` first."""

    def __init__(self, tracer: Any, decisions: Decisions) -> None:
        super().__init__(tracer)
        self.decisions = decisions

    def write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator whose result has a size known beforehand."""
        raise NotImplementedError

    def decide(self, func: Any, operands: Any, compute: Callable[[], Any], along: int | None = None) -> Any:
        """The decision that `compute` makes by the values of `operands`, between the indices of dim `along` if it is given."""
        raise NotImplementedError

    def notice(self, tensor: Tensor) -> None:
        """A floating tensor by whose values something is decided, sooner or later."""
        raise NotImplementedError

    def foreign(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operator from outside torch: one that gives integers decides, such as which boxes are left."""
        raise NotImplementedError

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operator."""
        name, tags = getattr(getattr(func, "overloadpacket", None), "__name__", ""), getattr(func, "tags", ())
        if name in _COMPARISONS or name in _INDICES or not _BY_VALUES.isdisjoint(tags):
            for tensor in (t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)):
                if tensor.is_floating_point() and func is not _aten.index.Tensor:
                    self.notice(tensor)
        if func in (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default):
            return self.write(func, (args[0], self._indices(func, args[1]), *args[2:]), kwargs)
        if func is _aten.masked_select.default:
            return self._masked(func, *args)
        if func in _SCATTERS:
            return self._scattered(func, *args)
        if func in _TAKEN_APART or proxies.must_be_apart(func, (args, kwargs)):
            with self:
                return func.decompose(*args, **kwargs)
        if func in _CHOICES and self.decisions.among:
            return self._choice(func, args, kwargs)
        if getattr(func, "namespace", "aten") not in _TORCH:
            return self.foreign(func, args, kwargs)
        if not _BY_VALUES.isdisjoint(tags) or name in _INDICES and self.decisions.among:
            along = _named(func, args, kwargs).get("dim") if name in _INDICES else None
            return self.decide(func, (args, kwargs), lambda: proxies.at_once(func, args, kwargs), along)
        return self.write(func, args, kwargs)

    def _masked(self, func: Any, given: Tensor, mask: Tensor) -> Tensor:
        """What a mask leaves, one after the other; dims at the end for which it has one number stay whole until then."""
        shape = torch.broadcast_shapes(given.shape, mask.shape)
        whole = 0
        while whole < min(mask.ndim, len(shape) - 1) and mask.shape[-1 - whole] == 1:
            whole += 1
        if whole:
            mask = self.write(_aten.reshape.default, (mask, list(mask.shape[:-whole])), {})
        given, mask = self._expanded(given, shape), self._expanded(mask, shape[: len(shape) - whole])
        left = self.write(_aten.index.Tensor, (given, self._indices(func, [mask])), {})
        return left if left.ndim == 1 else self.write(_aten.reshape.default, (left, [-1]), {})

    def _scattered(self, func: Any, given: Tensor, mask: Tensor, source: Tensor) -> Tensor:
        """What comes one after the other, at the places of a mask; dims at the end along which that is repeated stay whole."""
        shape = torch.broadcast_shapes(given.shape, mask.shape)
        whole = 0
        while whole < min(mask.ndim, len(shape) - 1) and (mask.shape[-1 - whole] == 1 or not mask.stride(-1 - whole)):
            whole += 1
        rest = list(shape[len(shape) - whole :])
        for _ in rest:
            mask = self.write(_aten.any.dim, (mask, -1), {})
        places = self._indices(func, [self._expanded(mask, shape[: len(shape) - whole])])
        rows = [len(places[0]), *rest]
        if list(source.shape) != rows:
            source = self.write(_aten.reshape.default, (source, [-1]), {})
            if len(source) > prod(rows):
                source = self.write(_aten.slice.Tensor, (source, 0, 0, prod(rows)), {})
            source = self.write(_aten.reshape.default, (source, [-1, *rest]), {}) if rest else source
        return self.write(_SCATTERS[func], (self._expanded(given, shape), places, source), {})

    def _expanded(self, tensor: Tensor, shape: torch.Size) -> Tensor:
        return tensor if tensor.shape == shape else self.write(_aten.expand.default, (tensor, list(shape)), {})

    def _indices(self, func: Any, indices: Any) -> list[Any]:
        """Masks among the indices of an operator as the positions where they are true."""
        found: list[Any] = []
        for index in indices:
            if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                found += self.decide(func, index, partial(proxies.at_once, _positions, (index,), {}))
            else:
                found.append(index)
        return found

    def _choice(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Values by where they stand, so that only the positions are decided."""
        named = _named(func, args, kwargs)
        self.notice(named["self"])
        given, dim, kept = named["self"], named.get("dim", -1), named.get("keepdim", True)
        index = self.decide(func, given, lambda: proxies.at_once(func, args, kwargs)[1], dim)
        if given.ndim == 0:
            return given, index
        wide = index if kept else self.write(_aten.unsqueeze.default, (index, dim), {})
        values = self.write(_aten.gather.default, (given, dim, wide), {})
        return (values if kept else self.write(_aten.squeeze.dim, (values, dim), {})), index


class Reading(TorchFunctionMode):
    """Within, what torch hands over without an operator (lists, arrays) is decided by `deciding` too."""

    def __init__(self, deciding: Deciding) -> None:
        super().__init__()
        self.deciding = deciding

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function."""
        if func not in _HANDED_OVER:
            return func(*args, **(kwargs or {}))
        if args[0].is_floating_point():
            self.deciding.notice(args[0])
        return self.deciding.decide(func.__name__, args[0], lambda: func(*args, **(kwargs or {})))


def copied(result: Any) -> Any:
    """A decision's result, with tensors and arrays of its own."""
    own = pytree.tree_map_only(Tensor, lambda t: proxies.at_once(Tensor.clone, (t,), {}), result)
    return pytree.tree_map_only(np.ndarray, np.copy, own)


class _Following(Deciding):
    """Decides as `decisions` say. `given` are the floating tensors that it was asked to decide by.

    What must be the same each time is decided anew, since what differs then comes from a size that isn't the same.
    """

    def __init__(self, decisions: Decisions) -> None:
        super().__init__(None, decisions)
        self.left = list(reversed(decisions.made))
        self.given: list[Tensor] = []
        self.counting = iter(decisions.noticed)

    def write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run it."""
        return proxies.at_once(func, args, kwargs)

    def foreign(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Decided before, or run."""
        decides = self.left and self.left[-1].operator == str(func)
        return (
            self.decide(func, (), lambda: self.write(func, args, kwargs)) if decides else self.write(func, args, kwargs)
        )

    def notice(self, tensor: Tensor) -> None:
        """Remember it, as far as it can be compared."""
        if next(self.counting, True):
            self.given.append(tensor)

    def decide(self, func: Any, operands: Any, compute: Callable[[], Any], along: int | None = None) -> Any:
        """What was decided before."""
        if not self.left or self.left[-1].operator != str(func):
            expected = self.left[-1].operator if self.left else "nothing"
            raise NotFollowed(
                f"at {where()} {func} depends on values where the traced forward asks for {expected}: a size that the cut changes "
                "decides there, or what the model has kept of a run since (then trace it again)"
            )
        known = self.left.pop()
        if known.inputs & {WEIGHTS, DRAWS}:
            return copied(known.result)
        made = compute()
        if not _same(made, known.result):
            raise NotFollowed(
                f"at {where()} a value comes from a size that the cut changes, by way of a tensor ({_short(known.result)} "
                f"became {_short(made)}), so that it can't be followed: protect that size's axis"
            )
        return made


def _same(made: Any, known: Any) -> bool:
    ours, theirs = ([_plain(leaf) for leaf in pytree.tree_leaves(result)] for result in (made, known))
    pairs = zip(ours, theirs, strict=False)
    return len(ours) == len(theirs) and all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in pairs)


def _plain(leaf: Any) -> np.ndarray:
    with torch._C.DisableTorchFunction():
        return np.asarray(proxies.at_once(Tensor.cpu, (leaf,), {}).tolist() if isinstance(leaf, Tensor) else leaf)


def _short(result: Any) -> str:
    leaves = pytree.tree_leaves(result)
    text = ", ".join(str(_plain(leaf).tolist()) for leaf in leaves)
    return text if len(text) <= 30 else f"{text[:27]}..."


@contextmanager
def following(decisions: Decisions | None) -> Iterator[list[Tensor]]:
    """Within, forwards decide as `decisions` say (without any, as their values say).

    Gives the list of the floating tensors that are decided by, in order, which is complete in the end.

    Raises NotFollowed where a forward asks for other decisions, or for fewer.
    """
    if decisions is None:
        yield []
        return
    mode = _Following(decisions)
    with mode, Reading(mode):
        yield mode.given
    if mode.left:
        raise NotFollowed(f"{mode.left[-1].operator} at {mode.left[-1].where} is not asked for any more")


def _positions(mask: Tensor) -> tuple[Tensor, ...]:
    return torch.nonzero(mask, as_tuple=True)


def _named(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    declared = func._schema.arguments
    named = {a.name: a.default_value for a in declared if a.has_default_value()}
    return {**named, **{a.name: given for a, given in zip(declared, args, strict=False)}, **kwargs}
