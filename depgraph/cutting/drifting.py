"""Numbers that follow a size without saying so: found by comparing the forward before and after the cut.

``scores / math.sqrt(head_dim)`` gives torch a plain float, ``torch.sqrt(torch.tensor(x.shape[-1]))`` a tensor of one number.
Where the recording saw a size become a float, both models are run once, and every number that a torch call was given or made
is compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.fx import Node

from depgraph.capture.recording import Call
from depgraph.cutting.advice import instead
from depgraph.cutting.expressing import Drift
from depgraph.cutting.rerunning import Inputs, calls_of
from depgraph.errors import CutError
from depgraph.operators import aten_name
from depgraph.walks import ahead

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph
    from depgraph.widths import Kept

_FACTORS = {"mul": -1, "div": 1, "scaled_dot_product_attention": -1}


def numbers_of(graph: DependencyGraph, model: nn.Module, inputs: Inputs | None = None) -> list[Call]:
    """The torch calls of one forward, with their numbers; empty where no size became a float."""
    return calls_of(graph, model, inputs) if graph.capture.recording.leaks else []


def new_drifts(
    graph: DependencyGraph, before: list[Call], after: list[Call], known: list[Drift], kept: Kept
) -> list[Drift]:
    """Operators that multiply or divide by a number that the cut to `kept` changes, but for those in `known`.

    Raises CutError where a number that the cut changes goes elsewhere: no weight can make up for it there.
    """
    recorded = graph.capture.recording.calls
    if [c.function for c in before] != [c.function for c in after] or len(before) != len(recorded):
        return []
    nodes, computed = graph.sizes.nodes, _computed(graph)
    seen = {d.node for d in known}
    drifts = []
    for call, old, new in zip(recorded, before, after, strict=True):
        pairs = list(zip(old.numbers, new.numbers, strict=False))
        for a, b in pairs[:-1] if computed & set(call.outputs) else pairs:
            if a == b:
                continue
            readers = _readers(nodes, call)
            if any(aten_name(node) not in _FACTORS for node in readers) or not a or not b:
                raise CutError(
                    f"{call.where}: {call.function} is given a number that the code computes from a size, which the cut "
                    f"changes from {a:g} to {b:g}; {instead(graph, kept)}"
                )
            for node in dict.fromkeys(node for node in readers if node.name not in seen):
                sign = _FACTORS[aten_name(node)]
                drifts.append(Drift(node.name, (b / a) ** -sign, call.where, (b / a) ** sign))
            seen.update(node.name for node in readers)
    return drifts


def _computed(graph: DependencyGraph) -> set[str | None]:
    """Single numbers that are computed from inputs, parameters or buffers: what is cut may change them."""
    values = graph.sizes.values

    def starts(node: Node) -> bool:
        return node.op == "placeholder" and node.name in values and values[node.name].kind != "constant"

    return {node.name for node in ahead(graph.sizes.nodes.values(), starts) if not _shape(node)}


def _readers(nodes: dict[str, Node], call: Call) -> list[Node]:
    """What a call made, or who uses the single number that it made; single numbers made of that are followed later."""
    made = [nodes[name] for name in call.nodes if name in nodes]
    single = [n for n in made if n.name in call.outputs and not _shape(n)]
    return [n for n in ([user for n in single for user in n.users] if single else made) if _shape(n)]


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(getattr(node.meta.get("val"), "shape", ()))
