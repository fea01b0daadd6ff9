"""Ways that the example doesn't take: a choice among indices falls on others, so that the code reads other weights.

Where values decide, a capture holds for one way. Weights that only another way reads, such as those of experts that no token of
the example goes to, are part of no relation then, and a cut leaves them too wide for what they are given. So the forward is
run with parts of what it chooses among out of reach; where that reads such weights, what it does with them holds too.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from depgraph.capture.capturing import Capture, quiet
from depgraph.capture.exported import decisions_of
from depgraph.capture.holding import Held, held_by
from depgraph.capture.keeping import unwritten
from depgraph.capture.lowering import lower_also, relate_kin
from depgraph.capture.proxies import storage_key
from depgraph.capture.recording import record_decided
from depgraph.capture.restoring import own_containers
from depgraph.cutting.barring import Bars, Place, barred, goes_over
from depgraph.cutting.draws import same_draws
from depgraph.graph import Program

Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]
_CHOOSING = frozenset(["topk", "max", "argmax", "sort", "argsort"])
_PARTS = (2, 4, 8, 16)


def with_other_ways(captured: Capture, model: nn.Module, inputs: Inputs) -> Capture:
    """The capture with the relations of ways on which the model reads parameters that it doesn't read on the example."""
    decisions = decisions_of(captured.exported)
    if decisions is None or decisions.settled:
        return captured
    places = [place for place, _, _ in goes_over(captured) if place.operator in _CHOOSING]
    left = _unread(model, captured.program) if places else {}
    for bars in _windows(places):
        if not left:
            break
        program = _also(captured, model, inputs, bars) if _reads(captured, model, inputs, (bars, left)) else None
        if program is not None:
            captured = replace(captured, program=program)
            left = _unread(model, program)
    relate_kin(captured.program, held_by(model).kin)
    return captured


def _unread(model: nn.Module, program: Program) -> dict[int, str]:
    """The parameters that are part of no relation, by their memory."""
    named, idle = dict(model.named_parameters(remove_duplicate=False)), {value.target for value in program.unread()}
    return {storage_key(named[name]): name for name in named.keys() & idle}


def _windows(places: list[Place]) -> Iterator[Bars]:
    """At every place all indices but one half, then but a quarter, and so on."""
    for count in _PARTS:
        for part in range(count):
            yield {place: _outside(place.size, part, count) for place in places if place.size >= count}


def _outside(size: int, part: int, count: int) -> np.ndarray:
    every = np.arange(size)
    return every[(every < part * size // count) | (every >= (part + 1) * size // count)]


class _Reading(TorchDispatchMode):
    """Sees whether one of some tensors, by their memory, is given to an operator."""

    def __init__(self, wanted: Mapping[int, str]) -> None:
        super().__init__()
        self.wanted = wanted
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator."""
        given = pytree.tree_leaves((args, kwargs or {}))
        self.seen |= any(isinstance(t, Tensor) and storage_key(t) in self.wanted for t in given)
        return func(*args, **(kwargs or {}))


def _reads(captured: Capture, model: nn.Module, inputs: Inputs, asked: tuple[Bars, Mapping[int, str]]) -> bool:
    """Does the model read one of these parameters without what is barred?"""
    bars, wanted = asked
    reading = _Reading(wanted)
    with contextlib.suppress(Exception), _otherwise(captured, model, inputs, bars) as (args, kwargs), reading:
        model(*args, **kwargs)
        return reading.seen
    return False


def _also(captured: Capture, model: nn.Module, inputs: Inputs, bars: Bars) -> Program | None:
    """The captured program with what the forward without what is barred says of dims; None where that can't be had."""
    both = copy.copy(captured.program)
    both.relations = copy.deepcopy(both.relations)
    both.values = {name: copy.copy(value) for name, value in both.values.items()}
    decisions = decisions_of(captured.exported)
    with contextlib.suppress(Exception), _otherwise(captured, model, inputs, bars) as (args, kwargs):
        exported, _ = record_decided(model, args, dict(kwargs), decisions)
        return both if lower_also(both, exported, Held(held_by(model).ties)) else None
    return None


@contextlib.contextmanager
def _otherwise(captured: Capture, model: nn.Module, inputs: Inputs, bars: Bars) -> Iterator[Inputs]:
    """Within, the model chooses without what is barred, and leaves no trace; gives what to call it with."""
    args, kwargs = own_containers(inputs)
    decisions = decisions_of(captured.exported)
    told = contextlib.nullcontext() if decisions is None else decisions.told()
    with quiet(model), torch.no_grad(), unwritten(model, *args, kwargs), same_draws(), told, barred(model, bars, ()):
        yield args, kwargs
