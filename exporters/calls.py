"""A call of a model as a flat, named list of tensors, and back; and its outputs, named in order."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from depgraph.capture.keeping import unwritten
from depgraph.capture.strides import InMemoryOrder
from depgraph.errors import ExportError, first_line
from exporters.constants import ConstantsKnown


@dataclasses.dataclass(frozen=True)
class Slot:
    """Marks where the tensor number `index` goes in the arguments."""

    index: int


@dataclasses.dataclass(frozen=True)
class Call:
    """Arguments of a model with their tensors taken out: `names[i]` belongs to `tensors[i]`.

    Nested containers give dotted names (`past.0.key`). `args` and `kwargs` hold a `Slot` in each tensor's place, and as
    constants what is no tensor; `arguments` is both, by the names of forward's parameters.
    """

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    arguments: Mapping[str, Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def build(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put `tensors` back into the places of the originals: `(args, kwargs)`."""
        return _fill(self.args, tensors), _fill(dict(self.kwargs), tensors)

    def as_float32(self) -> Call:
        """The same call with every floating-point tensor in float32."""
        tensors = tuple(t.float() if t.is_floating_point() else t for t in self.tensors)
        return dataclasses.replace(self, tensors=tensors)


def flatten_call(model: nn.Module, args: Any, kwargs: Mapping[str, Any] | None) -> Call:
    """Name the tensors of a call as `model.forward` names its parameters.

    Args:
        args: A tuple of positional arguments, or one tensor.
    Raises:
        ExportError: No tensor is among the arguments, or there are more arguments than parameters.
    """
    if not isinstance(args, (Tensor, tuple, list)):
        raise ExportError(f"The example inputs are a {type(args).__name__}: give a tuple of arguments, or one tensor.")
    positional = (args,) if isinstance(args, Tensor) else tuple(args)
    keywords = dict(kwargs or {})
    found: list[tuple[str, Tensor]] = []
    labels = _parameter_names(model, len(positional))
    slotted_args = tuple(_strip(v, n, found) for v, n in zip(positional, labels, strict=True))
    slotted_kwargs = {name: _strip(value, name, found) for name, value in keywords.items()}
    if not found:
        raise ExportError("The example inputs hold no tensor, so there is nothing to feed the exported model with.")
    names, tensors = zip(*found, strict=True)
    arguments = dict(zip(labels, slotted_args, strict=True)) | slotted_kwargs
    return Call(tuple(names), tuple(tensors), arguments, slotted_args, slotted_kwargs)


def built_in(call: Call, names: Sequence[str]) -> Call:
    """The same call with the tensors of these names as constants in the arguments.

    Raises:
        ExportError: No tensor of the call has one of these names, or none is left.
    """
    unknown = sorted(set(names) - set(call.names))
    if unknown:
        raise ExportError(
            f"`constants` names {', '.join(map(repr, unknown))}, but the inputs are {', '.join(call.names)}."
        )
    left = [i for i, name in enumerate(call.names) if name not in names]
    if not left:
        raise ExportError("`constants` names every input, so there is nothing left to feed the exported model with.")
    slots = [call.tensors[i] if i not in left else Slot(left.index(i)) for i in range(len(call.names))]
    return dataclasses.replace(
        call,
        names=tuple(call.names[i] for i in left),
        tensors=tuple(call.tensors[i] for i in left),
        arguments=_fill(dict(call.arguments), slots),
        args=_fill(call.args, slots),
        kwargs=_fill(dict(call.kwargs), slots),
    )


def _parameter_names(model: nn.Module, count: int) -> list[str]:
    parameters = list(inspect.signature(model.forward).parameters.values())
    plain = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:count]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    missing = count - len(plain)
    if missing and rest is None:
        raise ExportError(
            f"{type(model).__name__}.forward takes {len(plain)} positional arguments, "
            f"but {count} example inputs were given."
        )
    return plain + [f"{rest}_{i}" for i in range(missing)]


