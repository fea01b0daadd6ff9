"""LLM Surgeon: what removing rows and columns costs the loss, with its curvature as a Kronecker product for each weight.

With A the second moment of what comes into a linear map and G that of the gradients of what it puts out, the loss's Hessian
is about G (x) A (METHODS.md 2.14). Removing a row or a column with the optimal update of what stays costs half the squares
of it, measured by one factor, over the diagonal of the other one's inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from depgraph import DependencyGraph
from depgraph.errors import ScoreError
from importance.activation import with_unread
from importance.calling import check_batches, inputs_of
from importance.gradients import backwards, require_module, shown
from importance.layout import Layout
from importance.losses import Loss
from importance.normalisation import Normalisation, NormalisationSpec
from importance.problems import damped, inverse_of
from importance.products import Product, Rows, products
from importance.reduction import Reduction, ReductionSpec
from importance.rows import Samples

Way = tuple[str, bool]
"""A weight by name, and whether it is stored [columns, rows]."""

Factors = Mapping[Way, "FactorSums"]
"""What was summed for every weight and way round."""


def row_costs(weight: Tensor, inputs: Tensor, gradients: Tensor) -> Tensor:
    """1/2 (W A W')_rr / (G^-1)_rr for every row: W [rows, columns], A [columns, columns], G [rows, rows] -> [rows]."""
    return _costs((weight @ inputs * weight).sum(dim=1), gradients)


def column_costs(weight: Tensor, inputs: Tensor, gradients: Tensor) -> Tensor:
    """1/2 (W' G W)_cc / (A^-1)_cc for every column: W [rows, columns], A [columns, columns], G [rows, rows] -> [columns]."""
    return _costs((gradients @ weight * weight).sum(dim=0), inputs)


def _costs(energy: Tensor, curvature: Tensor, where: object = "a weight") -> Tensor:
    return energy / inverse_of(curvature, where).diagonal() / 2


def surgeon_update(
    weight: Tensor, inputs: Tensor, gradients: Tensor, rows: Sequence[int], columns: Sequence[int]
) -> Tensor:
    """W after removing rows R and columns C, what stays making up for them: a new [rows, columns], zero where they were.

    -G^-1_:R (G^-1_RR)^-1 W_R and -W_C (A^-1_CC)^-1 A^-1_C:, both of the original W, are added to it. Raises ScoreError for a
    singular A or G.
    """
    gone_rows, gone_columns = (torch.as_tensor(list(given), dtype=torch.long) for given in (rows, columns))
    updated = weight.clone()
    if len(gone_rows):
        inverse = inverse_of(gradients, "the outputs' gradients")
        updated -= inverse[:, gone_rows] @ torch.linalg.solve(inverse[gone_rows][:, gone_rows], weight[gone_rows])
    if len(gone_columns):
        inverse = inverse_of(inputs, "the inputs")
        updated -= weight[:, gone_columns] @ torch.linalg.solve(
            inverse[gone_columns][:, gone_columns], inverse[gone_columns]
        )
    updated[gone_rows] = 0
    updated[:, gone_columns] = 0
    return updated


@dataclass(frozen=True)
class Surgeon:
    """LLM Surgeon's costs, summed over the rows and columns that a group has in all linear maps and convolutions.

    Factors are gathered in one forward and backward pass for each batch: A with a one appended for a bias, G of the gradients
    of each sample's loss (the empirical Fisher). Costs are sums over the positions of a sample, so that layers with many (the
    first convolutions) and with few compare; for a language model, that is the paper's times the length. Positions on which the
    loss doesn't depend (padding, mostly) don't count. Of each weight only what some axis needs is held: G for its rows, A for
    its columns, and sums of squares for the others. Where a weight is used several times, its uses are added; stacked weights
    of experts, multiplied in batches, don't count. Costs are of one loss and compare across axes; an axis with neither row nor
    column in such a map goes last, by the size of its weights.

    Args:
        batches: an iterable of tensors, tuples (arguments) or dicts (keyword arguments).
        loss: `loss(output, batch)` -> scalar, a mean over samples; None takes the model's own loss, or next-token
            cross-entropy.
        damping: added to the diagonals of A and G, as a share of their means.
        reduction: over members: a name, a function or a `Reduction`.
        normalise: per axis: a name, a function, a `Normalisation` or a tuple of names and functions.
        progress: show a bar on stderr.
        note: called with the graph and what was gathered, such as `importance.RowUpdate().note`.

    Raises, when called: DataError and ScoreError as `Taylor`; ScoreError for a singular factor.
    """

    comparable: ClassVar[bool] = True
    additive: ClassVar[bool] = True

    gradients: ClassVar[bool] = True

    batches: Iterable[Any]
    loss: Loss | None = None
    damping: float = 0.01
    reduction: ReductionSpec = "sum"
    normalise: NormalisationSpec = "none"
    progress: bool = False
    note: Callable[[DependencyGraph, Factors], None] | None = None

    def __post_init__(self) -> None:
        check_batches(self.batches)
        if not 0 <= self.damping < float("inf"):
            raise ScoreError(f"damping must be a finite number of at least 0, it is {self.damping}")
        Reduction.of(self.reduction)
        Normalisation.of(self.normalise)

    def __call__(self, graph: DependencyGraph, /) -> dict[str, np.ndarray]:
        require_module(graph, type(self).__name__)
        layout = _prunable(graph, Layout.of(graph))
        if not layout.parameters:
            return with_unread(graph, {})
        gathered, samples = self._gather(graph, layout)
        if self.note is not None:
            self.note(graph, gathered)
        costs: dict[str, dict[int, Tensor]] = {}
        for (name, _), sums in gathered.items():
            for d, found in sums.costs(self.damping, name).items():
                held = costs.setdefault(name, {})
                held[d] = found * (sums.used / samples) + held.get(d, 0)
        within = replace(
            layout,
            parameters={name: layout.parameters[name] for name in costs},
            places={
                axis: tuple(p for p in places if p.dim in costs.get(p.parameter, {}))
                for axis, places in layout.places.items()
            },
        )
        scores = within.scores(costs, Reduction.of(self.reduction), Normalisation.of(self.normalise))
        return with_unread(graph, {axis: found for axis, found in scores.items() if within.places[axis]})

    def _gather(self, graph: DependencyGraph, layout: Layout) -> tuple[dict[Way, FactorSums], int]:
        """What was summed for every weight and way round, and over how many samples."""
        names = {id(parameter): name for name, parameter in layout.parameters.items() if parameter.ndim > 1}
        gathered: dict[Way, FactorSums] = {}
        samples, total = 1, 0

        def see(product: Product, rows: Rows) -> None:
            name = names[id(product.weight)]
            if (name, product.turned) not in gathered:
                gathered[name, product.turned] = FactorSums(product, layout.dims[name])
            gathered[name, product.turned].add(product, replace(rows, gradients=rows.gradients * samples))

        watched: list[RemovableHandle] = []

        def watch(loss: Tensor) -> None:
            watched.extend(product.watch(see) for product in products(loss) if id(product.weight) in names)

        with backwards(graph.model, layout.parameters | _biases(graph), self.loss, _drop) as backward:
            for batch in shown(self.batches, self.progress):
                samples = Samples.of(*inputs_of(graph.model, batch)).count
                total += samples
                try:
                    backward(batch, watch)
                finally:
                    while watched:
                        watched.pop().remove()
        return gathered, total


def _prunable(graph: DependencyGraph, layout: Layout) -> Layout:
    """A layout without the axes that may not lose anything: their factors (of a vocabulary, say) would be large and unused."""
    places = {axis: found for axis, found in layout.places.items() if graph[axis].prunable.any()}
    reached = {place.parameter for found in places.values() for place in found}
    return replace(layout, parameters={n: p for n, p in layout.parameters.items() if n in reached}, places=places)


def _biases(graph: DependencyGraph) -> dict[str, Tensor]:
    """All vectors of a model that can have gradients: a product only shows its bias where this has one."""
    vectors = ((name, p) for name, p in graph.model.named_parameters() if p.ndim == 1 and p.is_floating_point())
    return {name: vector for name, vector in vectors if not vector.is_inference()}


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


class FactorSums:
    """What the costs of one weight's rows and columns need, over all rows in which it was used; `dims` that some axis cuts."""

    def __init__(self, product: Product, dims: tuple[int, ...]) -> None:
        self.shape = product.weight.shape
        self.outputs, self.columns = (1, 0) if product.turned else (0, 1)
        self.dims = [d for d in (self.outputs, self.columns) if d in dims]
        self.used, self.scale = 0, 0.0
        self.sums: dict[str, Tensor] = {}
        self.width = product.matrix.shape[2]
        self.matrix, self.bias = _with_bias(product), product.bias

    def add(self, product: Product, rows: Rows) -> None:
        """Take in the rows of one use, those with a gradient."""
        counts = rows.gradients.ne(0).any(dim=2).any(dim=0)
        given = (rows.inputs, rows.gradients)
        inputs, gradients = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in given)
        if not bool(counts.all()):
            inputs, gradients = inputs[:, counts], gradients[:, counts]
        if self.matrix.shape[2] > self.width:
            inputs = torch.cat([inputs, inputs.new_full((*inputs.shape[:2], 1), product.bias is not None)], dim=2)
        self.scale = self.scale or _inverse_size(gradients)
        gradients = gradients * self.scale
        self.used += inputs.shape[1]
        if self.outputs in self.dims:
            self._sum("gradients", gradients.mT @ gradients)
        else:
            self._sum("gradients' power", gradients.square().mean(dim=2).sum(dim=1))
            self._sum("back", (gradients @ self.matrix.to(gradients)).square().sum(dim=1))
        if self.columns in self.dims:
            self._sum("inputs", inputs.mT @ inputs)
        else:
            self._sum("inputs' power", inputs.square().mean(dim=2).sum(dim=1))
            self._sum("outputs", (inputs @ self.matrix.to(inputs).mT).square().sum(dim=1))

    def _sum(self, name: str, value: Tensor) -> None:
        self.sums[name] = value + self.sums[name] if name in self.sums else value

    def costs(self, damping: float, name: str) -> dict[int, Tensor]:
        """The costs [size] of the indices of each of `dims`; those of a convolution's windows, and of its groups, are added."""
        mean = {n: (s / max(self.used, 1)).cpu().double() for n, s in self.sums.items()}
        _require_finite(mean, name)
        matrix = self.matrix.cpu().double()
        found = {}
        if self.outputs in self.dims:
            energy = _energy(matrix, mean.get("inputs"), mean.get("outputs"), mean.get("inputs' power"), damping)
            found[self.outputs] = self._over(energy, mean["gradients"], damping, f"the gradients at {name}").flatten()
        if self.columns in self.dims:
            energy = _energy(matrix.mT, mean.get("gradients"), mean.get("back"), mean.get("gradients' power"), damping)
            columns = self._over(energy, mean["inputs"], damping, f"the input of {name}").sum(dim=0)
            found[self.columns] = columns[: self.width].reshape(self.shape[self.columns], -1).sum(dim=1)
        return {d: cost / self.scale**2 for d, cost in found.items()} if self.scale else found

    def _over(self, energy: Tensor, curvature: Tensor, damping: float, where: str) -> Tensor:
        blocks = zip(energy, curvature, strict=True)
        return torch.stack([_costs(one, damped(factor, damping), where) for one, factor in blocks])


