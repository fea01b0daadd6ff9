"""The Kronecker factors of all weights of a model that lose rows or columns, from one backward pass for each batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from depgraph import DependencyGraph
from importance.calling import inputs_of, samples_in
from importance.factors import FactorSums
from importance.gradients import backwards
from importance.layout import Layout, Place
from importance.losses import Loss
from importance.products import Product, Rows, products
from importance.progress import shown

Way = tuple[str, bool]
"""A weight by name, and whether it is stored [columns, rows]."""

Factors = Mapping[Way, FactorSums]
"""What was summed for every weight and way round."""


@dataclass(frozen=True)
class Backward:
    """What to go back through: `loss` (see `Taylor`) on `batches`; a bar on stderr, if there is to be `progress`."""

    batches: Iterable[Any]
    loss: Loss | None = None
    progress: bool = False


@dataclass(frozen=True)
class Kronecker:
    """The factors of the weights that `layout` reaches, over so many samples."""

    layout: Layout
    factors: Factors
    samples: int

    @classmethod
    def of(
        cls, graph: DependencyGraph, layout: Layout, how: Backward, kind: type[FactorSums] = FactorSums
    ) -> Kronecker:
        """Go back once for each batch; each weight is summed in a way that is `kind`'s."""
        names = {id(parameter): name for name, parameter in layout.parameters.items() if parameter.ndim > 1}
        places, factors = _by_parameter(layout), dict[Way, FactorSums]()
        samples, total = 1, 0

        def see(product: Product, rows: Rows) -> None:
            name = names[id(product.weight)]
            if (name, product.turned) not in factors:
                factors[name, product.turned] = kind(product, [place for _, place in places[name]])
            factors[name, product.turned].add(product, replace(rows, gradients=rows.gradients * samples))

        watched: list[RemovableHandle] = []

        def watch(loss: Tensor) -> None:
            watched.extend(product.watch(see) for product in products(loss) if id(product.weight) in names)

        with backwards(graph.model, layout.parameters | _biases(graph), how.loss, _drop) as backward:
            for batch in shown(how.batches, "scoring with gradients", how.progress):
                samples = samples_in(graph, *inputs_of(graph.model, batch)).count
                total += samples
                try:
                    backward(batch, watch)
                finally:
                    _unwatch(watched)
        return cls(layout, factors, total)

    @cached_property
    def places(self) -> dict[str, list[tuple[str, Place]]]:
        """The axes that reach each parameter, and where."""
        return _by_parameter(self.layout)

    @cached_property
    def read(self) -> frozenset[str]:
        """The axes that some weight reads as columns."""
        ways = self.factors.items()
        return frozenset(axis for (name, _), sums in ways for axis, p in self.places[name] if p.dim == sums.columns)

    def positions(self, sums: FactorSums) -> float:
        """At how many positions of a sample a weight was used."""
        return sums.used / self.samples


def prunable(graph: DependencyGraph) -> Layout:
    """The layout without the axes that may not lose anything: their factors (of a vocabulary, say) would be large and unused."""
    layout = Layout.of(graph)
    places = {axis: found for axis, found in layout.places.items() if graph[axis].prunable.any()}
    reached = {place.parameter for found in places.values() for place in found}
    return replace(layout, parameters={n: p for n, p in layout.parameters.items() if n in reached}, places=places)


def _by_parameter(layout: Layout) -> dict[str, list[tuple[str, Place]]]:
    found: dict[str, list[tuple[str, Place]]] = {name: [] for name in layout.parameters}
    for axis, places in layout.places.items():
        for place in places:
            found[place.parameter].append((axis, place))
    return found


def _biases(graph: DependencyGraph) -> dict[str, Tensor]:
    """All vectors of a model that can have gradients: a product only shows its bias where this has one."""
    vectors = ((name, p) for name, p in graph.model.named_parameters() if p.ndim == 1 and p.is_floating_point())
    return {name: vector for name, vector in vectors if not vector.is_inference()}


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _unwatch(watched: list[RemovableHandle]) -> None:
    while watched:
        watched.pop().remove()
