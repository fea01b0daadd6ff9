"""Every example of the zoo, all axes at once and each kind of axis alone: cut, checked, and checked once more independently."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import depgraph
from depgraph.axes import Axis
from depgraph.capture.capturing import quiet
from depgraph.cutting.settling import Settler
from tests.zoo import MODULES, ZOO

EXAMPLES = {**ZOO, **MODULES}
AS_GRAPH = {
    "deberta_v2": "divides scores by a number made from a size, in three places that one weight can't serve",
    "literal_sizes": "the sizes are written in the code",
}
TIED = {
    "multihead_attention": "an even number of heads times their width is the embedding's width",
    "transformer_encoder": "an even number of heads times their width is the embedding's width",
    "transformer_layer_norm_first": "an even number of heads times their width is the embedding's width",
}


@cache
def traced(name: str) -> depgraph.DependencyGraph:
    example = EXAMPLES[name]()
    return depgraph.trace(example.model, example.args, example.kwargs)


def random_scores(graph: depgraph.DependencyGraph, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {axis.name: rng.random(axis.size) for axis in graph.axes}


def tensors(output: object) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def zeroed(model: nn.Module, plan: depgraph.Plan) -> nn.Module:
    """A copy in which every removed slice of every parameter is zero: producers' rows and consumers' columns alike."""
    twin = copy.deepcopy(model)
    parameters = dict(twin.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for removed in plan.removed():
            if removed.target in parameters:
                parameters[removed.target].index_fill_(removed.dim, torch.from_numpy(removed.indices), 0)
    return twin


def same_outputs(pruned: nn.Module, reference: nn.Module, args: tuple, kwargs: dict) -> None:
    with torch.no_grad(), quiet(pruned), quiet(reference):
        got, expected = tensors(pruned(*args, **kwargs)), tensors(reference(*args, **kwargs))
    compared = 0
    for a, b in zip(got, expected, strict=True):
        if a.shape == b.shape and a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5 * float(b.abs().max()))
            compared += 1
    assert compared


@pytest.mark.parametrize("name", EXAMPLES)
def test_all_axes_at_once(name: str) -> None:
    graph = traced(name)
    plan = graph.plan(random_scores(graph), depgraph.Target(params=0.7), scope="axis")
    report = plan.apply_with_report()
    assert report.check is not None
    assert report.check.error <= 1e-5
    assert not report.check.vacuous
    assert report.check.sensitivity > 1e-3
    assert report.form == ("graph" if name in AS_GRAPH else "module"), report.notes
    assert type(report.model) is type(graph.model) or report.form == "graph"
    assert report.before.params == sum(p.numel() for p in graph.model.parameters())
    assert report.after.params == sum(p.numel() for p in report.model.parameters())
    stored = [*report.model.parameters(), *report.model.buffers()]
    assert report.form == "graph" or report.after.bytes == sum(t.numel() * t.itemsize for t in stored)


@pytest.mark.parametrize("scope", ["axis", "global"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_target_is_met_within_one_group(name: str, scope: str) -> None:
    """Where sizes rule one another (`TIED`), within one group of each axis that they tie."""
    graph = traced(name)
    plan = graph.plan(random_scores(graph), depgraph.Target(params=0.7), scope=scope)
    dense = graph.dense_cost.params
    alone = [dense - graph.cost({n: g[:1]}).params for n, g in plan.removal.items()]
    allowed = sum(alone) if name in TIED else max(alone)
    assert 0 <= 0.7 * dense - plan.cost().params <= allowed


@pytest.mark.parametrize("name", EXAMPLES)
def test_zeroing_what_went_gives_the_same_outputs(name: str) -> None:
    """Independent of our own reference: only `plan.removed()` and torch."""
    example, graph = EXAMPLES[name](), traced(name)
    exact = {a.name: np.arange(max(1, a.size // 4)) for a in graph.axes if a.exact and a.prunable.all() and a.size > 2}
    assert exact
    share = graph.cost(exact).params / graph.dense_cost.params + 1e-9
    plan = graph.plan(
        random_scores(graph, 1), depgraph.Target(params=share), scope="axis", protect=lambda a: not a.exact
    )
    reference = zeroed(example.model, plan)
    same_outputs(plan.apply(), reference, example.args, example.kwargs)
    with torch.no_grad(), quiet(graph.model), quiet(reference):
        dense, zeros = (tensors(m(*example.args, **example.kwargs)) for m in (graph.model, reference))
    pairs = [(a, b) for a, b in zip(dense, zeros, strict=True) if a.is_floating_point()]
    assert max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs) > 1e-3


def kinds(graph: depgraph.DependencyGraph) -> list[list[Axis]]:
    found: dict[tuple[str, int], list[Axis]] = {}
    for axis in graph.axes:
        if axis.prunable.any():
            found.setdefault((axis.kind, axis.size), []).append(axis)
    return list(found.values())


def alone(name: str) -> None:
    example = EXAMPLES[name]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    scores = random_scores(graph)
    order = {a.name: np.flatnonzero(a.prunable)[np.argsort(scores[a.name][a.prunable])] for a in graph.axes}
    cap = {a.name: min(len(order[a.name]), a.size - 1) for a in graph.axes}
    for axes in kinds(graph):
        wanted = {a.name: max(1, a.size // 4) for a in axes}
        counts = Settler(graph.sizes, order, cap, frozenset(wanted)).settle(wanted)
        removal = {n: order[n][:c] for n, c in counts.items() if c}
        assert wanted.keys() <= removal.keys()
        report = graph.cut_plan(removal).apply_with_report()
        assert report.check is not None
        assert report.check.error <= 1e-5, axes[0].kind


@pytest.mark.parametrize("name", ["llama_8_2", "gpt2", "swin", "resnet_bottleneck", "transformer_encoder", "phi3"])
def test_each_kind_of_axis_alone(name: str) -> None:
    alone(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_each_kind_of_axis_of_every_example_alone(name: str) -> None:
    alone(name)
