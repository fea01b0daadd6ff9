"""Calling a model on a calibration batch, whatever form the batch has, and finding its loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from depgraph import DependencyGraph
from depgraph.capture.capturing import quiet
from depgraph.capture.unfit import place_of
from depgraph.errors import DataError, DepgraphError, ScoreError, no_batches, one_line, unfit_batch
from depgraph.onnx_door.examples import runtime_inputs
from importance.formulas import Formula, formula_of, logits_of, loss_in
from importance.laid_out import Samples
from importance.losses import HINT, IGNORED, Loss, own_loss

_VARIABLE = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
_formulas: WeakKeyDictionary[nn.Module, Formula] = WeakKeyDictionary()
_UNFIT = (TypeError, ValueError, RuntimeError, LookupError, AttributeError)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def check_batches(batches: object) -> None:
    """Raise DataError unless `batches` is something to take batches from."""
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise DataError(
            f"batches is a {type(batches).__name__}: give an iterable of batches, such as a list with one batch"
        )


def loss_of(model: nn.Module, batch: Any, loss: Loss | None) -> Tensor:
    """The loss, a scalar with a gradient, of one batch on `model`'s device.

    A tensor is the model's single argument, a tuple (or list) its arguments, a mapping its keyword arguments. What
    `forward` doesn't take is left for `loss` alone; without a `loss` only "labels" may be left so.

    Raises:
        DataError: the batch doesn't fit the model.
        ScoreError: there is no loss, or it isn't a finite scalar that depends on the parameters.
    """
    args, kwargs = _arguments(batch)
    takes = _signature(model)
    takes.require_needed(model, args, kwargs)
    spare = set(kwargs) if loss is not None else {"labels"}
    passed = {name: value for name, value in kwargs.items() if takes.keyword(name) or name not in spare}
    output = run_model(model, args if loss is None else takes.positional(args), passed)
    return _checked(loss_after(model, output, batch, loss), model, kwargs.get("labels"))


def loss_after(model: Any, output: Any, batch: Any, loss: Loss | None) -> Tensor:
    """The loss, a scalar, of what `model`, or a form of it, gave for a batch on its device; without `loss` as `own_loss` finds it.

    Where the batch has labels that `model` takes and the form didn't, by the formula that gives the loss of `model` itself.

    Raises ScoreError where there is none, or it is no scalar.
    """
    args, kwargs = _arguments(batch)
    given = _signature(model).bound(args) | kwargs
    if loss is not None and not callable(loss):
        raise ScoreError(f"the loss is a {type(loss).__name__}, which can't be called: {HINT}")
    if loss is not None:
        value: Any = _given(loss, output, batch)
    elif _computes_own(model, given) and loss_in(output) is None:
        value = _formula(model, given)(logits_of(output), given["labels"])
    else:
        value = own_loss(output, given)
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ScoreError(f"the loss must be a scalar tensor, it is {shape}: {HINT}")
    return value.reshape(())


def _given(loss: Loss, output: Any, batch: Any) -> Any:
    """What the loss that was given comes to; raises ScoreError where it fails on what it is given."""
    try:
        return loss(output, batch)
    except (DepgraphError, torch.OutOfMemoryError):
        raise
    except _UNFIT as error:
        raise ScoreError(
            f"the loss failed with {one_line(error)}{place_of(error)}: it is called as loss(output, batch), with what the model "
            "returns and the whole batch, labels and all"
        ) from error


def loss_of_form(model: Any, form: nn.Module, batch: Any, loss: Loss | None) -> Tensor:
    """The loss, a scalar, of a form of `model` (itself, pruned, a graph of it) for a batch on its device.

    Labels are handed over where the form takes them and there is no other `loss`. Raises as `loss_after`.
    """
    args, kwargs = inputs_of(model, batch)
    labels = _arguments(batch)[1].get("labels")
    if loss is None and labels is not None and _signature(form).keyword("labels"):
        kwargs = {**kwargs, "labels": labels}
    return loss_after(model, run_model(form, args, kwargs), batch, loss)


def _computes_own(model: Any, given: Mapping[str, Any]) -> bool:
    """Does a model take the labels that it is given?"""
    return isinstance(model, nn.Module) and "labels" in given and _signature(model).keyword("labels")


def _formula(model: nn.Module, given: Mapping[str, Any]) -> Formula:
    """How a model computes its loss, found out once."""
    if model not in _formulas:
        taken = {name: value for name, value in given.items() if _signature(model).keyword(name)}
        with quiet(model):
            _formulas[model] = formula_of(model, taken)
    return _formulas[model]


def inputs_of(model: Any, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What of a batch `model` is called with: labels, and tensors that `forward` has no room for, are left out.

    For a file, everything by the names of its inputs.

    Raises DataError when a batch is no tensor, tuple or mapping, or gives what `forward` needs under another name.
    """
    args, kwargs = _arguments(batch)
    takes = _signature(model)
    takes.require_needed(model, args, kwargs)
    if isinstance(model, ir.Model):
        return (), {n: v for n, v in (takes.bound(args) | kwargs).items() if takes.keyword(n)}
    return takes.positional(args), {n: v for n, v in kwargs.items() if n != "labels" and takes.keyword(n)}


