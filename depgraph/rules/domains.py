"""Tensors whose numbers are indices of some dim, their *domain*: what top-k chooses, and what is made of that.

When the domain gets smaller, the numbers are chosen anew among what is left, so whatever they point into gets smaller with
it: a router's outputs and its experts' parameters are one axis. That holds as long as each operator only moves such numbers
about, looks up where they point to, or asks whether they are at all. Any other use takes them for what they count, and then
the domain stays whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from depgraph.graph import Value
from depgraph.operators import without_overload
from depgraph.rules.registry import Op, aten

MOVES = frozenset(
    aten("""
    view reshape _unsafe_view flatten unflatten ravel _reshape_alias squeeze unsqueeze atleast_1d atleast_2d atleast_3d
    view_as reshape_as permute transpose swapaxes swapdims t numpy_T mT movedim moveaxis expand expand_as broadcast_to
    select unbind slice narrow split split_with_sizes chunk tensor_split unsafe_chunk unsafe_split unfold repeat tile
    repeat_interleave flip alias clone contiguous detach lift_fresh_copy to _to_copy type_as cpu
    index _unsafe_index index_select gather take_along_dim sort
    """)
) | {
    f"onnx.{name}"
    for name in [
        "Reshape",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Transpose",
        "Expand",
        "Slice",
        "Split",
        "Tile",
        "Identity",
        "Cast",
    ]
}
LOOKS_AT_SHAPES = frozenset(
    aten("""
    empty_like full_like ones_like zeros_like rand_like randn_like new_empty new_full new_ones new_zeros
    _assert_tensor_metadata size sym_size sym_numel sym_stride
    """)
) | {"onnx.Shape", "onnx.Size"}


_ORDERS = {
    "aten.argsort": 1,
    **dict.fromkeys(aten("eq ne lt le gt ge"), 2),
    **dict.fromkeys((f"onnx.{name}" for name in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")), 2),
}  # of so many tensors of one domain: order stays
_JOINS = frozenset(aten("cat concat concatenate stack hstack vstack dstack row_stack column_stack")) | {"onnx.Concat"}

_COMPARES = aten("eq ne lt le gt ge")
_FROM_ZERO = aten("lt ge")
_BOUNDS = aten("clamp clip clamp_max")
LEAST: Mapping[str, tuple[str, int]] = {
    **dict.fromkeys(_COMPARES, ("other", 0)),
    **dict.fromkeys(_BOUNDS, ("max", -1)),
}
"""A number that says nothing of any index, by operator: its argument, and what it is at least, beside how many indices there are."""


def follow(op: Op) -> None:
    """Give the results their domain after the operator's rule has run; fix the domains that it doesn't respect."""
    name = without_overload(op.target)
    if len(op.inputs) == _ORDERS.get(name) and len({_domain_of(op, value) for value in op.inputs}) == 1:
        op.followed.update(value.name for value in op.inputs)
    moved = op.inputs if name in _JOINS else op.inputs[:1] if name in MOVES else []
    if _says_nothing(op):
        op.followed.add(op.inputs[0].name)
        moved = op.inputs if base_name(op.target) in _BOUNDS else []
    domains = {_domain_of(op, value) for value in moved}
    if len(domains) == 1 and moved[0].domain is not None:
        for output in op.outputs[:1] if name == "aten.sort" else op.outputs:
            output.domain = moved[0].domain
        op.followed.update(value.name for value in moved)
    for value in op.inputs:
        if value.domain is not None and value.name not in op.followed and name not in LOOKS_AT_SHAPES:
            keep_whole(op, value)


def _says_nothing(op: Op) -> bool:
    index = op.inputs[0] if len(op.inputs) == 1 else None
    return index is not None and says_nothing(op.target, op.get, index, _size(op, index))


def _size(op: Op, index: Value) -> int:
    return 0 if index.domain is None else op.relations.sizes[index.domain]


def base_name(target: str) -> str:
    """An operator's name without its overload, that of another where it is the in-place form of it."""
    return without_overload(target).removesuffix("_")


def says_nothing(target: str, argument: Callable[[str], Any], index: Value, size: int) -> bool:
    """Does an operator compare one of `size` indices with a number, or bound it by one, that stands for none of them?"""
    base = base_name(target)
    name, least = LEAST.get(base, ("", 0))
    given = argument(name) if name else None
    if index.domain is None or not isinstance(given, int):
        return False
    if base in _COMPARES:
        return given >= size or given < 0 or (given == 0 and base in _FROM_ZERO)
    return given >= size + least and (argument("min") or 0) <= 0


def _domain_of(op: Op, value: Value) -> int | None:
    return None if value.domain is None else op.relations.find(value.domain)


def keep_whole(op: Op, index: Value) -> None:
    """The dim that `index` points into is fixed, since this operator counts on its numbers."""
    if index.domain is not None:
        op.relations.fix(index.domain, op.reason("what is done with its indices counts them"))
