"""Running the model that was traced, or its cut copy, on the example inputs, and leaving no trace of that."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from depgraph.capture.capturing import quiet
from depgraph.capture.deciding import Decisions, following
from depgraph.capture.exported import decisions_of
from depgraph.capture.keeping import unwritten
from depgraph.capture.recording import Call, replay
from depgraph.capture.restoring import own_containers
from depgraph.capture.unfit import unfit
from depgraph.errors import CaptureError, CheckError, one_line
from depgraph.widths import Kept

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

T = TypeVar("T")
Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Within = Callable[[], AbstractContextManager[Any]]
Forward = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[Any, list[Call]]]


def rerun(
    graph: DependencyGraph, model: nn.Module, inputs: Inputs | None = None, within: Within = contextlib.nullcontext
) -> list[torch.Tensor]:
    """The output tensors of one forward that decides, and is told that it is exported, as the traced one.

    After the outputs come the floating tensors that it decides by, unless the decisions are settled. Whatever it writes to
    tensors, inputs and all that its modules keep is put back.
    `inputs` are the graph's own unless the model is cut in a vocabulary, see `inputs_at`. The forward alone runs `within`,
    which may tell it otherwise.
    """
    return _run(graph, model, inputs, within, _plainly if _decisions(graph, model) is None else _watched)[0]


def calls_of(graph: DependencyGraph, model: nn.Module, inputs: Inputs | None = None) -> list[Call]:
    """The torch calls of a forward as in `rerun`."""
    return _run(graph, model, inputs, contextlib.nullcontext, _watched)[1]


def _decisions(graph: DependencyGraph, model: nn.Module) -> Decisions | None:
    """Those of the capture, which a graph form has built in."""
    return None if isinstance(model, GraphModule) else decisions_of(graph.capture.exported)


def _plainly(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Call]]:
    return model(*args, **kwargs), []


def _watched(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Call]]:
    """As the capture ran it, which sees what is decided in functions of torch that are written in Python too."""
    return replay(model, args, kwargs)


def _run(
    graph: DependencyGraph, model: nn.Module, inputs: Inputs | None, within: Within, forward: Forward
) -> tuple[list[torch.Tensor], list[Call]]:
    args, kwargs = own_containers(inputs if inputs is not None else (graph.args, graph.kwargs))
    decisions = _decisions(graph, model)
    with quiet(model), torch.no_grad(), unwritten(model, *args, kwargs) as written, following(decisions) as given:
        with (decisions or Decisions()).told(), within():
            output, calls = forward(model, args, kwargs)
        made = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
        made += [] if decisions is None or decisions.settled else given
        return [written.own(tensor) for tensor in made], calls


def inputs_at(graph: DependencyGraph, kept: Kept) -> Inputs:
    """The graph's example inputs as the model cut to `kept` takes them: where a vocabulary is trimmed, with its new ids."""
    words = graph.words
    stays = None if words is None else kept.of_class(graph.widths.class_of(words.dim))
    return (graph.args, graph.kwargs) if stays is None else _with_ids(graph, np.arange(len(stays)), stays)


def inputs_of_others(graph: DependencyGraph, kept: Kept) -> Inputs:
    """The graph's example inputs; where a vocabulary is trimmed, with the next kept token in the place of each."""
    words = graph.words
    stays = None if words is None else kept.of_class(graph.widths.class_of(words.dim))
    return (graph.args, graph.kwargs) if stays is None else _with_ids(graph, np.roll(stays, -1), stays)


def _with_ids(graph: DependencyGraph, new: np.ndarray, old: np.ndarray) -> Inputs:
    """The example inputs with ``new[k]`` where they hold the id ``old[k]``."""
    leaves, spec = pytree.tree_flatten((graph.args, graph.kwargs))
    for place in graph.words.places if graph.words is not None else ():
        if not leaves[place].is_meta:
            ids = new[np.searchsorted(old, leaves[place].cpu().numpy())]
            leaves[place] = torch.from_numpy(ids).to(leaves[place])
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return args, kwargs


def ran(graph: DependencyGraph, model: nn.Module, run: Callable[[], T], hint: str = "") -> T:
    """What `run` gives, which runs a cut model; raises CheckError, in one sentence, where that fails, with a `hint` at why."""
    try:
        return run()
    except CheckError:
        raise
    except Exception as error:
        if model is not graph.model:  # in place, the model that was traced is no longer here
            with quiet(graph.model), torch.no_grad():
                reason = unfit(graph.model, graph.args, graph.kwargs)
            if reason:
                raise CaptureError(reason) from error
        raise CheckError(
            f"the pruned {type(model).__name__} doesn't run: {one_line(error)}{f'; {hint}' if hint else ''}"
        ) from error
