"""LoRAPrune: gradients of frozen weights estimated from those of their low-rank adapters, while these are trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from depgraph import DependencyGraph
from depgraph.errors import ScoreError
from importance.activation import with_unread
from importance.layout import Layout, Place
from importance.reduction import Reduction
from importance.sums import index_sums, wide


@dataclass(frozen=True, eq=False)
class Adapter:
    """A weight W and the two factors that are trained for it: W + scale * B A.

    `a` is [rank, ...] and `b` [out, rank, ...], further dims those of a convolution; `turned` where W has its inputs along dim 0.
    """

    name: str
    weight: Tensor
    a: Tensor
    b: Tensor
    scale: float = 1.0
    turned: bool = False

    def delta(self, b: Tensor, a: Tensor) -> Tensor:
        """B A in the shape of W, in float32 or wider."""
        product = wide(b).flatten(1) @ wide(a).flatten(1)
        return (product.T if self.turned else product).reshape(self.weight.shape)

    def gradient(self) -> Tensor:
        """The estimate of d loss / d W: dB A + B dA - dB dA (METHODS.md 2.20), in the shape of W.

        Raises ScoreError when the factors have no gradients, or some that are NaN or infinite.
        """
        da, db = self.a.grad, self.b.grad
        if da is None or db is None:
            raise ScoreError(
                f"adapter {self.name!r} has no gradients: call update() after backward() and before gradients are zeroed, and keep "
                "its factors trainable"
            )
        if not bool(torch.isfinite(da).all() and torch.isfinite(db).all()):
            raise ScoreError(
                f"the gradients of adapter {self.name!r} are NaN or infinite: skip update() in such a step"
            )
        return self.delta(db, self.a) + self.delta(self.b, da) - self.delta(db, da)

    def merged(self) -> Tensor:
        """W + scale * B A."""
        return wide(self.weight) + self.scale * self.delta(self.b, self.a)


def adapters_of(model: nn.Module) -> list[Adapter]:
    """The active LoRA adapters of a peft model, of linear maps, convolutions without groups and embeddings.

    Raises ScoreError when peft isn't installed, or the model has none.
    """
    try:
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise ScoreError("peft isn't installed: install it, or give adapters=[importance.Adapter(...)]") from error
    found = [
        adapter
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        for adapter in _of_layer(name, module)
    ]
    if not found:
        raise ScoreError(
            f"{type(model).__name__} has no LoRA adapter that is active: wrap it with peft.get_peft_model, or give "
            "adapters=[importance.Adapter(...)]"
        )
    return found


def _of_layer(name: str, layer: Any) -> Iterator[Adapter]:
    weight = getattr(layer.get_base_layer(), "weight", None)
    for active in layer.active_adapters:
        table = active in layer.lora_embedding_A
        if active not in layer.lora_A and not table:
            continue
        a = layer.lora_embedding_A[active] if table else layer.lora_A[active].weight
        b = layer.lora_embedding_B[active] if table else layer.lora_B[active].weight
        turned = table or bool(getattr(layer, "fan_in_fan_out", False))
        if weight is not None and a.flatten(1).shape[1] * len(b) == weight.numel():
            yield Adapter(f"{name} ({active})", weight, a, b, float(layer.scaling[active]), turned)


class LoRAPrune:
    """Scores that follow the training of adapters (METHODS.md 2.20): call `update()` after each backward pass, then ask a plan.

    Element score |G * (W + s B A)| with G estimated from the adapter; summed per index, then over the indices that a group has in
    one dim of one weight. These numbers, one for each group, are brought to L2 norm 1 over the groups of an axis and summed over
    the weights; the running mean of that over steps (`decay` of the old, the rest of the new, unbiased from the first step on) is
    the score. The training loop is the caller's. `axes` are those that adapted weights reach; the ranks of adapters, and whatever
    else isn't reached, score above all of them, by the size of their weights.

        tracker = importance.LoRAPrune(depgraph.trace(peft_model, batch))
        ... loss.backward(); tracker.update(); optimizer.step() ...
        plan = graph.plan(tracker, target, only=tracker.axes)

    Args:
        graph: of the model with its adapters.
        adapters: None for those of peft, see `adapters_of`.
        decay: of the running mean, at least 0 and below 1.
        power: 1 sums |G * W|, as the released code; 2 its square, as the paper.

    Raises ScoreError: no adapters, or none that an axis reaches; `decay` or `power` out of range; scores before an update; when
    updating, for missing gradients, or NaN and infinite ones (the scores stay as they were then).
    """

    comparable: ClassVar[bool] = False

    def __init__(
        self,
        graph: DependencyGraph,
        adapters: Iterable[Adapter] | None = None,
        *,
        decay: float = 0.9,
        power: int = 1,
    ) -> None:
        if not 0 <= decay < 1 or power not in (1, 2):
            raise ScoreError(f"decay must be from 0 to below 1 and power 1 or 2, they are {decay} and {power}")
        self.layout = Layout.of(graph)
        self.adapters = list(adapters_of(graph.model) if adapters is None else adapters)
        self.decay, self.power, self.steps = decay, power, 0
        names = {id(parameter): name for name, parameter in self.layout.parameters.items()}
        self.by_name = {names[id(a.weight)]: a for a in self.adapters if id(a.weight) in names}
        if not self.by_name:
            raise ScoreError(
                "no axis of the graph reaches a weight that has an adapter: trace the model with its adapters"
            )
        self.means: dict[str, np.ndarray] = {}

    @property
    def axes(self) -> list[str]:
        """The names of the axes that reach a weight with an adapter."""
        return [axis for axis, places in self.layout.places.items() if any(p.parameter in self.by_name for p in places)]

    def update(self) -> None:
        """Take in the gradients that the adapters have now."""
        sums = {name: self._per_index(name, adapter) for name, adapter in self.by_name.items()}
        for axis, places in self.layout.places.items():
            known = [p for p in places if p.parameter in sums]
            if known:
                new = self._joined(known, sums, self.layout.sizes[axis])
                self.means[axis] = self.decay * self.means.get(axis, np.zeros_like(new)) + (1 - self.decay) * new
        self.steps += 1

    def _per_index(self, name: str, adapter: Adapter) -> dict[int, np.ndarray]:
        found = index_sums(self._element, (adapter.gradient(), adapter.merged()), self.layout.dims[name])
        return {d: part.cpu().double().numpy() for d, part in found.items()}

    def _element(self, gradient: Tensor, weight: Tensor) -> Tensor:
        return (gradient * weight).abs().pow(self.power)

    def _joined(self, places: list[Place], sums: dict[str, dict[int, np.ndarray]], size: int) -> np.ndarray:
        joined: np.ndarray = Reduction(each=_to_unit_norm)([(p.labels, sums[p.parameter][p.dim]) for p in places], size)
        return joined

    def __call__(self, graph: DependencyGraph, /) -> dict[str, np.ndarray]:
        if not self.steps:
            raise ScoreError("no gradients were taken in yet: call update() after a backward pass")
        sizes = {axis.name: axis.size for axis in graph.axes}
        if any(sizes.get(axis) != len(mean) for axis, mean in self.means.items()):
            raise ScoreError("the graph isn't the one that was followed while training: make a LoRAPrune of this one")
        unbiased = 1 - self.decay**self.steps
        return with_unread(graph, {axis: mean / unbiased for axis, mean in self.means.items()})


def _to_unit_norm(scores: np.ndarray) -> np.ndarray:
    norm = float(np.linalg.norm(scores))
    return scores / norm if norm else scores
