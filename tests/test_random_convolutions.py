"""Random convolutional networks: residuals, groups, depthwise kernels, concatenations, gates, splits and norms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import depgraph
from tests.test_end_to_end import random_scores, same_outputs, zeroed
from tests.zoo import randomise

few = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


class Block(nn.Module):
    """Reads and makes `width` channels; `inner` is some number of its own."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.make(width, inner)

    def make(self, width: int, inner: int) -> None:
        raise NotImplementedError


class Bottleneck(Block):
    def make(self, width: int, inner: int) -> None:
        self.body = nn.Sequential(
            nn.Conv2d(width, 2 * inner, 1, bias=False),
            nn.BatchNorm2d(2 * inner),
            nn.ReLU(),
            nn.Conv2d(2 * inner, 4 * inner, 3, padding=1, groups=2),
            nn.Conv2d(4 * inner, width, 1),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class Depthwise(Block):
    def make(self, width: int, inner: int) -> None:
        self.up = nn.Conv2d(width, inner, 1)
        self.deep = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.norm = nn.BatchNorm2d(inner)
        self.down = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.hardswish(self.norm(self.deep(self.up(x)))))


class Joined(Block):
    def make(self, width: int, inner: int) -> None:
        self.left, self.right = nn.Conv2d(width, inner, 3, padding=1), nn.Conv2d(width, inner + 1, 1)
        self.norm = nn.BatchNorm2d(width + 2 * inner + 1)
        self.down = nn.Conv2d(width + 2 * inner + 1, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.norm(torch.cat([self.left(x), x, self.right(x)], 1))))


class Squeeze(Block):
    def make(self, width: int, inner: int) -> None:
        self.down, self.up = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))))