def _energy(matrix: Tensor, factor: Tensor | None, sums: Tensor | None, power: Tensor | None, damping: float) -> Tensor:
    """w F w' of every row w of a matrix [blocks, rows, columns], by the factor F [blocks, columns, columns], damped.

    Where only what it comes to was summed, those `sums` [blocks, rows], and the mean of F's diagonal, `power` [blocks].
    """
    if factor is not None:
        sums = (matrix @ factor * matrix).sum(dim=2)
        power = factor.diagonal(dim1=1, dim2=2).mean(dim=1)
    assert sums is not None and power is not None
    return sums + _added(power, damping)[:, None] * matrix.square().sum(dim=2)


def _with_bias(product: Product) -> Tensor:
    """[blocks, outputs, columns], the bias as one more column."""
    matrix = product.matrix
    if product.bias is None:
        return matrix
    return torch.cat([matrix, product.bias.detach().reshape(*matrix.shape[:2], 1).to(matrix)], dim=2)


def _inverse_size(gradients: Tensor) -> float:
    """One over the largest gradient, that their squares stay within float32's range; 0 where there are none."""
    size = float(gradients.abs().max()) if gradients.numel() else 0.0
    return 1 / size if size else 0.0


def _added(power: Tensor, damping: float) -> Tensor:
    """What `damped` adds to the diagonal of a factor whose diagonal has this mean: [blocks]."""
    return torch.where(power > 0, damping * power, 1.0)


def _require_finite(means: dict[str, Tensor], name: str) -> None:
    if not all(bool(torch.isfinite(value).all()) for value in means.values()):
        raise ScoreError(
            f"NaN or infinity comes in at {name!r}, or back to it: look at the weights before it and the batches"
        )
