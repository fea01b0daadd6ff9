"""The parameters of a pruned model while they are changed to make up for what went: a module's, or a file's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from depgraph.cutting.renaming import names_after
from depgraph.errors import ScoreError
from depgraph.onnx_door.arrays import as_torch
from depgraph.onnx_door.editing import Editing
from depgraph.plan import Plan
from importance.readers import Reader


class Held(Protocol):
    """Reads and writes the parameters of a pruned model under their names in the dense one."""

    def here(self, name: str) -> str | None:
        """What a parameter is called in the pruned model; None where it is gone with what was left out."""
        ...

    def get(self, name: str) -> Tensor:
        """A parameter."""
        ...

    def put(self, name: str, tensor: Tensor) -> None:
        """Other numbers for a parameter, of its shape; they get its type."""
        ...

    def new_bias(self, reader: Reader) -> str | None:
        """The name of a bias that a consumer without one can be given; None where it can't."""
        ...

    def add_bias(self, reader: Reader, name: str, tensor: Tensor) -> None:
        """Give it that bias, [outputs that stay]."""
        ...

    def put_back(self) -> None:
        """Take back all that was done since this was made."""
        ...

    def note(self, created: Iterable[str]) -> None:
        """Let the record of the cut say which parameters the dense model didn't have."""
        ...


def held_by(model: Any, plan: Plan) -> Held:
    """The parameters of `model`, which `plan.apply()` gave."""
    if isinstance(model, nn.Module):
        return HeldByModule(model, names_after(plan, model))
    return HeldByFile(Editing(model, plan.graph), _left_out(plan))  # type: ignore[arg-type]


def _left_out(plan: Plan) -> frozenset[str]:
    return plan.graph.left_out(plan.branches).parameters if plan.branches else frozenset()


class HeldByModule:
    """The parameters of a module."""

    def __init__(self, model: nn.Module, names: dict[str, str]) -> None:
        self.model = model
        self.names = names
        self.before: dict[str, Tensor] = {}
        self.created: list[str] = []

    def here(self, name: str) -> str | None:
        return self.names.get(name)

    def get(self, name: str) -> Tensor:
        return self._parameter(name).detach()

    def _parameter(self, name: str) -> nn.Parameter:
        try:
            return self.model.get_parameter(self.names[name])
        except AttributeError as error:
            raise ScoreError(
                f"{type(self.model).__name__} has no parameter {self.names[name]!r}: give the model that plan.apply() gave"
            ) from error

    def put(self, name: str, tensor: Tensor) -> None:
        here = self._parameter(name)
        self.before.setdefault(name, here.detach().clone())
        with torch.no_grad():
            here.copy_(tensor)

    def new_bias(self, reader: Reader) -> str | None:
        weight = reader.consumer.weight
        prefix, now = weight.rpartition(".")[0], self.names[weight].rpartition(".")[0]
        try:
            owner = self.model.get_submodule(now)
        except AttributeError:
            return None
        fits = isinstance(owner, (nn.Linear, _ConvNd)) and owner._parameters.get("bias", 0) is None
        if not fits or not prefix:
            return None
        self.names[f"{prefix}.bias"] = f"{now}.bias"
        return f"{prefix}.bias"

    def add_bias(self, reader: Reader, name: str, tensor: Tensor) -> None:
        owner = self.model.get_submodule(self.names[name].rpartition(".")[0])
        weight = self._parameter(reader.consumer.weight)
        owner.register_parameter("bias", nn.Parameter(tensor.to(weight.detach()), requires_grad=weight.requires_grad))
        self.created.append(name)

    def put_back(self) -> None:
        with torch.no_grad():
            for name, tensor in self.before.items():
                if name not in self.created:
                    self._parameter(name).copy_(tensor)
        for name in self.created:
            owner, _, last = self.names[name].rpartition(".")
            self.model.get_submodule(owner)._parameters[last] = None

    def note(self, created: Iterable[str]) -> None:
        record: Any = getattr(self.model, "depgraph_record", None)
        made = [{"target": self.names[n], "shape": list(self._parameter(n).shape)} for n in created]
        if record is not None and made:
            self.model.depgraph_record = {**record, "added": [*record.get("added", ()), *made]}  # type: ignore[assignment]


class HeldByFile:
    """The stored tensors of a file."""

    def __init__(self, editing: Editing, gone: frozenset[str]) -> None:
        self.editing, self.gone = editing, gone
        self.ops: dict[str, str] = {}

    def here(self, name: str) -> str | None:
        return None if name in self.gone else name

    def get(self, name: str) -> Tensor:
        return as_torch(self.editing.read_bias(self.ops[name]) if name in self.ops else self.editing.read(name))

    def put(self, name: str, tensor: Tensor) -> None:
        array: np.ndarray = tensor.detach().cpu().numpy()
        if name in self.ops:
            self.editing.write_bias(self.ops[name], array)
        else:
            self.editing.write(name, array)

    def new_bias(self, reader: Reader) -> str | None:
        return f"{reader.consumer.weight}_bias" if self.editing.can_add(reader.consumer.meetings[0].op) else None

    def add_bias(self, reader: Reader, name: str, tensor: Tensor) -> None:
        op = reader.consumer.meetings[0].op
        self.editing.add_bias(op, name, tensor.detach().cpu().numpy())
        self.ops[name] = op

    def put_back(self) -> None:
        self.editing.put_back()

    def note(self, created: Iterable[str]) -> None:
        """A file has no record."""
