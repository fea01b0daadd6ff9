"""A captured program, whichever of the two doors to it was taken: `torch.export.export`, or `direct`, which is faster.

torch's `ExportedProgram` has these attributes; so has `DirectProgram`, with the same graph in them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.fx
from torch.export.graph_signature import ExportGraphSignature

from depgraph.capture.deciding import Decisions


class CapturedProgram(Protocol):
    """What the rest of the library reads of a captured program."""

    @property
    def graph(self) -> torch.fx.Graph: ...

    @property
    def graph_module(self) -> torch.fx.GraphModule: ...

    @property
    def graph_signature(self) -> ExportGraphSignature: ...

    @property
    def constants(self) -> dict[str, Any]: ...

    @property
    def state_dict(self) -> dict[str, Any]: ...


def decisions_of(program: CapturedProgram) -> Decisions | None:
    """What a program takes from the values of the example; None where nothing depends on values."""
    return getattr(program, "decisions", None)


def output_spec_of(program: CapturedProgram) -> Any:
    """How the leaves of what the model returns are put together, a pytree spec."""
    return program.output_spec if isinstance(program, DirectProgram) else program.call_spec.out_spec  # type: ignore[attr-defined]


def only_as_module(program: CapturedProgram) -> bool:
    """Has it no graph form?

    It takes something from the values of the example that others would change, or its forward replaces parameters.
    """
    decisions = decisions_of(program)
    return decisions is not None and not decisions.settled or bool(getattr(program, "replaced", ""))


@dataclass
class DirectProgram:
    """A program captured by `direct` or `decided`. Of the model's state it holds the tensors of integers only: index tables.

    `decisions` says what the program takes from the values of the example; None where nothing depends on values. `given` are
    the tensors that the code was given, with their nodes, until it is known which of them it kept. `replaced` names
    parameters and buffers that the forward replaces by others, which the graph doesn't.
    """

    graph: torch.fx.Graph
    graph_signature: ExportGraphSignature
    constants: dict[str, Any]
    state_dict: dict[str, Any]
    output_spec: Any
    decisions: Decisions | None = None
    given: list[tuple[torch.Tensor, torch.fx.Node]] = field(default_factory=list)
    replaced: str = ""
    graph_module: torch.fx.GraphModule = field(init=False)

    def __post_init__(self) -> None:
        self.graph_module = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
