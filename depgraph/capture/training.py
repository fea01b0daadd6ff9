"""What only the training forward reads, related to the rest: heads of its own, tokens that mask, auxiliary branches.

A model is captured in eval mode. Where that leaves parameters unread, it is captured in training mode too, and what its
operators say about dims then holds as well, so that a cut takes these parameters along.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from depgraph.capture.direct import capture_directly
from depgraph.capture.exported import CapturedProgram, DirectProgram
from depgraph.capture.holding import Held
from depgraph.capture.leaving import fill_what_is_left
from depgraph.capture.lowering import lower_also
from depgraph.capture.restoring import restored
from depgraph.graph import Program

Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]


def related_in_training(model: nn.Module, inputs: Inputs, program: Program, held: Held) -> Program | None:
    """`program` with the relations of the training forward; None where that can't be had, or has operators without rules."""
    exported = training_forward(model, inputs)
    if exported is None:
        return None
    both = copy.copy(program)
    both.relations = copy.deepcopy(program.relations)
    both.values = {name: copy.copy(value) for name, value in program.values.items()}
    with contextlib.suppress(Exception):  # without these relations, what only training reads is noted as left alone
        return both if lower_also(both, exported, held) else None
    return None


def training_forward(model: nn.Module, inputs: Inputs) -> DirectProgram | None:
    """The program of the training forward, without data; None where the example doesn't go through it."""
    args, kwargs = inputs
    with contextlib.suppress(Exception), _training(model), restored(model):
        found = capture_directly(model, args, dict(kwargs))
        fill_what_is_left(found, model, inputs)
        return found
    return None


def leaves_unread(exported: CapturedProgram) -> bool:
    """Is there a parameter, or a table of floating numbers among the buffers, that nothing in the program reads?"""
    signature = exported.graph_signature
    least = dict.fromkeys(signature.buffers, 2) | dict.fromkeys(signature.parameters, 1)
    targets = {spec.arg.name: spec.target for spec in signature.input_specs}
    unread = [
        (targets.get(n.name), n.meta["val"]) for n in exported.graph.nodes if n.op == "placeholder" and not n.users
    ]
    return any(name in least and t.is_floating_point() and t.ndim >= least[name] for name, t in unread)


@contextlib.contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = True
        yield
    finally:
        for module, training in before:
            module.training = training
