"""A model that finds nothing in the example is cut so that it works where it finds something."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import depgraph
import importance

CLASSES, WIDTH = 9, 8


class Finder(nn.Module):
    """Scores classes for every row, and gives those above a threshold, each with a mask that its class picks."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.score = nn.Linear(5, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.mid, self.mask = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.least = 2.0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        made = torch.relu(self.body(x))
        scores = self.score(made).softmax(-1)
        labels = torch.arange(scores.shape[-1]).view(1, -1).expand_as(scores).reshape(-1)
        found = torch.where(scores.reshape(-1) > self.least)[0]
        masks = self.mask(torch.relu(self.mid(made[found // CLASSES]))).sigmoid()
        picked = masks[torch.arange(len(found)), labels[found]]
        canvas = x.new_zeros(len(x))
        return scores.reshape(-1)[found], torch.stack([canvas + one for one in picked]) if len(
            picked
        ) else picked.new_empty(0)


def test_what_an_index_without_elements_points_into_stays() -> None:
    torch.manual_seed(0)
    model, x = Finder().eval(), torch.randn(7, 5)
    graph = depgraph.trace(model, x)
    assert len(model(x)[0]) == 0
    free = {m.target for axis in graph.axes if axis.prunable.any() for m in axis.members if m.dim == 0}
    assert "body.weight" in free and "mid.weight" in free
    assert not free & {"mask.weight", "score.weight"}
    pruned = graph.plan(importance.Magnitude(), depgraph.Target(params=0.7)).apply()
    model.least = pruned.least = 0.05
    assert all(len(out) > 0 for out in pruned(x)) and pruned(x)[1].shape[1:] == model(x)[1].shape[1:]


class Picking(Finder):
    """Its masks are wider than a matrix, and class 2 is found in nearly every row, no other in any."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.randn(CLASSES, WIDTH, 3))  # type: ignore[assignment]
        self.least = 0.6
        with torch.no_grad():
            self.score.weight.mul_(0.3)
            self.score.bias[2] = 6.0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        made = torch.relu(self.body(x))
        scores = self.score(made).softmax(-1)
        labels = torch.arange(scores.shape[-1]).view(1, -1).expand_as(scores).reshape(-1)
        found = torch.where(scores.reshape(-1) > self.least)[0]
        masks = torch.einsum("nw,cwk->nck", self.mid(made[found // scores.shape[-1]]), self.mask)
        return scores.reshape(-1)[found], masks[torch.arange(len(found)), labels[found]]


def test_a_trial_in_which_nothing_is_found_shows_nothing() -> None:
    torch.manual_seed(0)
    model, x = Picking().eval(), torch.randn(7, 5)
    assert len(model(x)[0]) > 3
    graph = depgraph.trace(model, x)
    assert not any(axis.tried for axis in graph.axes)
    assert not any(axis.prunable.any() for axis in graph.axes for m in axis.members if (m.target, m.dim) == ("mask", 0))
