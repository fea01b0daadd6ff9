"""Does a captured program compute what its model computes, on other inputs than the example's?

A capture on real values holds what it couldn't follow, such as the result of a compiled extension, as constants. On the
example these are right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from depgraph.capture.capturing import quiet
from depgraph.capture.keeping import unwritten
from depgraph.capture.places import place
from depgraph.capture.restoring import own_containers
from depgraph.cutting.draws import by_own_generator, same_draws
from depgraph.cutting.reference import Reference
from depgraph.cutting.rerunning import Inputs, rerun
from depgraph.cutting.script import Script
from depgraph.cutting.sides import Side
from depgraph.errors import CheckError, CutError, one_line

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph


def require_same_elsewhere(graph: DependencyGraph) -> None:
    """Raise CutError when the program of `graph` and its model part on inputs that differ a little from the example's."""
    from depgraph.cutting.comparing import TOLERANCE, difference

    inputs, empty = moved((graph.args, graph.kwargs)), graph.widths.at({})
    with same_draws():
        expected = rerun(graph, graph.model, inputs)
    held = {**graph.capture.exported.constants, **graph.tensors()}
    program = Reference(Script(graph.capture.exported), graph.capture.program, [Side(empty, empty)])
    with same_draws(), torch.no_grad():
        (got,) = program.run(lambda name: held[name], *inputs)
    tolerance = max((TOLERANCE.get(t.dtype, 1e-4) for t in expected if t.is_floating_point()), default=1e-4)
    apart = difference([tensor for _, tensor in got], expected)
    if not apart <= tolerance:
        raise CutError(
            f"{type(graph.model).__name__} has no graph form: it computes something from its inputs that torch doesn't see, "
            f"and on other inputs the captured graph is off by {apart:.1e} of the largest output; use form='module'"
        )


def require_unseeded(graph: DependencyGraph) -> None:
    """Raise CutError when a model seeds a generator anew in each run, which a graph would go on to draw by from run to run."""
    node = by_own_generator(graph.capture.exported.graph.nodes)
    if node is None or graph.on_meta:
        return
    runs = []
    for _ in range(2):
        with same_draws():
            runs.append(rerun(graph, graph.model))
    if all(torch.equal(one, other) for one, other in zip(*runs, strict=True)):
        at = f" at {place(node)}" if place(node) else ""
        raise CutError(
            f"{type(graph.model).__name__} has no graph form, as it seeds a generator in each run{at}, which a graph can't: use "
            "form='module', or plan with form='module', or make what it draws once, as a buffer"
        )


def by_itself(graph: DependencyGraph, model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """The output tensors of a cut model that simply runs, and decides by its own values, not as the original did.

    Raises CheckError when it fails.
    """
    args, kwargs = own_containers(inputs)
    try:
        with quiet(model), torch.no_grad(), unwritten(model, *args, kwargs) as written, same_draws():
            output = model(*args, **kwargs)
        return [written.own(leaf) for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    except Exception as error:
        raise CheckError(
            f"the pruned {type(model).__name__} computes what it should where it decides as the original does, but fails when "
            f"it decides by itself: {one_line(error)}; protect the axes of what it reads then"
        ) from error


def moved(inputs: Inputs) -> Inputs:
    """Inputs with a little noise on all that is floating."""
    generator = torch.Generator().manual_seed(0)

    def noisy(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point() or not leaf.numel():
            return leaf
        noise = torch.randn(leaf.shape, generator=generator).to(leaf)
        return leaf + 0.1 * leaf.abs().mean() * noise

    args, kwargs = pytree.tree_map(noisy, inputs)
    return args, kwargs
