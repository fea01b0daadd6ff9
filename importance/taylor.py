"""First-order Taylor saliency: how far the loss would move if the group were zero, to first order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from depgraph import DependencyGraph
from depgraph.capture.capturing import quiet
from depgraph.capture.keeping import Written, put_back
from depgraph.errors import DataError
from importance.calling import check_batches, loss_of, moved
from importance.choices import pick
from importance.layout import Layout
from importance.losses import Loss
from importance.normalisation import Normalisation, NormalisationSpec
from importance.reduction import Reduction, ReductionSpec
from importance.sums import Saliency, index_sums


def _signed(weight: Tensor, gradient: Tensor) -> Tensor:
    return (weight * gradient.conj()).real


def _unsigned(weight: Tensor, gradient: Tensor) -> Tensor:
    return _signed(weight, gradient).abs_()


FORMS: dict[str, Saliency] = {"element": _unsigned, "vector": _signed}
ACCUMULATE = {"abs": "gradients are consumed batch by batch", "signed": "gradients are added up over all batches first"}


@dataclass(frozen=True)
class Taylor:
    """First-order saliency S = W * G with G = d loss / d W: LLM-Pruner's Element-1 and Vector (METHODS.md 2.1).

    Index j of a tensor's dim scores sum_k |S_jk| (`form="element"`) or |sum_k S_jk| (`form="vector"`), k running over
    all other dims. A group sums the indices it has in each tensor, then (by default) the tensors. Scores aren't
    normalised: they are changes of one loss and compare across axes.

    With several batches, `accumulate="abs"` adds up the |S| of each: every gradient is consumed and freed while the
    backward pass makes the next, so that the peak is the weights and one gradient, whatever the number of batches. The
    paper takes the absolute value once, of the gradient of all samples together. The two are the same for one batch;
    for more, `accumulate="signed"` gives the paper's value (up to a factor: batches are added, not averaged) and holds
    all gradients at once.

    The model runs in eval mode without a key-value cache; frozen parameters are scored like others. Its gradients,
    `requires_grad`, mode and the random state are put back, also after an error.

    Args:
        batches: an iterable of tensors (the single argument), tuples (arguments) or dicts (keyword arguments).
        loss: `loss(output, batch)` -> scalar; None takes the model's own loss (put labels into the batches), or
            next-token cross-entropy for a language model.
        reduction: over members: a name, a function or a `Reduction`.
        normalise: per axis: a name, a function, a `Normalisation` or a tuple of names and functions.
        form: "element" or "vector".
        accumulate: "abs" or "signed".
        progress: show a bar on stderr.

    Raises, when called:
        DataError: there are no batches, or one doesn't fit the model.
        ScoreError: no loss can be found, or loss, weights or gradients are NaN or infinite; an unknown name, at once.
    """

    batches: Iterable[Any]
    loss: Loss | None = None
    reduction: ReductionSpec = "sum"
    normalise: NormalisationSpec = "none"
    form: str = "element"
    accumulate: str = "abs"
    progress: bool = False

    def __post_init__(self) -> None:
        check_batches(self.batches)
        Reduction.of(self.reduction)
        Normalisation.of(self.normalise)
        pick(FORMS, self.form, "form of Taylor saliency")
        pick(ACCUMULATE, self.accumulate, "way to accumulate gradients")

    def __call__(self, graph: DependencyGraph, /) -> dict[str, np.ndarray]:
        layout = Layout.of(graph)
        if not layout.parameters:
            return {}
        consumer = _Consumer(layout, FORMS[self.form])
        each_batch = self.accumulate == "abs"
        hook = consumer if each_batch else None
        with put_back(graph.model) as written, quiet(graph.model), borrowed(graph.model, layout, hook):
            self._backward(graph.model, written)
            if not each_batch:
                for parameter in layout.parameters.values():
                    consumer(parameter)
        return layout.scores(consumer.sums, Reduction.of(self.reduction), Normalisation.of(self.normalise))

    def _backward(self, model: nn.Module, written: Written) -> None:
        device = next(model.parameters()).device
        count = 0
        for batch in self._shown():
            with written:
                loss = loss_of(model, moved(batch, device), self.loss)
            loss.backward()
            count += 1
        if not count:
            raise DataError("there are no batches to score with (a generator gives its batches only once: pass a list)")

    def _shown(self) -> Iterable[Any]:
        if not self.progress:
            return self.batches
        from rich.console import Console
        from rich.progress import track

        return track(self.batches, "scoring with gradients", console=Console(stderr=True), transient=True)


class _Consumer:
    """Adds the saliency of a parameter's gradient, summed per index, to running sums, and drops the gradient."""

    def __init__(self, layout: Layout, saliency: Saliency) -> None:
        self.saliency = saliency
        self.dims = layout.dims
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
        self.sums[name] = {d: self.sums[name][d].to(part.device, part.dtype) + part.abs() for d, part in found.items()}


@contextlib.contextmanager
def borrowed(model: nn.Module, layout: Layout, hook: Callable[[Tensor], None] | None) -> Iterator[None]:
    """Gradients for the layout's parameters and no others, each given to `hook` as soon as it is made.

    The `grad` and `requires_grad` of all parameters and the random state are put back afterwards.
    """
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    wanted = {id(parameter) for parameter in layout.parameters.values()}
    devices = {p.device for p, _, _ in before if p.device.type == "cuda"}
    handles = []
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=list(devices)):
            for parameter, _, _ in before:
                parameter.grad = None
                parameter.requires_grad_(id(parameter) in wanted)
                if hook is not None and id(parameter) in wanted:
                    handles.append(parameter.register_post_accumulate_grad_hook(hook))
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, requires_grad, gradient in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