def _strip(value: Any, name: str, found: list[tuple[str, Tensor]]) -> Any:
    if isinstance(value, Tensor):
        # torch.export takes one tensor in two places for one input
        again = any(value is tensor for _, tensor in found)
        found.append((name, value.clone() if again else value))
        return Slot(len(found) - 1)
    if isinstance(value, dict):
        return {key: _strip(item, f"{name}.{key}", found) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return _same_kind(value, [_strip(item, f"{name}.{i}", found) for i, item in enumerate(value)])
    return value


def _fill(value: Any, tensors: Sequence[Any]) -> Any:
    if isinstance(value, Slot):
        return tensors[value.index]
    if isinstance(value, dict):
        return {key: _fill(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return _same_kind(value, [_fill(item, tensors) for item in value])
    return value


def _same_kind(like: Any, items: list[Any]) -> Any:
    return type(like)(*items) if hasattr(like, "_fields") else type(like)(items)


def named_outputs(output: Any) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of a model's output, in order, and the names of the fields that are no tensors.

    A mapping (transformers' ModelOutput is one) or a dataclass gives its field names, a sequence `output_0`,
    a single tensor `output`; nested ones get dots (`hidden_states.0`). `None` is left out silently.
    """
    tensors: dict[str, Tensor] = {}
    skipped: list[str] = []
    for name, leaf in _walk(output, ""):
        if isinstance(leaf, Tensor):
            tensors[name] = leaf
        elif leaf is not None:
            skipped.append(f"{name} ({type(leaf).__name__})")
    return tensors, skipped


def _walk(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    children = _children(value)
    if children is None:
        yield name or "output", value
        return
    for key, child in children:
        yield from _walk(child, f"{name}.{key}" if name else key)


def _children(value: Any) -> list[tuple[str, Any]] | None:
    if isinstance(value, Mapping):
        return [(str(key), item) for key, item in value.items()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    if hasattr(value, "_fields"):
        return [(field, getattr(value, field)) for field in value._fields]
    if isinstance(value, (list, tuple)):
        return [(str(i), item) for i, item in enumerate(value)]
    return None


class _Progress:
    """Whether a capture went as far as it could: an object of its own, as torch.export puts a module's attributes back."""

    done = False


class FlatModel(nn.Module):
    """The model as a function from tensors to a tuple of tensors, in the order of `Call.names` and `output_names`.

    torch.onnx.export captures once by running the code, and when that fails again by reading it, which takes longer.
    Once the first way has gone through all of the code, or been stopped by a value it doesn't know, the second would end
    alike, so it is refused; `restart` allows both again.
    """

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model = model
        self._call = call
        self._progress = _Progress()

    def restart(self) -> None:
        """Forget how far a capture went."""
        self._progress.done = False

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the model on the call's tensors."""
        if self._progress.done and torch.compiler.is_dynamo_compiling():
            raise RuntimeError("captured already")
        known = ConstantsKnown() if _traces(tensors) else contextlib.nullcontext()
        try:
            with known:
                outputs = tuple(self.outputs(tensors)[0].values())
        except GuardOnDataDependentSymNode:
            self._progress.done = True
            raise
        self._progress.done = torch.compiler.is_exporting()
        return outputs

    def outputs(self, tensors: Sequence[Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """As `named_outputs`, of the model on these tensors."""
        args, kwargs = self._call.build(tensors)
        with InMemoryOrder():
            return named_outputs(self.model(*args, **kwargs))


def _traces(tensors: Sequence[Tensor]) -> bool:
    """Does torch.export run the code on these, which then have no data, other than by reading it?"""
    running = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    return running and bool(tensors) and all(type(tensor) is not Tensor for tensor in tensors)


def output_names(flat: FlatModel, call: Call) -> tuple[tuple[str, ...], list[str]]:
    """Names for the file's outputs, distinct from the inputs', and notes about what is left out.

    Raises:
        ExportError: The model can't run on its example inputs, or returns no tensor.
    """
    owner = type(flat.model).__name__
    try:
        with unwritten(flat, call.tensors):
            tensors, skipped = flat.outputs(call.tensors)
    except Exception as error:
        raise ExportError(f"{owner} doesn't run on the example inputs ({first_line(error)}); give others.") from error
    if not tensors:
        raise ExportError(f"{owner} returns no tensor, so there is nothing to export.")
    names: list[str] = []
    for name in tensors:
        name = f"output_{name}" if name[0].isdigit() else name
        while name in call.names or name in names:
            name += "_out"
        names.append(name)
    notes = [f"outputs that are no tensors are left out: {', '.join(skipped)}"] if skipped else []
    return tuple(names), notes


def lowest_precision(flat: FlatModel, call: Call) -> torch.dtype:
    """The floating dtype with the fewest bits among weights and inputs (float32 where there is none)."""
    dtypes = {t.dtype for t in (*flat.parameters(), *call.tensors) if t.is_floating_point()}
    return min(dtypes, key=lambda d: (d.itemsize, d is torch.float16), default=torch.float32)
