"""LoRAPrune: gradients of frozen weights, estimated from those of the low-rank adapters that are being trained on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from depgraph import DependencyGraph
from depgraph.errors import ScoreError
from importance.activation import with_unread
from importance.gradients import require_module
from importance.layout import Layout
from importance.reduction import Reduction
from importance.sums import index_sums


@dataclass(frozen=True)
class Adapter:
    """A low-rank adapter A [rank, in], B [out, rank] on a weight: what is used is W + scale * B A, turned if W is [in, out]."""

    weight: Tensor
    a: Tensor
    b: Tensor
    scale: float
    turned: bool

    def delta(self) -> Tensor:
        """What the adapter adds to its weight, in float32 or wider and of its shape."""
        return self._placed(self.scale * (_matrix(self.b) @ _matrix(self.a)))

    def gradient(self) -> Tensor:
        """The estimate dB A + B dA - dB dA of the weight's gradient, of its shape; an adapter without a gradient has zeros."""
        a, b, da, db = _matrix(self.a), _matrix(self.b), _gradient(self.a), _gradient(self.b)
        return self._placed(db @ a + b @ da - db @ da)

    def _placed(self, matrix: Tensor) -> Tensor:
        return (matrix.T if self.turned else matrix).reshape(self.weight.shape)


def adapters_of(model: nn.Module) -> Iterator[Adapter]:
    """The active adapters that peft has put on a model's maps, convolutions and tables (`lora_A`, `lora_B`, `scaling`)."""
    for module in model.modules():
        pairs, base = getattr(module, "lora_A", None), getattr(module, "base_layer", None)
        if not isinstance(pairs, nn.ModuleDict) or not isinstance(getattr(base, "weight", None), Tensor):
            continue
        tables = getattr(module, "lora_embedding_A", {})
        for name in getattr(module, "active_adapters", pairs.keys()):
            if name in pairs or name in tables:
                yield _adapter(module, base, name)


def _adapter(module: Any, base: Any, name: str) -> Adapter:
    if name not in module.lora_A:  # a table, whose rows are looked up
        return Adapter(
            base.weight, module.lora_embedding_A[name], module.lora_embedding_B[name], module.scaling[name], True
        )
    turned = bool(getattr(module, "fan_in_fan_out", False))
    return Adapter(base.weight, module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name], turned)


class LoraPrune:
    """Scores by |G * (W + s B A)| with the estimate G = dB A + B dA - dB dA of the gradient (METHODS.md 2.20).

    Only the adapters need gradients, so that scores come at no cost while these are trained: call `update` after every
    backward pass, before the optimiser's step. Every weight's group scores are divided by their L2 norm and added over the
    weights of an axis; of these, a moving average is kept over the updates. The object is a scorer then. `axes` are those on
    which a weight has an adapter, to be given to `only`: the others, among them the adapters' own ranks, score above all of
    these, by the size of their weights, but a plan that takes a share of every axis takes theirs too.

    Args:
        graph: of the model with its adapters in it.
        decay: what is left of the average at each update.

    Raises ScoreError: when the model has no adapters on weights of an axis, or `decay` isn't in [0, 1).
    """

    comparable: ClassVar[bool] = False

    def __init__(self, graph: DependencyGraph, decay: float = 0.9) -> None:
        if not 0 <= decay < 1:
            raise ScoreError(f"decay must be at least 0 and below 1, it is {decay}")
        require_module(graph, type(self).__name__)
        self.graph, self.decay, self.updates = graph, decay, 0
        self.layout = Layout.of(graph)
        names = {id(parameter): name for name, parameter in self.layout.parameters.items()}
        self._adapters: dict[str, list[Adapter]] = {}
        for adapter in adapters_of(graph.model):
            if id(adapter.weight) in names:
                self._adapters.setdefault(names[id(adapter.weight)], []).append(adapter)
        self.places = {
            axis: [place for place in places if place.parameter in self._adapters]
            for axis, places in self.layout.places.items()
        }
        if not self._adapters:
            raise ScoreError(
                f"{graph.name} has no LoRA adapters on the weights of its axes: wrap it with peft, then trace it"
            )
        self.average = {axis: np.zeros(self.layout.sizes[axis]) for axis, places in self.places.items() if places}

    @property
    def axes(self) -> list[str]:
        """The names of the axes on which a weight has an adapter."""
        return list(self.average)

    def update(self) -> None:
        """Take the adapters' gradients of this step into the average.

        Raises ScoreError, the average as it was, when no adapter has a gradient, or one is NaN or infinite.
        """
        if all(a.a.grad is None and a.b.grad is None for found in self._adapters.values() for a in found):
            raise ScoreError("no adapter has a gradient: call update() after backward() and before zero_grad()")
        found = self._step()
        for axis, scores in found.items():
            self.average[axis] = self.decay * self.average[axis] + (1 - self.decay) * scores
        self.updates += 1

    def __call__(self, graph: DependencyGraph, /) -> dict[str, np.ndarray]:
        if not self.updates:
            raise ScoreError("LoRAPrune has no scores yet: call update() after each backward pass of the training")
        sizes = {axis.name: axis.size for axis in graph.axes}
        if sizes != self.layout.sizes:
            raise ScoreError(
                "these scores are of a graph with other axes: make a LoraPrune for the graph that is pruned"
            )
        return with_unread(graph, {axis: scores.copy() for axis, scores in self.average.items()})

    @torch.no_grad()
    def _step(self) -> dict[str, np.ndarray]:
        """The scores of this step's gradients alone."""
        sums = {}
        for name, adapters in self._adapters.items():
            weight = self.layout.parameters[name]
            used = weight + torch.stack([adapter.delta() for adapter in adapters]).sum(dim=0)
            gradient = torch.stack([adapter.gradient() for adapter in adapters]).sum(dim=0)
            sums[name] = {
                d: part.cpu().double().numpy()
                for d, part in index_sums(_saliency, (used, gradient), self.layout.dims[name]).items()
            }
            if not all(np.isfinite(part).all() for part in sums[name].values()):
                raise ScoreError(
                    f"{name!r} or the gradients of its adapter hold NaN or infinite values: look at the loss"
                )
        reduction = Reduction("sum", each=_unit)
        return {
            axis: reduction([(p.labels, sums[p.parameter][p.dim]) for p in places], self.layout.sizes[axis])
            for axis, places in self.places.items()
            if places
        }


def _saliency(weight: Tensor, gradient: Tensor) -> Tensor:
    return (weight * gradient).abs_()


def _unit(scores: np.ndarray) -> np.ndarray:
    """Scores over their L2 norm; zeros stay."""
    norm = float(np.linalg.norm(scores))
    return scores / norm if norm else scores


def _matrix(weight: Tensor) -> Tensor:
    return weight.detach().flatten(1).to(torch.promote_types(weight.dtype, torch.float32))


def _gradient(weight: Tensor) -> Tensor:
    return _matrix(torch.zeros_like(weight) if weight.grad is None else weight.grad)