class Parted(Block):
    def make(self, width: int, inner: int) -> None:
        self.sizes = [inner, inner + 2]
        self.both = nn.Conv2d(width, 2 * inner + 2, 1)
        self.left, self.right = nn.Conv2d(inner, width, 3, padding=1), nn.Conv2d(inner + 2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.both(x).split(self.sizes, dim=1)
        return self.left(torch.tanh(left)) + self.right(F.gelu(right))


class Grouped(Block):
    """A GroupNorm of three groups, which mixes its channels."""

    def make(self, width: int, inner: int) -> None:
        self.up, self.norm = nn.Conv2d(width, 3 * inner, 1), nn.GroupNorm(3, 3 * inner)
        self.down = nn.Conv2d(3 * inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.norm(self.up(x)))


class Net(nn.Module):
    def __init__(self, blocks: list[tuple[Callable[[int, int], nn.Module], int]], width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Sequential(*(kind(width, inner) for kind, inner in blocks))
        self.head = nn.Linear(width * 2 * 2, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.body(self.stem(x)), 2).flatten(1))


BLOCKS = [Bottleneck, Depthwise, Joined, Squeeze, Parted, Grouped]
Drawn = tuple[list[tuple[type[Block], int]], int, int]
networks = st.tuples(
    st.lists(st.tuples(st.sampled_from(BLOCKS), st.integers(3, 7)), min_size=1, max_size=4),
    st.integers(4, 9),
    st.integers(0, 1000),
)


def traced(drawn: Drawn) -> tuple[depgraph.DependencyGraph, Tensor, np.random.Generator]:
    blocks, width, seed = drawn
    torch.manual_seed(seed)
    model = randomise(Net(blocks, width).eval(), seed)
    inputs = torch.randn(2, 3, 6, 5)
    return depgraph.trace(model, inputs, strict=True), inputs, np.random.default_rng(seed)


@few
@given(networks)
def test_a_random_network_is_cut_right_as_a_module_and_its_costs_are_exact(drawn: Drawn) -> None:
    graph, inputs, _ = traced(drawn)
    plan = graph.plan(random_scores(graph), depgraph.Target(params=0.7), scope="axis")
    report = plan.apply_with_report(form="module")
    assert report.check is not None
    assert report.check.error < 1e-5
    assert not report.check.vacuous
    assert plan.cost().params == sum(p.numel() for p in report.model.parameters())
    stored = [*report.model.parameters(), *report.model.buffers()]
    assert plan.cost().bytes == sum(t.numel() * t.itemsize for t in stored)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        report.model(inputs)
    assert plan.cost().macs == counter.get_total_flops() // 2


@few
@given(networks)
def test_zeroed_is_pruned(drawn: Drawn) -> None:
    graph, inputs, rng = traced(drawn)
    exact = {a.name: rng.permutation(a.size)[: a.size // 3] for a in graph.axes if a.exact and a.prunable.all()}
    plan = graph.cut_plan(exact)
    same_outputs(plan.apply(check="none"), zeroed(graph.model, plan), (inputs,), {})


def carried(plan: depgraph.Plan, first: depgraph.Plan, graph: depgraph.DependencyGraph) -> dict[str, list[int]]:
    """`plan` in terms of the graph traced after the cut `first`: groups whose parameter entries are all in the plan."""
    before = {(r.target, r.dim): r.indices for r in first.removed()}
    goes = {(r.target, r.dim): r.indices for r in plan.removed()}
    dense = plan.graph.tensors()

    def is_gone(target: str, dim: int, indices: np.ndarray) -> bool:
        left = np.setdiff1d(np.arange(dense[target].shape[dim]), before.get((target, dim), []))
        return bool(np.isin(left[indices], goes.get((target, dim), [])).all())

    return {
        axis.name: [group.number for group in axis.groups if all(is_gone(*member) for member in group.members)]
        for axis in graph.axes
    }


@few
@given(networks)
def test_two_cuts_are_one(drawn: Drawn) -> None:
    """Cut some axes, trace what is left and cut the others: the same weights as cutting all of them at once."""
    graph, inputs, rng = traced(drawn)
    removal = {a.name: rng.permutation(a.size)[: a.size // 3] for a in graph.axes if a.prunable.all() and a.size > 2}
    names = sorted(removal)
    first = graph.cut_plan({n: removal[n] for n in names[::2]})
    second = graph.cut_plan({n: removal[n] for n in names[1::2]})
    half = depgraph.trace(first.apply(form="module"), inputs)
    twice = half.cut_plan(carried(second, first, half)).apply(form="module")
    once = (first | second).apply(form="module")
    assert {n: p.shape for n, p in twice.named_parameters()} == {n: p.shape for n, p in once.named_parameters()}
    assert all(torch.equal(a, b) for a, b in zip(twice.state_dict().values(), once.state_dict().values(), strict=True))
    assert torch.equal(twice(inputs), once(inputs))


@few
@given(networks)
def test_keeping_all_is_the_identity(drawn: Drawn) -> None:
    graph, inputs, _ = traced(drawn)
    plan = graph.cut_plan({})
    assert plan.cost() == graph.dense_cost
    same = plan.apply(form="module")
    assert torch.equal(same(inputs), graph.model(inputs))
    assert all(
        torch.equal(a, b) for a, b in zip(same.state_dict().values(), graph.model.state_dict().values(), strict=True)
    )


@few
@given(networks)
def test_the_module_and_the_graph_form_agree(drawn: Drawn) -> None:
    graph, inputs, _ = traced(drawn)
    plan = graph.plan(random_scores(graph), depgraph.Target(params=0.6), scope="global")
    module, program = plan.apply(check="none"), plan.apply(form="graph", check="none")
    torch.testing.assert_close(module(inputs), program(inputs), rtol=1e-4, atol=1e-5)
    other = torch.randn(5, 3, 6, 5)
    torch.testing.assert_close(module(other), program(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metric", ["params", "macs", "bytes"])
def test_every_metric_is_met_within_a_group(metric: str) -> None:
    graph, _, _ = traced(([(Bottleneck, 5), (Joined, 4), (Squeeze, 3)], 9, 1))
    plan = graph.plan(random_scores(graph), depgraph.Target(**{metric: 0.5}))
    dense = getattr(graph.dense_cost, metric)
    widest = max(dense - getattr(graph.cost({n: g[:1]}), metric) for n, g in plan.removal.items())
    assert 0.5 * dense - widest <= getattr(plan.cost(), metric) <= 0.5 * dense
