"""Minitron's score of experts: the mean length of share x output over the tokens that are routed to them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
import importance
from depgraph.errors import DataError, NothingToPrune, ScoreError
from importance import ExpertOutputs
from tests import test_expert_lists as lists
from tests import test_experts as stacked
from tests.zoo import ZOO


def scores_of(graph: depgraph.DependencyGraph, batches: list[object], router: str = "router.weight") -> np.ndarray:
    axis = stacked.experts(graph, router)
    found: np.ndarray = ExpertOutputs(batches)(graph)[axis.name]
    return found


class Top(nn.Module):
    """Three experts of weights 1 x 2, of which the token's better one of two is taken; its share is a sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(2, 3, bias=False)
        self.up, self.down = nn.Parameter(torch.ones(3, 1, 2)), nn.Parameter(torch.empty(3, 2, 1))
        self.out = nn.Linear(2, 2)
        with torch.no_grad():
            self.router.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-9.0, -9.0]]))
            self.down.copy_(torch.tensor([[[3.0], [4.0]], [[0.0], [1.0]], [[9.0], [9.0]]]))

    def forward(self, x: Tensor) -> Tensor:
        share, index = self.router(x).topk(1, dim=-1)
        inner = torch.einsum("nkiw,nw->nki", self.up[index], x).relu()
        made = torch.einsum("nkwi,nki->nkw", self.down[index], inner)
        return self.out((share.sigmoid().unsqueeze(-1) * made).sum(1))


def test_scores_by_hand() -> None:
    """Tokens (2, 0) and (1, 0) go to expert 0, (0, 3) to expert 1: hidden 2, 1, 3; outputs of length 10, 5 and 3."""
    model, x = Top().eval(), torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    share = {n: 1 / (1 + math.exp(-n)) for n in (1, 2, 3)}
    expected = [(10 * share[2] + 5 * share[1]) / 2, 3 * share[3], 0.0]
    assert scores_of(depgraph.trace(model, x), [x]) == pytest.approx(expected, rel=1e-6)


def expert(model: nn.Module, e: int, x: Tensor) -> Tensor:
    return F.silu(x @ model.up[e].T) @ model.down[e].T + model.bias[e]


def by_formula(model: nn.Module, batches: list[Tensor], entries: bool) -> np.ndarray:
    """The same from the parts of a model of the tests, with every expert run on every token."""
    lengths, tokens = torch.zeros(6), torch.zeros(6)
    for x in batches:
        shares = model.router(x).softmax(-1)
        if not isinstance(model, lists.Stacking):
            chosen, index = model.chosen(x) if entries else model.picked(x)
            shares = torch.zeros_like(shares).scatter(1, index, chosen)
        for e in range(6):
            made = list(model.experts.children())[e](x) if entries else expert(model, e, x)
            lengths[e] += (shares[:, e, None] * made).norm(dim=-1).sum()
            tokens[e] += (shares[:, e] > 0).sum()
    return (lengths / tokens.clamp(min=1)).numpy()


STACKED = (stacked.Stacked, stacked.Dense, stacked.Scattered, stacked.Sorted)


@pytest.mark.parametrize("kind", [*STACKED, *lists.KINDS])
@torch.no_grad()
def test_it_does_not_matter_how_the_code_goes_through_its_experts(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    entries = kind in lists.KINDS
    model = kind().eval()
    batches = [torch.randn(16, lists.WIDTH if entries else stacked.WIDTH) for _ in range(2)]
    graph = depgraph.trace(model, batches[0])
    assert scores_of(graph, [*batches]) == pytest.approx(by_formula(model, batches, entries), rel=1e-4)


def test_experts_of_transformers_score_alike_however_they_are_computed() -> None:
    found = []
    for implementation in ("batched_mm", "grouped_mm", "eager"):
        example = ZOO["mixtral"]()
        example.model.set_experts_implementation(implementation)
        graph = depgraph.trace(example.model, example.args, example.kwargs)
        names = importance.units.units(graph, "experts")
        scores = ExpertOutputs([example.kwargs])(graph)
        found.append(np.concatenate([scores[name] for name in names]))
        rest = [s for name, s in scores.items() if name not in names]
        assert min(float(s.min()) for s in rest) > found[-1].max() > 0
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    np.testing.assert_allclose(found[0], found[2], rtol=1e-5)


def test_the_experts_that_put_out_least_go() -> None:
    torch.manual_seed(0)
    model, x = lists.Masked().eval(), torch.randn(16, lists.WIDTH)
    with torch.no_grad():
        for e in (1, 4):
            model.experts[e].down.weight.mul_(1e-3)
            model.experts[e].down.bias.mul_(1e-3)
    graph = depgraph.trace(model, x)
    pruned = importance.recipes.minitron_experts([x]).prune(graph, depgraph.Target(params=0.75))
    assert pruned.plan is not None and [list(g) for g in pruned.plan.removal.values()] == [[1, 4]]
    assert len(pruned.model.experts) == 4


def test_padding_does_not_count() -> None:
    class Padded(stacked.Stacked):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2]) * attention_mask[..., None]

    torch.manual_seed(0)
    model, x = Padded().eval(), torch.randn(3, 5, stacked.WIDTH)
    mask = torch.ones(3, 5)
    mask[:, 3:] = 0
    other = torch.cat([x[:, :3], x[:, 3:] + 1], dim=1)
    graph = depgraph.trace(model, kwargs={"x": x, "attention_mask": mask})
    one, two = (scores_of(graph, [{"x": given, "attention_mask": mask}]) for given in (x, other))
    assert one == pytest.approx(two)


def test_what_cannot_be_scored_is_refused() -> None:
    graph = depgraph.trace(stacked.Stacked().eval(), torch.randn(9, stacked.WIDTH))
    with pytest.raises(DataError, match="there are no batches to score with"):
        ExpertOutputs([])(graph)
    with pytest.raises(DataError):
        ExpertOutputs(None)  # type: ignore[arg-type]
    with pytest.raises(ScoreError, match="is NaN or infinite"):
        ExpertOutputs([torch.full((9, stacked.WIDTH), math.nan)])(graph)
    with pytest.raises(NothingToPrune, match="no axis of the kind 'experts'"):
        ExpertOutputs([torch.randn(2, 4)])(
            depgraph.trace(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), torch.randn(2, 4))
        )
