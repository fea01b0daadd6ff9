"""A pruned model that was compared as it was captured: is it right as well when it simply runs, as it does for its user?

Code may ask `torch.compiler.is_compiling()` and take another way while it is captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn
from torch.fx import GraphModule

from depgraph.capture.exported import decisions_of
from depgraph.capture.proxies import no_flags
from depgraph.cutting.comparing import Tensors, difference
from depgraph.cutting.doubling import OF_TOLERANCE, alone_in_double
from depgraph.cutting.draws import may_draw, same_draws
from depgraph.cutting.rerunning import Inputs, Within, rerun
from depgraph.errors import CheckError

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph


def apart_from_capture(
    graph: DependencyGraph, model: nn.Module, original: Tensors, tolerance: float, inputs: Inputs | None = None
) -> float:
    """By how much the original differs from its own capture, which gives `original`, when it simply runs.

    `model` is the pruned one, right as it was captured and wrong when it simply runs. Raises CheckError where the original is
    the same both times: then the pruned one should have been so too.
    """
    apart = 0.0
    if model is not graph.model:
        with same_draws():
            apart = difference(rerun(graph, graph.model, inputs, no_flags), original)
    if apart <= tolerance:
        raise only_captured(model, in_place=model is graph.model)
    return apart


def require_own(graph: DependencyGraph, captured: Tensors, tolerance: float, in_double: Callable[[], Tensors]) -> None:
    """Raise CheckError where a model that simply runs computes something else than its capture, which a graph form is made of.

    `in_double` gives what was `captured` once more, computed in double precision: where the two are the same then, only rounding
    differs. What draws random numbers may draw in another order; captures that decide by values are compared elsewhere.
    """
    exported = graph.capture.exported
    if (
        isinstance(graph.model, GraphModule)
        or decisions_of(exported) is not None
        or any(map(may_draw, exported.graph.nodes))
    ):
        return
    apart = _apart(graph, captured, no_flags)
    if not (apart <= tolerance or _same_in_double(graph, in_double, tolerance)):
        raise CheckError(
            f"{type(graph.model).__name__} has no graph form: what was captured of it is off by {apart:.1e} of the largest output "
            "from what it computes when it simply runs (its code asks whether it is captured, say); use form='module', or plan with "
            "form='module'"
        )


def _apart(graph: DependencyGraph, captured: Tensors, within: Within) -> float:
    with same_draws():
        return difference(rerun(graph, graph.model, within=within)[: len(captured)], captured)


def _same_in_double(graph: DependencyGraph, captured: Callable[[], Tensors], tolerance: float) -> bool:
    try:
        return _apart(graph, captured(), alone_in_double) <= tolerance * OF_TOLERANCE
    except Exception:  # an operator that can't be run so proves nothing
        return False


def only_captured(model: nn.Module, in_place: bool) -> CheckError:
    """What says that a pruned model is right only while it is captured."""
    return CheckError(
        f"the pruned {type(model).__name__} computes what it should while it is captured, but something else when it simply "
        "runs (its code asks torch.compiler.is_compiling()): "
        + ("use plan.apply()" if in_place else "protect the axes of what it reads then")
    )
