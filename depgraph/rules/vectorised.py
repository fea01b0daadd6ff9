"""torch.func.vmap: within, a tensor is seen without the dim that is mapped over; outside, it has that dim."""

from __future__ import annotations

from depgraph.graph import Value
from depgraph.rules.registry import Op, rule

_MAPPED = "torch.func.vmap maps over it"


@rule("torch._add_batch_dim")
def enter(op: Op) -> None:
    """(tensor, dim, level): the tensor without `dim`."""
    source = op.inputs[0]
    _beside(op, source, op["1"] % len(source.shape), op.output)


@rule("torch._remove_batch_dim")
def leave(op: Op) -> None:
    """(tensor, level, size, dim): the tensor with `dim` again."""
    _beside(op, op.output, op["3"] % len(op.output.shape), op.inputs[0])


def _beside(op: Op, whole: Value, mapped: int, part: Value) -> None:
    op.fix(whole, mapped, _MAPPED)
    rest = [d for d in range(len(whole.shape)) if d != mapped]
    for d, of_whole in enumerate(rest):
        op.relations.align(part.dim(d), whole.dim(of_whole))
