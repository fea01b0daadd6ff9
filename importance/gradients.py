"""Backward passes on borrowed gradients: each is taken as soon as it is made, and the model is left as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from depgraph import DependencyGraph
from depgraph.capture.capturing import quiet
from depgraph.capture.keeping import put_back
from depgraph.errors import ScoreError, no_batches
from depgraph.offloading import offloaded
from depgraph.scoring import require_graph
from importance.calling import each_tensor, loss_of, moved
from importance.layout import Layout
from importance.losses import Loss
from importance.sums import Saliency, index_sums

Hook = Callable[[Tensor], None]
"""Called with a parameter that has just been given its gradient."""


def require_module(graph: DependencyGraph, who: str, needs: str = "gradients") -> None:
    """Raise ScoreError where the graph is of a file, which has no gradients and no modules; `who` needs them."""
    require_graph(graph)
    if not isinstance(graph.model, nn.Module):
        raise ScoreError(
            f"{who} needs {needs}, which {graph.name}, an ONNX file, doesn't give: load the PyTorch model and trace that, or take a "
            "score from weights or activations, such as Magnitude or Activation"
        )


@contextlib.contextmanager
def backwards(
    model: nn.Module, parameters: Mapping[str, Tensor], loss: Loss | None, hook: Hook | None
) -> Iterator[Callable[..., None]]:
    """A function that runs one batch (or sample) backward, its gradients going to `hook`, or added up without one.

    A second argument is called with the loss before that goes backward, and may give another in its place. The model runs in
    eval mode without a key-value cache, and is put back afterwards, also after an error. Raises DataError when the function was
    never called: there were no batches.
    """
    if not isinstance(model, nn.Module):
        raise ScoreError(
            "this score needs gradients, which an ONNX file doesn't give: load the PyTorch model and trace that"
        )
    if offloaded(model):
        raise ScoreError(
            f"this score needs gradients, which {type(model).__name__} doesn't give while its weights are offloaded: load it whole, or "
            "take a score that needs only forward passes, such as obs or wanda-sp"
        )
    device = next(model.parameters()).device
    calls = 0
    with put_back(model) as written, quiet(model), _recurrent_in_products(model), borrowed(model, parameters, hook):

        def backward(batch: Any, before: Callable[[Tensor], Any] = lambda loss: None) -> None:
            nonlocal calls
            with written:
                value = loss_of(model, each_tensor(moved(batch, device), _ordinary), loss)
            changed = before(value)
            (value if changed is None else changed).backward()
            calls += 1

        yield backward
        if not calls:
            raise no_batches("to score with")


@contextlib.contextmanager
def _recurrent_in_products(model: nn.Module) -> Iterator[None]:
    """Without the libraries that run a recurrent layer as one call: their products can't be seen, and cuDNN refuses in eval mode."""
    if not any(isinstance(module, nn.RNNBase) for module in model.modules()):
        yield
        return
    enabled, *_ = torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=enabled, _fp32_precision=None)


def _ordinary(tensor: Tensor) -> Tensor:
    """A tensor that autograd takes: a copy of one that was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def _require_differentiable(name: str, parameter: Tensor) -> None:
    if parameter.is_inference():
        raise ScoreError(
            f"parameter {name!r} was made in inference mode and can't have a gradient: load or build the model outside "
            "torch.inference_mode()"
        )
    if not (parameter.is_floating_point() or parameter.is_complex()):
        raise ScoreError(
            f"parameter {name!r} holds {parameter.dtype} and can't have a gradient: score the model before it is quantised"
        )


class GradientSums:
    """A hook that adds the saliency of a parameter's gradient, summed per index, to running sums, and drops the gradient.

    `share` is what counts of it.
    """

    def __init__(self, layout: Layout, saliency: Saliency) -> None:
        self.saliency = saliency
        self.dims = layout.dims
        self.share = 1.0
        self.names = {id(parameter): name for name, parameter in layout.parameters.items()}
        self.sums: dict[str, dict[int, Tensor]] = {
            name: {d: torch.zeros(parameter.shape[d], dtype=torch.float64) for d in self.dims[name]}
            for name, parameter in layout.parameters.items()
        }

    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        name = self.names[id(parameter)]
        gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        found = index_sums(self.saliency, (parameter, gradient), self.dims[name])
        parameter.grad = None
        self.sums[name] = {
            d: self.sums[name][d].to(part.device, part.dtype) + part.abs() * self.share for d, part in found.items()
        }


class ElementSums:
    """A hook that adds a function of every gradient, in float32 or wider, to a sum of the parameter's shape, and drops it."""

    def __init__(self, of: Callable[[Tensor], Tensor]) -> None:
        self.of = of
        self.sums: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        found = self.of(gradient.to(torch.promote_types(gradient.dtype, torch.float32)))
        held = self.sums.get(id(parameter))
        self.sums[id(parameter)] = found if held is None else held.add_(found)
        parameter.grad = None

    def total(self, parameter: Tensor) -> Tensor:
        """The sum for a parameter; zeros where it never had a gradient."""
        wide = torch.promote_types(parameter.dtype, torch.float32)
        return self.sums.get(id(parameter), torch.zeros_like(parameter, dtype=wide, requires_grad=False))


@contextlib.contextmanager
def borrowed(model: nn.Module, parameters: Mapping[str, Tensor], hook: Hook | None) -> Iterator[None]:
    """Gradients for these parameters and no others, each given to `hook` as soon as it is made.

    The `grad` and `requires_grad` of all parameters and the random state are put back afterwards. Raises ScoreError, before
    anything is changed, for a parameter that can't have a gradient.
    """
    for name, parameter in parameters.items():
        _require_differentiable(name, parameter)
    for name, buffer in model.named_buffers():
        if buffer.is_inference():
            raise ScoreError(
                f"buffer {name!r} was made in inference mode, where autograd takes nothing from: load or build the model outside "
                "torch.inference_mode()"
            )
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    wanted = {id(parameter) for parameter in parameters.values()}
    devices = {p.device for p, _, _ in before if p.device.type == "cuda"}
    handles = []
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=list(devices)):
            for parameter, _, _ in before:
                parameter.grad = None
                parameter.requires_grad_(id(parameter) in wanted)
            if hook is not None:
                handles += [p.register_post_accumulate_grad_hook(hook) for p, _, _ in before if id(p) in wanted]
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, requires_grad, gradient in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
