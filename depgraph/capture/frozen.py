"""A forward as a graph that takes one way through control flow that depends on values: the way of the example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from depgraph.capture.capturing import quiet
from depgraph.capture.deciding import Decisions, at_places
from depgraph.capture.recording import record_decided
from depgraph.capture.unlifting import module_of


@dataclass(frozen=True)
class Frozen:
    """A forward at the sizes of its example, with all that was decided by values built in.

    Attributes:
        module: Takes the arguments of the model, and shares its tensors.
        inputs: The positions among the inputs (leaves of args, then kwargs) whose values decided something: for other values
            of these the module isn't the model; `DRAWS` for random numbers. Where it is empty, the module holds for all
            values.
        places: Where the code asks for values, as part of a sentence.
    """

    module: GraphModule
    inputs: tuple[int, ...]
    places: str


def frozen(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Frozen:
    """Capture `model`, in eval mode and without gradients, as it runs on the values of the example inputs.

    Raises:
        Exception: whatever keeps the model from being captured.
    """
    given = (args, dict(kwargs))
    with quiet(model), torch.no_grad():
        program, _ = record_decided(model, *given, Decisions(among=False))
    output = program.graph.output_node()
    output.args = (output.args[0][: program.output_spec.num_leaves],)  # type: ignore[index]
    held = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    module = module_of(program, held, given).eval()
    module.graph.eliminate_dead_code()  # what only decisions asked for
    module.recompile()
    assert program.decisions is not None
    return Frozen(module, program.decisions.inputs, at_places(program.decisions))
