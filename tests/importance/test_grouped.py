"""Second moments of what comes into a grouped convolution: each group's own, and what is scored and solved by them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
import importance
from importance import Gram, OptimalBrain, collect
from importance.columns import column_labels


class _Net(nn.Module):
    """A grouped convolution with windows of three between two others."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(4, 12, 1), nn.Conv1d(12, 12, 3, groups=groups, padding=1)
        self.last = nn.Conv1d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.second(F.relu(self.first(x)))))


def _made(groups: int) -> tuple[_Net, list[Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(groups)
        return _Net(groups).eval(), [torch.randn(5, 4, 9) for _ in range(2)]


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_losses_of_a_grouped_convolution_are_those_of_its_groups(groups: int) -> None:
    model, batches = _made(groups)
    graph = depgraph.trace(model, batches[0])
    found = collect(graph, batches, [*OptimalBrain.needs])
    consumer = next(c for c in found.consumers if c.weight == "second.weight")
    with torch.no_grad():
        given = F.pad(F.relu(model.first(torch.cat(batches))), (1, 1)).unfold(2, 3, 1)
    rows = given.permute(0, 2, 1, 3).reshape(-1, 36).double().numpy()
    each, weight = 36 // groups, model.second.weight.detach().double().numpy().reshape(12, -1)
    assert found.of(consumer, Gram()).parts.shape == (groups, each, each)
    inverses = []
    for g in range(groups):
        at = slice(g * each, (g + 1) * each)
        moments = rows[:, at].T @ rows[:, at] / len(rows)
        inverses.append(np.linalg.inv(moments + 0.01 * np.trace(moments) / each * np.eye(each)))
    for axis in consumer.labels:
        expected, labels = np.zeros(graph[axis].size), column_labels(consumer, axis, 36).reshape(groups, -1)
        for own, inverse, named in zip(np.split(weight, groups), inverses, labels, strict=True):
            for group in set(named.tolist()) - {-1}:
                gone = np.flatnonzero(named == group)
                middle = np.linalg.inv(inverse[np.ix_(gone, gone)])
                expected[group] += np.trace(own[:, gone] @ middle @ own[:, gone].T)
        scores = OptimalBrain(replace(found, found={consumer.key: found.found[consumer.key]}))(graph)[axis]
        np.testing.assert_allclose(scores, expected, rtol=1e-4)


def test_what_a_depthwise_net_loses_is_made_up_for() -> None:
    model, batches = _made(12)
    graph = depgraph.trace(model, batches[0])
    plan = graph.plan(importance.Random(0), depgraph.Target(params=0.7))
    report = plan.apply_with_report()
    done = importance.compensate(report.model, plan, batches)
    with torch.no_grad():
        x = torch.cat(batches)
        before, after, plain = model(x), report.model(x), plan.apply()(x)
    assert done.changed
    assert float((after - before).square().mean()) < float((plain - before).square().mean())
