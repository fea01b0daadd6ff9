"""A captured program, whichever of the two doors to it was taken: `torch.export.export`, or `direct`, which is faster.

torch's `ExportedProgram` has these attributes; so has `DirectProgram`, with the same graph in them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature


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

    def module(self, check_guards: bool = True) -> Any: ...


@dataclass
class DirectProgram:
    """A program captured by `direct`; `export` gives torch's own of the same model, for those who need a module of it.

    Of the model's state it holds the tensors of integers only, which may be index tables.
    """

    graph: torch.fx.Graph
    graph_signature: ExportGraphSignature
    constants: dict[str, Any]
    state_dict: dict[str, Any]
    export: Callable[[], ExportedProgram]
    graph_module: torch.fx.GraphModule = field(init=False)

    def __post_init__(self) -> None:
        self.graph_module = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())

    def module(self, check_guards: bool = True) -> Any:
        """The program as a module, by way of torch.export; raises RuntimeError where its graph is another."""
        exported = self.export()
        if _operators(exported.graph) != _operators(self.graph):
            raise RuntimeError("torch.export captures another graph of this model than was captured before")
        return exported.module(check_guards=check_guards)


def _operators(graph: torch.fx.Graph) -> list[tuple[str, str]]:
    return [(node.name, str(node.target)) for node in graph.nodes if node.op == "call_function"]
