"""LLM Surgeon's update of rows: what puts out beside what went makes up for that, by the gradients' factor (METHODS.md 2.14).

With G the second moment of the gradients of what a weight puts out, and R its rows that go, the others K change by
G_KK^-1 G_KR W_R, which is -(G^-1)_KR ((G^-1)_RR)^-1 W_R: outputs whose gradients go together take over from one another. The
update of columns, by the inputs' factor, is least squares (`importance.compensation`); both are of the original weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from depgraph import DependencyGraph
from depgraph.errors import ScoreError
from depgraph.plan import Plan
from importance.factors import FactorSums
from importance.kronecker import Factors
from importance.problems import damped


def row_change(weight: Tensor, gradients: Tensor, gone: Tensor, damping: float) -> Tensor:
    """What the rows that stay gain: W [rows, columns], G [rows, rows], indices that go -> [rows, columns], zero for these."""
    stays = torch.ones(len(weight), dtype=torch.bool)
    stays[gone] = False
    kept = torch.nonzero(stays).flatten()
    change, curvature = torch.zeros_like(weight), damped(gradients, damping)
    if len(kept):
        gain = torch.linalg.solve(curvature[kept][:, kept], curvature[kept][:, gone])
        change[kept] = gain @ weight[gone]
    return change


@dataclass(frozen=True)
class RowUpdate:
    """The changes of the weights and biases that lose rows to a plan, by name, for `Compensation(rows=...)`.

    Factors are those of `Surgeon(..., note=update.note)`, which scored the plan's graph. A weight that is used both as it is and
    transposed stays as it is. damping: as the score's.

    Raises ScoreError, when called, for a plan of a graph that wasn't noted.
    """

    damping: float = 0.01
    _noted: WeakKeyDictionary[DependencyGraph, Factors] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    def note(self, graph: DependencyGraph, factors: Factors) -> None:
        """Remember what was gathered for a graph, as long as that is there."""
        self._noted[graph] = factors

    def __call__(self, plan: Plan) -> dict[str, Tensor]:
        """What is added to parameters by name, float64, in the shapes that they have before the cut."""
        graph, gathered = plan.graph, self._noted.get(plan.graph)
        if gathered is None:
            raise ScoreError(
                f"{graph.name} wasn't scored by importance.Surgeon(..., note=update.note), whose factors an update of rows needs"
            )
        values = {v.target: v for v in graph.capture.program.values.values() if v.kind == "parameter"}
        names = {id(tensor): name for name, tensor in graph.tensors().items()}
        kept, found = plan.kept(), dict[str, Tensor]()
        for (name, turned), sums in gathered.items():
            whole = name in kept.gone.tensors or (name, not turned) in gathered or "gradients" not in sums.sums
            stays = None if whole or name not in values else kept.of(values[name], sums.outputs)
            if stays is None:
                continue
            change = self._change(sums, stays)
            weight, bias = change[:, : sums.width], change[:, sums.width :]
            found[name] = (weight.T if turned else weight).reshape(sums.shape)
            if sums.bias is not None and id(sums.bias) in names:
                found[names[id(sums.bias)]] = bias[:, 0]
        return found

    def _change(self, sums: FactorSums, stays: np.ndarray) -> Tensor:
        """[outputs, columns], with one more column for a bias."""
        matrix, gradients = sums.matrix.cpu().double(), sums.sums["gradients"].cpu().double() / max(sums.used, 1)
        gone = torch.ones(matrix.shape[0] * matrix.shape[1], dtype=torch.bool)
        gone[torch.from_numpy(stays)] = False
        apart = zip(matrix, gradients, gone.reshape(len(matrix), -1), strict=True)
        return torch.cat([row_change(w, g, torch.nonzero(out).flatten(), self.damping) for w, g, out in apart])
