"""Running the model that was traced, or its cut copy, on the example inputs, and leaving no trace of that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from depgraph.capture.capturing import quiet
from depgraph.capture.deciding import following
from depgraph.capture.exported import decisions_of
from depgraph.capture.recording import Call, replay
from depgraph.cutting.mutating import writes

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph


def rerun(graph: DependencyGraph, model: nn.Module) -> tuple[list[torch.Tensor], list[Call]]:
    """The output tensors and the torch calls of one forward that decides as the traced one did.

    After the outputs come the floating tensors that it decides by.

    Inputs and buffers that it writes to are put back.
    """
    exported = graph.capture.exported
    placeholders = {spec.arg.name: spec.target for spec in exported.graph_signature.input_specs}
    written = {placeholders[w.root.name] for w in writes(exported.graph.nodes) if w.root.name in placeholders}
    args, kwargs = graph.args, graph.kwargs
    if None in written:
        args, kwargs = pytree.tree_map(_copied, (args, kwargs))
    names = {name for name in written if name}
    with quiet(model), torch.no_grad(), _kept(model, names), following(decisions_of(exported)) as given:
        output, calls = replay(model, args, kwargs)
    return [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)] + given, calls


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


@contextmanager
def _kept(model: nn.Module, names: set[str]) -> Iterator[None]:
    """Buffers of these names have their values again afterwards."""
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers() if name in names}
    try:
        yield
    finally:
        for buffer, value in before.values():
            buffer.copy_(value)
