"""LLM Surgeon: what rows and columns cost under a Kronecker-factored Fisher information, and how the rest makes up for them.

METHODS.md 2.14. F of a weight [rows, columns] is taken for G (x) A, with A the mean of a a' over what comes in and G that of
g g' over the gradients of what goes out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from depgraph import DependencyGraph
from depgraph.errors import ScoreError
from depgraph.finite import require_finite
from importance.activation import with_unread
from importance.calling import check_batches, inputs_of
from importance.gradients import add_to, by_id, each_of, passes
from importance.layout import Layout
from importance.losses import Loss
from importance.normalisation import Normalisation, NormalisationSpec
from importance.obs import damped, inverse_of
from importance.products import Product, watching
from importance.reduction import Reduction, ReductionSpec
from importance.rows import Samples
from importance.splitting import samples_of
from importance.sums import wide


class Use(NamedTuple):
    """A weight by name, and how it is used: one that is used in two ways has factors, and costs, for each."""

    name: str
    transposed: bool = False
    biased: bool = False


@dataclass
class Factors:
    """Of one weight, sums over rows of what came in, of what went out, and of its gradients.

    `rows` and `columns` are the dims of the parameter that its matrix [groups, rows, columns] has as such, `needs` says which of
    these dims are to have costs, `size` how large they are. A `bias` is one more column, whose input is 1.
    """

    rows: int
    columns: int
    needs: frozenset[int]
    size: tuple[int, ...]
    weight: Tensor = field(default_factory=lambda: torch.zeros(()))
    bias: Tensor | None = None
    count: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add_inputs(self, rows: Tensor, made: Tensor) -> None:
        """Take in rows [n, groups, columns], with the bias's column of ones if any, and what they became [n, groups, rows]."""
        self.count += len(rows)
        self._add("made", made.square().sum(dim=0))
        self._add("input sizes", rows.square().mean(dim=2).sum(dim=0))
        if self.columns in self.needs:
            self._add("inputs", torch.einsum("ngc,ngd->gcd", rows, rows))

    def add_gradients(self, rows: Tensor) -> None:
        """Take in gradients [n, groups, rows]."""
        self._add("pulled", torch.einsum("ngr,grc->ngc", rows, wide(self.weight)).square().sum(dim=0))
        self._add("gradient sizes", rows.square().mean(dim=2).sum(dim=0))
        if self.rows in self.needs:
            self._add("gradients", torch.einsum("ngr,ngs->grs", rows, rows))

    def _add(self, name: str, part: Tensor) -> None:
        self.sums[name] = self.sums[name] + part if name in self.sums else part

    def costs(self, damping: float, where: str) -> Iterator[tuple[int, Tensor]]:
        """The dims that have costs, and these, [size of the dim], summed over all else that a dim has."""
        if "pulled" not in self.sums:
            return
        means = {name: total.double().cpu() / max(self.count, 1) for name, total in self.sums.items()}
        squares = self.weight.double().cpu().square()
        if self.rows in self.needs:
            sizes = squares.sum(dim=2)
            if self.bias is not None:
                sizes = sizes + self.bias.double().cpu().expand(sizes.numel()).reshape(sizes.shape).square()
            made = means["made"] + damping * means["input sizes"][:, None] * sizes
            found = made / (2 * _inverse_diagonals(means["gradients"], damping, f"{where} (its gradients)"))
            yield self.rows, found.reshape(self.size[self.rows])
        if self.columns in self.needs:
            pulled = means["pulled"] + damping * means["gradient sizes"][:, None] * squares.sum(dim=1)
            within = _inverse_diagonals(means["inputs"], damping, f"{where} (its inputs)")[:, : pulled.shape[1]]
            yield (
                self.columns,
                (pulled / (2 * within)).reshape(len(pulled), self.size[self.columns], -1).sum(dim=(0, 2)),
            )


def _inverse_diagonals(factor: Tensor, damping: float, where: str) -> Tensor:
    """The diagonal of the inverse of each matrix of [groups, n, n], damped by a share of the mean of its diagonal."""
    return torch.stack([inverse_of(damped(one, damping) if damping else one, where).diagonal() for one in factor])


def surgeon_update(
    weight: Tensor, inputs: Tensor, outputs: Tensor, rows: Sequence[int] = (), columns: Sequence[int] = ()
) -> Tensor:
    """The weight [rows, columns] without some rows and columns, the rest changed to make up for them as well as it can.

    `inputs` is A [columns, columns] and `outputs` G [rows, rows], invertible (so damped). For rows R it adds
    -G^-1_:R (G^-1_RR)^-1 W_R, for columns C -W_C (A^-1_CC)^-1 A^-1_C:, each from the weight as it was; what goes is zero. A bias
    is the last column, whose input is 1. Works in float64 and returns the weight's dtype.

    Raises ScoreError when a factor is singular.
    """
    wide_weight = weight.detach().double()
    change = torch.zeros_like(wide_weight)
    if len(rows):
        inverse = inverse_of(outputs.double(), "the gradients")
        at = torch.as_tensor(list(rows), device=weight.device)
        change -= inverse[:, at] @ torch.linalg.solve(inverse[at][:, at], wide_weight[at])
    if len(columns):
        inverse = inverse_of(inputs.double(), "the inputs")
        at = torch.as_tensor(list(columns), device=weight.device)
        change -= wide_weight[:, at] @ torch.linalg.solve(inverse[at][:, at], inverse[at])
    updated = wide_weight + change
    updated[list(rows)] = 0
    updated[:, list(columns)] = 0
    return updated.to(weight.dtype)


