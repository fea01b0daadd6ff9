"""What a positive factor on one tensor changes: which power of it each result of the code holds, until none is left.

An order (`topk`, `argmax`) and a vector over its own length stay as they were, so that what reads these may go on reading a
tensor whose weights are scaled.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from depgraph.cutting.movements import ARRANGING, LIKE
from depgraph.operators import aten_name

Degree = float
Made = dict[Node, "Degree | tuple[Degree, ...]"]

_SMALL = 1e-5  # what code adds to a length so that it can divide by it
_SAME = (ARRANGING - LIKE) | {
    *("index", "gather", "unfold", "repeat", "repeat_interleave", "roll", "flip", "neg", "abs", "relu", "leaky_relu"),
    *("sum", "mean", "amax", "amin", "cumsum", "norm", "linalg_vector_norm"),
}
_JOINED = frozenset(["add", "sub", "cat", "stack", "maximum", "minimum"])
_PRODUCTS = frozenset(["mul", "matmul", "bmm", "mm", "einsum"])
_CHOSEN = frozenset(["topk", "sort", "max", "min"])  # values, and where they stood
_ORDERS = frozenset(["argmax", "argmin", "argsort"])


def settles(start: Node, ends: Mapping[Node, int]) -> bool:
    """Does a factor on `start` reach one of `ends` just once, by its operand of that number, and change nothing else?"""
    made: Made = {start: 1.0}
    waiting, seen, reached = sorted(start.users), set(start.users), False
    while waiting:
        node = heapq.heappop(waiting)
        if node in ends:
            if not _enters_once(node, ends[node], made):
                return False
            reached = True
            continue
        degree = _degree(node, made)
        if degree is None:
            return False
        made[node] = degree
        for user in node.users if degree else ():
            if user not in seen:
                seen.add(user)
                heapq.heappush(waiting, user)
    return reached


def operands(node: Node) -> list[Node]:
    """What a node takes, as often as it does."""
    return [a for a in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(a, Node)]


def _enters_once(node: Node, place: int, made: Made) -> bool:
    """Is the operand of that number the only one that holds the factor, and just once?"""
    held = [k for k, a in enumerate((*node.args, *node.kwargs.values())) if isinstance(a, Node) and made.get(a)]
    return held == [place] and made[node.args[place]] == 1.0  # type: ignore[index]


def _degree(node: Node, made: Made) -> Any:
    """The degree of what `node` makes; None where that isn't a power of the factor."""
    name = aten_name(node)
    if not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):  # an output, or a number that code goes by
        return None
    of: list[Any] = [made.get(n, 0.0) for n in node.all_input_nodes]
    if name == "getitem":
        whole = of[0]
        return whole[node.args[1]] if isinstance(whole, tuple) else whole  # type: ignore[index]
    if any(isinstance(one, tuple) for one in of):
        return None
    if name in _SAME:
        return of[0] if not any(of[1:]) and _is_continuous(node) else None
    if name in _CHOSEN and len(of) == 1:
        several = isinstance(node.meta["val"], (tuple, list))
        return (of[0], 0.0) if several else of[0]
    rule = _RULES.get(name)
    return rule(node, of) if rule is not None else None


def _is_continuous(node: Node) -> bool:
    made = node.meta["val"]
    return not isinstance(made, torch.Tensor) or made.is_floating_point() or made.is_complex()


def _joined(node: Node, of: list[Degree]) -> Degree | None:
    numbers = [a for a in node.args[:2] if isinstance(a, (int, float))] if aten_name(node) in ("add", "sub") else []
    return of[0] if len(set(of)) == 1 and all(abs(a) <= _SMALL for a in numbers) else None


def _product(node: Node, of: list[Degree]) -> Degree:
    return sum(of[node.all_input_nodes.index(a)] for a in operands(node))


def _quotient(node: Node, of: list[Degree]) -> Degree:
    if len(of) == 1:
        first = node.args[0] is node.all_input_nodes[0]
        both = all(isinstance(a, Node) for a in node.args[:2])
        return 0.0 if both else of[0] if first else -of[0]
    return of[0] - of[1]


def _power(node: Node, of: list[Degree]) -> Degree | None:
    exponent = node.args[1] if len(node.args) > 1 else None
    return of[0] * exponent if isinstance(exponent, (int, float)) and isinstance(node.args[0], Node) else None


def _bounded(node: Node, of: list[Degree]) -> Degree | None:
    bounds = [a for a in (*node.args[1:], *node.kwargs.values()) if a is not None]
    small = all(isinstance(a, (int, float)) and abs(a) <= _SMALL for a in bounds)
    return of[0] if small and len(bounds) == 1 else None


_RULES: dict[str, Callable[[Node, list[Degree]], Degree | None]] = {
    **dict.fromkeys(_JOINED, _joined),
    **dict.fromkeys(_CHOSEN, _joined),
    **dict.fromkeys(_PRODUCTS, _product),
    **dict.fromkeys(_ORDERS, lambda _, of: 0.0),
    **dict.fromkeys(("gt", "lt", "ge", "le", "eq"), lambda _, of: 0.0 if len(of) == 2 and of[0] == of[1] else None),
    **dict.fromkeys(("clamp_min", "clamp"), _bounded),
    **dict.fromkeys(("expand_as", "view_as", "type_as"), lambda _, of: of[0]),
    "div": _quotient,
    "pow": _power,
    "sqrt": lambda _, of: of[0] / 2,
    "rsqrt": lambda _, of: -of[0] / 2,
    "reciprocal": lambda _, of: -of[0],
}