def samples_in(graph: DependencyGraph, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Samples:
    """The samples of a call and what of them is text, by masks given by name or by place."""
    named, second = _signature(graph.model).bound(args), samples_second(graph)
    return Samples.of(args, kwargs, second) if len(named) < len(args) else Samples.of((), named | dict(kwargs), second)


def samples_second(graph: DependencyGraph) -> frozenset[str]:
    """The arguments of a model along whose second dim the samples lie, see `DependencyGraph.steps_first`."""
    if not graph.steps_first:
        return frozenset()
    named = _signature(graph.model).bound(graph.args) | graph.kwargs
    leaves = [(name if leaf is value else "") for name, value in named.items() for leaf in pytree.tree_leaves(value)]
    pairs = zip(leaves, graph.observer().own.inputs, strict=False)
    return frozenset(name for name, inner in pairs if name and inner in graph.steps_first)


def as_batch(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Arguments of a call in the form of a batch: a tuple, or a dict where some are keywords.

    Raises DataError where positional ones have no names to be given by.
    """
    if not kwargs:
        return args
    named = _signature(model).bound(args)
    if len(named) < len(args):
        raise DataError(
            f"{type(model).__name__} takes *args beside keywords, which no batch can be: wrap it in a module with named arguments"
        )
    return named | dict(kwargs)


def named_inputs(model: Any, batch: Any) -> dict[str, Any]:
    """What a batch holds, by the names of the arguments of `forward`; raises DataError when it is no tensor, tuple or mapping."""
    args, kwargs = _arguments(batch)
    return _signature(model).bound(args) | kwargs


def device_of(tensors: Iterable[Tensor]) -> torch.device:
    """The device of the first tensor, such as of a model's parameters; the CPU where there are none."""
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def calls_of(
    graph: DependencyGraph, batches: Iterable[Any], purpose: str
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments and keywords with which a graph's model is called, batch by batch, on its device.

    Raises DataError as `inputs_of` does, and where there are no batches, which `purpose` says the use of.
    """
    device, count = device_of(graph.tensors().values()), 0
    for count, batch in enumerate(batches, start=1):  # noqa: B007
        yield inputs_of(graph.model, moved(batch, device))
    if not count:
        raise no_batches(purpose)


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with all its tensors on a device; tuples, lists and mappings keep their form."""
    return each_tensor(batch, lambda tensor: tensor.to(device))


def each_tensor(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The batch with every tensor in its tuples, lists and mappings (which become dicts) replaced by what `change` makes.

    Arrays of numbers become tensors first.
    """
    if isinstance(batch, np.ndarray) and batch.dtype.kind in "fiub":
        batch = torch.from_numpy(np.ascontiguousarray(batch).reshape(batch.shape))
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {name: each_tensor(value, change) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        items = [each_tensor(item, change) for item in batch]
        return items if isinstance(batch, list) else tuple(items)
    return batch


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Tensor | np.ndarray):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    raise DataError(
        f"a batch is a {type(batch).__name__}: give a tensor, a tuple of arguments or a dict of keyword arguments"
    )


def run_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a model returns; raises DataError where it can't take these arguments."""
    try:
        return model(*args, **kwargs)
    except (DepgraphError, torch.OutOfMemoryError):
        raise
    except _UNFIT as error:
        ids = ": look for ids beyond a table (of a tokenizer that isn't the model's)"
        raise unfit_batch(model, error, ids if isinstance(error, IndexError) else "") from error


def _checked(value: Tensor, model: nn.Module, labels: Any) -> Tensor:
    if not value.requires_grad:
        raise ScoreError(
            "the loss doesn't depend on the model's parameters: look for a detach() or no_grad() on the way"
        )
    if not bool(torch.isfinite(value.detach())):
        raise ScoreError(f"the loss of a batch is {value.item()}: {_suspect(model, labels)}")
    return value


def _suspect(model: nn.Module, labels: Any) -> str:
    if isinstance(labels, Tensor) and not labels.is_floating_point() and bool((labels == IGNORED).all()):
        return f"all labels of it, or of a sample that is looked at alone, are {IGNORED}: leave out what has nothing to predict"
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter.detach()).all()):
            return f"parameter {name!r} holds NaN or infinite values, repair or reload the weights before scoring"
    return "all weights are finite, so look at the batch and the loss"


def _signature(model: Any) -> _Signature:
    """What a module's forward function takes, or the inputs of a file."""
    if isinstance(model, ir.Model):
        names = [str(value.name) for value in runtime_inputs(model)]
        return _Signature(set(), names, set(names))
    parameters = inspect.signature(model.forward).parameters.values()
    return _Signature(
        {_VARIABLE[p.kind] for p in parameters if p.kind in _VARIABLE},
        [p.name for p in parameters if p.kind in _POSITIONAL],
        {p.name for p in parameters if p.kind not in _VARIABLE},
        {p.name for p in parameters if p.kind not in _VARIABLE and p.default is p.empty},
    )


@dataclass(frozen=True)
class _Signature:
    """What a forward function takes: which of * and **, arguments in their order, names, and those that it can't do without."""

    variable: set[str]
    order: list[str]
    names: set[str]
    needed: set[str] = field(default_factory=set)

    def require_needed(self, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise DataError where something is needed and not given, and something else given that isn't taken."""
        missing = self.needed - self.bound(args).keys() - kwargs.keys()
        spare = [name for name in kwargs if name != "labels" and not self.keyword(name)]
        if missing and spare:
            raise DataError(
                f"a batch gives {spare[0]!r}, which the forward of {type(model).__name__} doesn't take, and not {min(missing)!r}, "
                "which it needs: call the tensors of a batch as its arguments are called"
            )

    def keyword(self, name: str) -> bool:
        """Whether a keyword argument of that name is taken."""
        return name in self.names or "**" in self.variable

    def positional(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """As many of the arguments as there is room for."""
        return args if "*" in self.variable else args[: len(self.order)]

    def bound(self, args: tuple[Any, ...]) -> dict[str, Any]:
        """Arguments by the names of their parameters."""
        return dict(zip(self.order, args, strict=False))
