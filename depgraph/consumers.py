"""Where a program multiplies what flows with what it is weighed by: which channels meet which columns.

A *consumer* is a dim that some operator sums over, in a product with another operand: the input channels of a linear map or
a convolution, or what queries and keys meet in. Activation-based criteria look at what comes in there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from depgraph.graph import Program, Value


@dataclass(frozen=True)
class Meeting:
    """Operator `op` sums dimension `dim` of value `operand` against dimension `other_dim` of value `other`.

    `other` is computed from weights alone where `stored`; then `weight` names the parameter it is made of (empty if there are
    several) and `weight_dim` the dimension of it that is summed over. `module` and `where` say where the operator stands.
    `second`: the operand is the second of the two, of a convolution what slides.
    """

    op: str
    operand: str
    dim: int
    other: str
    other_dim: int
    stored: bool
    weight: str
    weight_dim: int
    module: str
    where: str
    second: bool = False

    @property
    def key(self) -> tuple[str, int]:
        """What is counted together: all that meets one dim of one parameter, else what meets in this operator alone."""
        return (self.weight, self.weight_dim) if self.weight else (f"{self.op}:{self.operand}", self.dim)

    def __str__(self) -> str:
        place = f" at {self.where}" if self.where else ""
        return f"the input of {self.weight or self.module or self.op}{place}"


def meetings(program: Program, nodes: Iterable[Node]) -> list[Meeting]:
    """All products of two operands in a program, once for each operand that depends on its inputs, in their order."""
    listed = list(nodes)
    ops = {node.name for node in listed if node.op == "call_function"}
    made_of = _weights(program, listed)
    products: dict[tuple[str, int], list[tuple[Value, int]]] = {}
    for c in program.relations.contractions:
        products.setdefault((c.op, c.product), []).append((program.values[c.operand], c.dim))
    strides = _strides(program, listed)
    found = []
    for (op, _), operands in products.items():
        if op not in ops or len(operands) != 2:
            continue
        for second, (operand, other) in enumerate((operands, operands[::-1])):
            if operand[0].name not in made_of:
                weights = made_of.get(other[0].name)
                summed = _summed(program, weights or frozenset(), other, strides)
                meeting = _meeting(program, op, operand, other, weights is not None, summed)
                found.append(replace(meeting, second=bool(second)))
    return found


def _meeting(
    program: Program,
    op: str,
    operand: tuple[Value, int],
    other: tuple[Value, int],
    stored: bool,
    summed: tuple[str, int],
) -> Meeting:
    place = program.values.get(op) or operand[0]
    return Meeting(
        op=op,
        operand=operand[0].name,
        dim=operand[1],
        other=other[0].name,
        other_dim=other[1],
        stored=stored,
        weight=summed[0],
        weight_dim=summed[1],
        module=place.module,
        where=place.where,
    )


def _summed(
    program: Program, weights: frozenset[str], other: tuple[Value, int], strides: dict[str, tuple[int, ...]]
) -> tuple[str, int]:
    """The parameter, and its dim, that an operand made of `weights` is summed over in; empty unless it is one parameter's.

    Where several dims of it are aligned with that (a square weight within one stream), it is the dim with the same stride.
    """
    value, dim = other
    wanted = program.relations.find(value.dim(dim))
    held = [program.values[name] for name in weights if program.values[name].kind == "parameter"]
    fits = [(v, d) for v in held for d, at in enumerate(v.dims) if program.relations.find(at) == wanted]
    if value in held:
        fits = [(value, dim)]
    if len(fits) > 1:
        fits = [
            (v, d) for v, d in fits if strides.get(v.name, ())[d : d + 1] == strides.get(value.name, ())[dim : dim + 1]
        ]
    named = {(program.ties.get(v.target, v.target), d) for v, d in fits}
    return next(iter(named)) if len(named) == 1 else ("", 0)


def _strides(program: Program, nodes: list[Node]) -> dict[str, tuple[int, ...]]:
    """How the values of a program lie in memory."""
    found: dict[str, tuple[int, ...]] = {}
    for node in nodes:
        made, value = node.meta.get("val"), program.values.get(node.name)
        if isinstance(made, torch.Tensor) and value is not None and made.layout == torch.strided:
            found.setdefault(value.name, tuple(made.stride()))
    return found


def _weights(program: Program, nodes: list[Node]) -> dict[str, frozenset[str]]:
    """The values that no input reaches, each with the stored values that it is computed from."""
    made_of: dict[str, frozenset[str]] = {}
    from_inputs: set[Node] = set()
    held: dict[Node, frozenset[str]] = {}
    for node in nodes:
        value = program.values.get(node.name)
        if node.op in ("placeholder", "get_attr"):
            if value is None or value.kind == "input":
                from_inputs.add(node)
                continue
            held[node] = frozenset([value.name])
        elif from_inputs.isdisjoint(node.all_input_nodes) and node.op == "call_function":
            held[node] = frozenset().union(*(held.get(parent, frozenset()) for parent in node.all_input_nodes))
        else:
            from_inputs.add(node)
            continue
        if value is not None and held[node]:
            made_of.setdefault(value.name, held[node])
    return made_of
