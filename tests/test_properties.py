"""Random small networks: what must hold for any of them."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import depgraph
from tests.test_end_to_end import same_outputs, zeroed

few = settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


class Residual(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Gated(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(width, 2 * inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.both(x).chunk(2, dim=-1)
        return self.down(torch.sigmoid(gate) * value)


class Joined(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(width, inner), nn.Linear(width, inner + 1)
        self.down = nn.Linear(2 * inner + 1, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.cat([torch.tanh(self.left(x)), self.right(x)], dim=-1))


class Attention(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.heads, self.head_dim = 3, inner
        self.qkv = nn.Linear(width, 3 * self.heads * inner)
        self.out = nn.Linear(self.heads * inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q, k, v = (t.view(b, s, -1, self.head_dim).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(1, 2).reshape(b, s, -1))


class Normed(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(self.norm(x))


BLOCKS = [Residual, Gated, Joined, Attention, Normed]
networks = st.tuples(
    st.lists(st.tuples(st.sampled_from(BLOCKS), st.integers(3, 7)), min_size=1, max_size=4),
    st.integers(4, 9),
    st.integers(0, 1000),
)


def build(
    drawn: tuple[list[tuple[type[nn.Module], int]], int, int],
) -> tuple[nn.Module, torch.Tensor, np.random.Generator]:
    blocks, width, seed = drawn
    torch.manual_seed(seed)
    body = [kind(width, inner) for kind, inner in blocks]  # type: ignore[call-arg]
    model = nn.Sequential(nn.Linear(5, width), *body, nn.Linear(width, 3)).eval()
    return model, torch.randn(2, 4, 5), np.random.default_rng(seed)


def scored(graph: depgraph.DependencyGraph, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {axis.name: rng.random(axis.size) for axis in graph.axes}


@few
@given(networks)
def test_a_random_network_is_cut_right_and_its_costs_are_exact(drawn) -> None:  # type: ignore[no-untyped-def]
    model, inputs, rng = build(drawn)
    graph = depgraph.trace(model, inputs)
    plan = graph.plan(scored(graph, rng), depgraph.Target(params=0.75), scope="axis")
    report = plan.apply_with_report()
    assert report.check is not None and report.check.error < 1e-5 and not report.check.vacuous
    assert plan.cost().params == sum(p.numel() for p in report.model.parameters())
    assert plan.cost().bytes == sum(p.numel() * p.itemsize for p in report.model.parameters())
    if Attention in [kind for kind, _ in drawn[0]]:
        return  # torch's counter leaves out attention on the CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        report.model(inputs)
    assert plan.cost().macs == counter.get_total_flops() // 2


@few
@given(networks)
def test_exact_axes_equal_zeroing(drawn) -> None:  # type: ignore[no-untyped-def]
    model, inputs, rng = build(drawn)
    graph = depgraph.trace(model, inputs)
    exact = {a.name: rng.permutation(a.size)[: a.size // 3] for a in graph.axes if a.exact and a.prunable.all()}
    plan = graph.cut_plan(exact)
    same_outputs(plan.apply(), zeroed(model, plan), (inputs,), {})


@few
@given(networks)
def test_keeping_all_is_the_identity_and_two_cuts_are_one(drawn) -> None:  # type: ignore[no-untyped-def]
    model, inputs, rng = build(drawn)
    graph = depgraph.trace(model, inputs)
    assert torch.equal(graph.cut_plan({}).apply()(inputs), model(inputs))
    removal = {a.name: rng.permutation(a.size)[: a.size // 3] for a in graph.axes if a.prunable.all()}
    names = sorted(removal)
    first = {n: removal[n] for n in names[::2]}
    half = graph.cut_plan(first).apply()
    again = depgraph.trace(half, inputs)
    second = {n: removal[n] for n in names[1::2] if n in again.widths.axes and again[n].size == graph[n].size}
    twice = again.cut_plan(second).apply()
    once = graph.cut_plan({**first, **second}).apply()
    torch.testing.assert_close(twice(inputs), once(inputs), rtol=1e-5, atol=1e-6)


@few
@given(networks)
def test_saved_equals_loaded(drawn) -> None:  # type: ignore[no-untyped-def]
    model, inputs, rng = build(drawn)
    graph = depgraph.trace(model, inputs)
    pruned = graph.plan(scored(graph, rng), depgraph.Target(params=0.8)).apply()
    with TemporaryDirectory() as folder:
        depgraph.save(pruned, Path(folder) / "saved")
        loaded = depgraph.load(Path(folder) / "saved", model=build(drawn)[0])
    assert torch.equal(loaded(inputs), pruned(inputs))


@pytest.mark.slow
@settings(max_examples=3, deadline=None, derandomize=True)
@given(networks)
def test_onnx_equals_pytorch(drawn) -> None:  # type: ignore[no-untyped-def]
    import exporters

    model, inputs, rng = build(drawn)
    graph = depgraph.trace(model, inputs)
    pruned = graph.plan(scored(graph, rng), depgraph.Target(params=0.8)).apply()
    with TemporaryDirectory() as folder:
        assert exporters.to_onnx(pruned, (inputs,), Path(folder) / "model.onnx").max_rel_error < 1e-4
