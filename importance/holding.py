"""The parameters of a pruned model while they are changed to make up for what went: a module's, or a file's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from depgraph.onnx_door.arrays import as_torch
from depgraph.onnx_door.editing import Editing
from depgraph.plan import Plan
from importance.readers import Reader


class Held(Protocol):
    """Reads and writes the parameters of a pruned model under their names in the dense one."""

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
    return HeldByModule(model) if isinstance(model, nn.Module) else HeldByFile(Editing(model, plan.graph))  # type: ignore[arg-type]


class HeldByModule:
    """The parameters of a module."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before: dict[str, Tensor] = {}
        self.created: list[str] = []

    def get(self, name: str) -> Tensor:
        return self.model.get_parameter(name).detach()

    def put(self, name: str, tensor: Tensor) -> None:
        here = self.model.get_parameter(name)
        self.before.setdefault(name, here.detach().clone())
        with torch.no_grad():
            here.copy_(tensor)

    def new_bias(self, reader: Reader) -> str | None:
        prefix, _, _ = reader.consumer.weight.rpartition(".")
        try:
            owner = self.model.get_submodule(prefix)
        except AttributeError:
            return None
        fits = isinstance(owner, (nn.Linear, nn.Conv1d, nn.Conv2d)) and owner._parameters.get("bias", 0) is None
        return f"{prefix}.bias" if fits and prefix else None

    def add_bias(self, reader: Reader, name: str, tensor: Tensor) -> None:
        owner = self.model.get_submodule(name.rpartition(".")[0])
        weight = self.model.get_parameter(reader.consumer.weight)
        owner.register_parameter("bias", nn.Parameter(tensor.to(weight.detach()), requires_grad=weight.requires_grad))
        self.created.append(name)

    def put_back(self) -> None:
        with torch.no_grad():
            for name, tensor in self.before.items():
                if name not in self.created:
                    self.model.get_parameter(name).copy_(tensor)
        for name in self.created:
            owner, _, last = name.rpartition(".")
            self.model.get_submodule(owner)._parameters[last] = None

    def note(self, created: Iterable[str]) -> None:
        record: Any = getattr(self.model, "depgraph_record", None)
        made = [{"target": n, "shape": list(self.model.get_parameter(n).shape)} for n in created]
        if record is not None and made:
            self.model.depgraph_record = {**record, "added": [*record.get("added", ()), *made]}  # type: ignore[assignment]


class HeldByFile:
    """The stored tensors of a file."""

    def __init__(self, editing: Editing) -> None:
        self.editing = editing
        self.ops: dict[str, str] = {}

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
