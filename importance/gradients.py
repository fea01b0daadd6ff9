"""Forward and backward passes over calibration batches, with gradients that are consumed as they are made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from depgraph.capture.capturing import quiet
from depgraph.capture.keeping import put_back
from depgraph.errors import DataError, ScoreError
from importance.calling import each_tensor, loss_of, moved
from importance.losses import Loss

Consume = Callable[[Tensor, Tensor], None]
"""Takes in a parameter and its gradient, dense, which is freed afterwards."""

Backward = Callable[[Any, float], None]
"""Runs a model forward on one batch and backward from its loss times a factor."""


@contextlib.contextmanager
def passes(
    model: nn.Module, wanted: Iterable[Tensor], loss: Loss | None, consume: Consume | None
) -> Iterator[Backward]:
    """A function that runs `model` forward and backward on a batch, with gradients for the `wanted` parameters alone.

    Each gradient is given to `consume` as soon as it is made and freed then, so that one lives at a time; without it, they add
    up in `grad`. The model runs in eval mode without a key-value cache; gradients, `requires_grad`, mode, buffers and the
    random state are put back at the end, also after an error.

    Raises ScoreError for a model that can have no gradients; when called, ScoreError and DataError as `loss_of` does.
    """
    require_differentiable(model)
    device = next(model.parameters()).device
    with put_back(model) as written, quiet(model), borrowed(model, wanted, consume):

        def backward(batch: Any, factor: float) -> None:
            with written:
                value = loss_of(model, each_tensor(moved(batch, device), _ordinary), loss)
            torch.autograd.backward(value if factor == 1 else value * factor)  # as no function, it leaves modes on

        yield backward


def _ordinary(tensor: Tensor) -> Tensor:
    """A tensor that autograd takes: a copy of one that was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def require_differentiable(model: nn.Module) -> None:
    """Raise ScoreError when a parameter or buffer was made in inference mode: autograd refuses it."""
    for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in named:
            if tensor.is_inference():
                raise ScoreError(
                    f"{kind} {name!r} was made under torch.inference_mode(), so that no gradient can be taken: build and load "
                    "the model outside of it"
                )


@contextlib.contextmanager
def borrowed(model: nn.Module, wanted: Iterable[Tensor], consume: Consume | None) -> Iterator[None]:
    """Gradients for the `wanted` parameters and no others, each given to `consume` as soon as it is made, and then freed.

    The `grad` and `requires_grad` of all parameters and the random state are put back afterwards.
    """
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    chosen = {id(parameter) for parameter in wanted}
    devices = {p.device for p, _, _ in before if p.device.type == "cuda"}
    handles = []

    def hook(parameter: Tensor) -> None:
        take(parameter, consume)

    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=list(devices)):
            for parameter, _, _ in before:
                parameter.grad = None
                parameter.requires_grad_(id(parameter) in chosen)
                if consume is not None and id(parameter) in chosen:
                    handles.append(parameter.register_post_accumulate_grad_hook(hook))
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, requires_grad, gradient in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


def take(parameter: Tensor, consume: Consume | None) -> None:
    """Give a parameter's gradient, if it has one, to `consume` and free it."""
    if parameter.grad is None or consume is None:
        return
    consume(parameter, parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad)
    parameter.grad = None


def each_of(batches: Iterable[Any], progress: str = "") -> Iterator[Any]:
    """The batches, with a bar of the title `progress` on stderr unless that is empty.

    Raises DataError at the end if there were none.
    """
    count = 0
    for batch in _shown(batches, progress) if progress else batches:
        yield batch
        count += 1
    if not count:
        raise DataError("there are no batches to score with (a generator gives its batches only once: pass a list)")


def _shown(batches: Iterable[Any], title: str) -> Iterable[Any]:
    from rich.console import Console
    from rich.progress import track

    return track(batches, title, console=Console(stderr=True), transient=True)


def by_id(parameters: Mapping[str, Tensor]) -> dict[int, str]:
    """Names of parameters by the identity of their tensors."""
    return {id(parameter): name for name, parameter in parameters.items()}


def add_to(sums: dict[Any, Tensor], key: Any, part: Tensor) -> None:
    """Add a new tensor to a running sum, in place once there is one."""
    if key in sums:
        sums[key] += part
    else:
        sums[key] = part
