"""Numbers that say how many indices there are to point to, after a cut: further rows of the table in `rewriting`."""

from __future__ import annotations

from torch.fx import Node

from depgraph.cutting.rewriting import Sized, rewrites
from depgraph.operators import by_name


@rewrites("embedding")
def _padding(op: Sized) -> None:
    """The row that is never trained, where rows have gone."""
    assert op.source is not None
    row = op.arguments["padding_idx"]
    if row is not None and row >= 0 and op.narrowed(op.source, 0):
        kept = op.indices(op.source, 0)
        new = int((kept < row).sum()) if row in kept else -1
        if new != row:
            op.changes["padding_idx"] = new


@rewrites("one_hot")
def _places(op: Sized) -> None:
    """How many numbers there are places for."""
    if op.narrowed(op.outputs[0], len(op.outputs[0].shape) - 1):
        op.changes["num_classes"] = op.shape(op.outputs[0])[-1]


@rewrites("histc")
def _bins(op: Sized) -> None:
    """A bin for each number from 0 on."""
    if op.arguments["bins"] != (count := op.shape(op.outputs[0])[0]):
        op.changes |= {"bins": count, "max": count - 1}


def counts_indices(node: Node) -> bool:
    """Is this a histogram with a bin for each number from 0 on, so that its largest number follows from how many there are?"""
    if not str(node.target).startswith("aten.histc"):
        return False
    given = by_name(node)
    return bool(given["min"] == 0 and given["max"] == given["bins"] - 1)
