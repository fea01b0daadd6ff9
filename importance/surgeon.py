"""LLM Surgeon: what removing rows and columns costs the loss, with its curvature as a Kronecker product for each weight.

With A the second moment of what comes into a linear map and G that of the gradients of what it puts out, the loss's Hessian
is about G (x) A (METHODS.md 2.14). Removing a row or a column with the optimal update of what stays costs half the squares
of it, measured by one factor, over the diagonal of the other one's inverse; `importance.factors` has the same for several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from depgraph import DependencyGraph
from depgraph.errors import ScoreError
from importance.activation import with_unread
from importance.calling import check_batches
from importance.choices import pick
from importance.columns import present_groups
from importance.gradients import require_module
from importance.kronecker import Backward, Factors, Kronecker, prunable
from importance.layout import Place
from importance.losses import Loss
from importance.normalisation import Normalisation, NormalisationSpec
from importance.problems import inverse_of
from importance.reduction import Reduction, ReductionSpec, Scored

_COUNTED: dict[str, Callable[[bool, bool], bool]] = {
    "both": lambda read, is_column: True,
    "columns": lambda read, is_column: is_column or not read,
}


def row_costs(weight: Tensor, inputs: Tensor, gradients: Tensor) -> Tensor:
    """1/2 (W A W')_rr / (G^-1)_rr for every row: W [rows, columns], A [columns, columns], G [rows, rows] -> [rows]."""
    return _costs((weight @ inputs * weight).sum(dim=1), gradients)


def column_costs(weight: Tensor, inputs: Tensor, gradients: Tensor) -> Tensor:
    """1/2 (W' G W)_cc / (A^-1)_cc for every column: W [rows, columns], A [columns, columns], G [rows, rows] -> [columns]."""
    return _costs((gradients @ weight * weight).sum(dim=0), inputs)


def _costs(energy: Tensor, curvature: Tensor) -> Tensor:
    return energy / inverse_of(curvature, "a weight").diagonal() / 2


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
    """LLM Surgeon's costs, summed over the rows and columns that a group has in all linear maps, and in convolutions.

    Convolutions are those with one or two dims of space that aren't transposed; others don't count. The rows (or columns) that a
    group has in one weight cost what they do together: they can't make up for one another, so that a head costs more than its rows
    would one by one.
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
        sides: "both" counts rows and columns; "columns" the columns alone, and rows only for an axis without any: a row is the same
            loss once more as the columns that read it.

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
    sides: str = "both"

    def __post_init__(self) -> None:
        check_batches(self.batches)
        if not 0 <= self.damping < float("inf"):
            raise ScoreError(f"damping must be a finite number of at least 0, it is {self.damping}")
        Reduction.of(self.reduction)
        Normalisation.of(self.normalise)
        pick(_COUNTED, self.sides, "sides")

    def __call__(self, graph: DependencyGraph, /) -> dict[str, np.ndarray]:
        require_module(graph, type(self).__name__)
        layout = prunable(graph)
        if not layout.parameters:
            return with_unread(graph, {})
        gathered = Kronecker.of(graph, layout, Backward(self.batches, self.loss, self.progress))
        if self.note is not None:
            self.note(graph, gathered.factors)
        costs = self._costs(gathered)
        reduction, normalisation = Reduction.of(self.reduction), Normalisation.of(self.normalise)
        found = {}
        for axis, places in layout.places.items():
            counted = [(p, costs[key]) for p in places if (key := (axis, p.parameter, p.dim)) in costs]
            if counted:
                members = [_scored(place, cost) for place, cost in counted]
                found[axis] = normalisation(reduction(members, layout.sizes[axis]))
        return with_unread(graph, found)

    def _costs(self, gathered: Kronecker) -> dict[tuple[str, str, int], Tensor]:
        """What the groups [groups] of each axis cost at each of its places, a parameter and dim, all uses of that together."""
        counts, found = _COUNTED[self.sides], dict[tuple[str, str, int], Tensor]()
        for (name, _), sums in gathered.factors.items():
            here = [(a, p) for a, p in gathered.places[name] if counts(a in gathered.read, p.dim == sums.columns)]
            costs = sums.costs(self.damping, name, [(place, gathered.layout.sizes[axis]) for axis, place in here])
            for (axis, place), cost in zip(here, costs, strict=True):
                key = axis, name, place.dim
                found[key] = cost * gathered.positions(sums) + found.get(key, 0)
        return found


def _scored(place: Place, costs: Tensor) -> Scored:
    """A place as a member of its axis, one score for each group that it has indices of."""
    present = present_groups(place.labels)
    return present, costs.numpy()[present]