@dataclass(frozen=True)
class Surgeon:
    """LLM Surgeon's costs (METHODS.md 2.14): how far the loss would rise, with the best update, without a row or column.

    A row costs 1/2 (W A W')_rr / (G^-1)_rr, a column 1/2 (W' G W)_cc / (A^-1)_cc, with a bias as one more column. A group costs
    the sum over the rows and columns that it has in all members, as the released code, which doesn't couple layers, does not.
    The factors are those of single samples' losses, so that it doesn't matter how samples were put into batches.

    Weights count where the model multiplies with them as a whole: linear maps, products, one- and two-dimensional convolutions
    (their windows as columns). Norms, biases and tables have no cost of their own; an axis that has nothing else goes last, by
    the size of its weights. Memory: A of every weight whose columns can go, G of every one whose rows can.

    Args:
        batches: as for `Taylor`; they are split into samples.
        loss: as for `Taylor`.
        damping: added to the diagonals of A and G, as a share of their means.
        reduction: over members; it also says how the indices of a group are joined.
        normalise: per axis.
        progress: show a bar on stderr.

    Raises, when called: DataError and ScoreError as `Taylor` does, DataError for a batch that can't be split, and ScoreError
    when a factor is singular, as it is without damping when there are fewer positions than channels.
    """

    additive: ClassVar[bool] = True

    batches: Iterable[Any]
    loss: Loss | None = None
    damping: float = 0.01
    reduction: ReductionSpec = "sum"
    normalise: NormalisationSpec = "none"
    progress: bool = False

    def __post_init__(self) -> None:
        check_batches(self.batches)
        if not 0 <= self.damping < float("inf"):
            raise ScoreError(f"damping must be at least 0, it is {self.damping}")
        Reduction.of(self.reduction)
        Normalisation.of(self.normalise)

    @property
    def comparable(self) -> bool:
        """Changes of one loss compare across axes; once they are normalised per axis, they don't."""
        return self.normalise == "none"

    def __call__(self, graph: DependencyGraph, /) -> dict[str, np.ndarray]:
        require_finite(graph.model, ScoreError)
        layout = Layout.of(graph)
        factors = self._gathered(graph, layout)
        sums: dict[str, dict[int, Tensor]] = {}
        for use, found in factors.items():
            for dim, costs in found.costs(self.damping, use.name):
                add_to(sums.setdefault(use.name, {}), dim, costs)
        scores = layout.scores(sums, Reduction.of(self.reduction), Normalisation.of(self.normalise))
        return with_unread(graph, {axis: scores[axis] for axis in layout.known(sums)})

    def _gathered(self, graph: DependencyGraph, layout: Layout) -> dict[Use, Factors]:
        free = {axis.name for axis in graph.axes if axis.prunable.any()}
        dims = {(p.parameter, p.dim) for axis in free for p in layout.places[axis]}
        wanted = {n: p for n, p in layout.parameters.items() if p.ndim > 1 and any((n, d) in dims for d in range(2))}
        gatherer = _Gatherer(by_id(wanted), dims)
        title = "gathering Kronecker factors" if self.progress else ""
        if wanted:
            with passes(graph.model, wanted.values(), self.loss, _dropped) as backward:
                for batch in each_of(self.batches, title):
                    for sample in samples_of(batch):
                        gatherer.start(graph.model, sample)
                        with watching(gatherer.names, gatherer.seen):
                            backward(sample, 1.0)
        return gatherer.factors


def _dropped(parameter: Tensor, gradient: Tensor) -> None:
    """Only the gradients of what the weights make are of use."""


class _Gatherer:
    """Sorts what comes into products and the gradients that come back into the factors of their weights."""

    def __init__(self, names: dict[int, str], dims: set[tuple[str, int]]) -> None:
        self.names, self.dims = names, dims
        self.samples = Samples(1)
        self.factors: dict[Use, Factors] = {}

    def start(self, model: nn.Module, sample: Any) -> None:
        """The sample that comes next: its padding doesn't count."""
        self.samples = Samples.of(*inputs_of(model, sample))

    def seen(self, product: Product) -> None:
        """Take in a product, and its gradient once there is one."""
        if not product.made.requires_grad:
            return
        groups, channels = len(product.weight), product.channels
        found = self._factors_of(product)
        rows = self._rows(product.inputs, groups)
        if found.bias is not None:
            rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], dim=2)
        found.add_inputs(rows, self._rows(product.made.detach().movedim(channels, -1), groups))
        product.made.register_hook(lambda g: found.add_gradients(self._rows(g.detach().movedim(channels, -1), groups)))

    def _factors_of(self, product: Product) -> Factors:
        use = Use(self.names[id(product.parameter)], product.transposed, product.bias is not None)
        if use not in self.factors:
            rows, columns = (1, 0) if use.transposed else (0, 1)
            needs = frozenset(d for d in (0, 1) if (use.name, d) in self.dims)
            bias = None if product.bias is None else product.bias.detach()
            self.factors[use] = Factors(rows, columns, needs, tuple(product.parameter.shape), product.weight, bias)
        return self.factors[use]

    def _rows(self, values: Tensor, groups: int) -> Tensor:
        """[rows that count, groups, channels of a group]."""
        flat = self.samples.rows(values, -1, torch.float32).flat
        return flat.reshape(len(flat), groups, -1)
