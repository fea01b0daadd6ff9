"""What a build does in one way for a PyTorch module and in another for an ONNX file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

import depgraph
from depgraph.dependency import DependencyGraph
from depgraph.errors import ExportError, ScoreError
from depgraph.onnx_door.operands import stored
from depgraph.onnx_door.saving import write
from depgraph.scoring import Scorer
from depgraph.story import MadeFile
from exporters.building.asked import Subject, Ways
from exporters.building.file_model import FileModel
from exporters.building.files import moving_from
from exporters.building.precisions import file_bytes
from exporters.calls import flatten_call
from exporters.feeds import Feeds
from exporters.onnx_export import OnnxOptions, to_onnx
from importance import named, needs_gradients, recipes
from importance.losses import Loss
from importance.recipe import Recipe
from importance.sweeping import SHIFT

PYTORCH, FLOAT32 = "pytorch", "float32.onnx"


class Source(Protocol):
    """What a model comes from, and goes back to."""

    def traced(self) -> DependencyGraph:
        """The graph of the model on its example; raises ExportError where weights aren't float32, from which fewer bits are made."""
        ...

    def example(self, graph: DependencyGraph) -> Feeds:
        """The example inputs by the names of a file's inputs."""
        ...

    def written(self, model: Any, path: Path) -> Path:
        """One run of a dense or pruned model as a float32 file."""
        ...

    def stand_in(self, file: Path, threads: int) -> Any:
        """A file as something that quality can be measured of in the model's place."""
        ...

    def kept(self, model: Any, folder: Path, precision: str) -> list[MadeFile]:
        """Write what goes on from the result, trained or pruned, beside the file of a precision that runs; the files that run, too."""
        ...

    def scorer(self, name: str) -> Scorer:
        """A score by name."""
        ...

    def recipe(self, name: str) -> Recipe:
        """A recipe by name."""
        ...

    def loss(self, graph: DependencyGraph) -> tuple[Loss | None, str]:
        """What single axes are probed by, None for the model's own loss; and what it is called."""
        ...


@dataclass(frozen=True)
class ModuleSource:
    """A PyTorch module."""

    subject: Subject
    ways: Ways

    def traced(self) -> DependencyGraph:
        others = {p.dtype for p in self.subject.model.parameters() if p.is_floating_point()} - {torch.float32}
        if others:
            kind = str(min(others, key=str)).removeprefix("torch.")
            raise ExportError(
                f"the model has weights in {kind}, and is built from float32: give model.float(), and Ways(precisions=...) for fewer bits"
            )
        return depgraph.trace(self.subject.model, self.subject.args, self.subject.kwargs)

    def example(self, graph: DependencyGraph) -> Feeds:
        call = flatten_call(self.subject.model, self.subject.args, self.subject.kwargs)
        return {name: tensor.detach().cpu().numpy() for name, tensor in zip(call.names, call.tensors, strict=True)}

    def written(self, model: nn.Module, path: Path) -> Path:
        options = OnnxOptions(opset=self.ways.opset, dtype="float32", record="costs")
        to_onnx(model, self.subject.args, path, self.subject.kwargs, options=options)
        return path

    def stand_in(self, file: Path, threads: int) -> Any:
        return FileModel(file, self.subject.model, threads)

    def kept(self, model: nn.Module, folder: Path, precision: str) -> list[MadeFile]:
        depgraph.save(model, folder / PYTORCH)
        if hasattr(self.subject.tokenizer, "save_pretrained"):
            self.subject.tokenizer.save_pretrained(folder / PYTORCH)
        return []

    def scorer(self, name: str) -> Scorer:
        return named(name, batches=self.subject.batches, loss=self.subject.loss, seed=self.ways.seed)

    def recipe(self, name: str) -> Recipe:
        return recipes.named(name, self.subject.batches, self.subject.loss, self.ways.seed)

    def loss(self, graph: DependencyGraph) -> tuple[Loss | None, str]:
        return self.subject.loss, "loss"


@dataclass(frozen=True)
class FileSource:
    """An ONNX file, or an onnx_ir.Model: scores are those that need no gradients, and its operator set stays its own."""

    subject: Subject
    ways: Ways

    def traced(self) -> DependencyGraph:
        graph = depgraph.trace(self.subject.model, self.subject.args, self.subject.kwargs)
        held = graph.capture.lowered.held  # type: ignore[attr-defined]
        kinds = {name: tensor.dtype for name in graph.parameter_ranks() if (tensor := stored(held[name])) is not None}
        for name, kind in kinds.items():
            if kind != ir.DataType.FLOAT:
                raise ExportError(
                    f"the file holds {name!r} in {kind.name.lower()}, and a file is built from float32: give the float32 file, and allow "
                    "fewer bits with --quantise or Ways(precisions=...); depgraph prune takes this one as it is"
                )
        return graph

    def example(self, graph: DependencyGraph) -> Feeds:
        return {name: np.asarray(array) for name, array in graph.inputs.items()}  # type: ignore[attr-defined]

    def written(self, model: ir.Model, path: Path) -> Path:
        return next(file for file in write(model, path) if file.name == path.name)

    def stand_in(self, file: Path, threads: int) -> ir.Model:
        return ir.load(file)

    def kept(self, model: ir.Model, folder: Path, precision: str) -> list[MadeFile]:
        if precision == "float32":
            return []
        file = self.written(model, folder / FLOAT32)
        return [MadeFile(FLOAT32, "one run, float32, from which the one of fewer bits was made", file_bytes(file))]

    def scorer(self, name: str) -> Scorer:
        if needs_gradients(name):
            raise ScoreError(
                f"score {name!r} needs gradients, which an ONNX file doesn't give: load the PyTorch model, or take magnitude, or with "
                "batches one from activations such as wanda-sp, flap or obs"
            )
        return named(name, batches=self.subject.batches, seed=self.ways.seed)

    def recipe(self, name: str) -> Recipe:
        return recipes.for_file(name, self.subject.batches, self.ways.seed)

    def loss(self, graph: DependencyGraph) -> tuple[Loss | None, str]:
        model: Any = graph.model
        return moving_from(model), SHIFT


def source_of(subject: Subject, ways: Ways) -> Source:
    """How a subject is traced, written and scored."""
    kind = ModuleSource if isinstance(subject.model, nn.Module) else FileSource
    return kind(subject, ways)
