"""Targets met by leaving blocks and branches out: alone, before widths, and in competition with groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import depgraph
import importance
from depgraph import Target
from depgraph.errors import DepgraphError, PlanError, ScoreError, TargetError
from importance import depth
from tests.zoo import MODULES, ZOO


class Block(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Linear(width, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


@pytest.fixture(scope="module")
def graph() -> depgraph.DependencyGraph:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), *[Block(16 + 8 * k) for k in range(4)], nn.Linear(8, 3)).eval()
        return depgraph.trace(model, torch.randn(6, 5))


@pytest.fixture(scope="module")
def llama() -> depgraph.DependencyGraph:
    example = ZOO["llama_8_4"]()
    return depgraph.trace(example.model, example.args, example.kwargs)


def loss(output: Any, batch: Any) -> torch.Tensor:
    return output.square().mean()


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 5, generator=generator) for _ in range(2)]


def test_so_many_with_the_lowest_scores_are_left_out(graph: depgraph.DependencyGraph) -> None:
    scores = {"1.mlp": 3.0, "2.mlp": 1.0, "3.mlp": 2.0, "4.mlp": 4.0}
    plan = graph.plan(scores, Target(left_out=2), scope="depth")
    assert plan.branches == ("2.mlp", "3.mlp") and not plan.removal
    report = plan.apply_with_report()
    assert sum(p.numel() for p in report.model.parameters()) == report.after.params == plan.cost().params


def test_a_share_is_met_by_as_few_as_need_be(graph: depgraph.DependencyGraph) -> None:
    scores = {"1.mlp": 0.0, "2.mlp": 1.0, "4.mlp": 2.0}
    plan = graph.plan(scores, Target(params=0.6), scope="depth")  # with the last, the second isn't needed
    assert plan.cost().params <= 0.6 * graph.dense_cost.params and plan.branches == ("1.mlp", "4.mlp")
    for name in graph.plan(scores, Target(macs=0.4), scope="depth").branches:
        assert graph.cost(branches=[n for n in scores if n != name]).macs > 0.4 * graph.dense_cost.macs


@pytest.mark.parametrize(
    "search", [depth.FinerCut(batches(), "norm"), depth.PairSearch(batches(), of="branches")], ids=["nested", "sets"]
)
def test_a_search_meets_a_share_with_what_it_finds_for_that_many(
    graph: depgraph.DependencyGraph, search: depth.Search
) -> None:
    plan = graph.plan(search, Target(params=0.6), scope="depth")
    assert plan.cost().params <= 0.6 * graph.dense_cost.params
    assert set(plan.branches) == set(search(graph, len(plan.branches)).names)
    fewer = search(graph, len(plan.branches) - 1).names
    assert graph.cost(branches=fewer).params > 0.6 * graph.dense_cost.params


def test_depth_first_then_width_is_one_plan(graph: depgraph.DependencyGraph) -> None:
    order = {f"{k}.mlp": float(k) for k in range(1, 5)}
    counted = graph.plan(importance.Magnitude(), Target(params=0.6, left_out=1), depth=order)
    shared = graph.plan(importance.Magnitude(), Target(params=0.4), depth=order, depth_share=0.5)
    assert counted.branches == ("1.mlp",)
    assert graph.cost(branches=shared.branches).params <= 0.7 * graph.dense_cost.params
    for plan, share in ((counted, 0.6), (shared, 0.4)):
        assert plan.removal and not any(name.startswith("1.mlp") for name in plan.removal)
        assert share - 0.1 < plan.cost().params / graph.dense_cost.params <= share
        report = plan.apply_with_report()
        assert sum(p.numel() for p in report.model.parameters()) == plan.cost().params
        assert report.check is not None and report.check.error <= report.check.tolerance


def test_groups_of_a_uniform_plan_go_beside_a_block_and_it_is_a_plain_directory(
    llama: depgraph.DependencyGraph, tmp_path: Any
) -> None:
    score = {block.name: float(k) for k, block in enumerate(llama.blocks)}
    plan = llama.plan(
        importance.Magnitude(), Target(params=0.4, left_out=1), depth=score, scope="uniform", form="module"
    )
    assert plan.branches == (llama.blocks[0].name,) and plan.removal
    model = plan.apply()
    assert depgraph.save(model, tmp_path / "small").format == "plain"
    again = type(model).from_pretrained(tmp_path / "small")
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())


def test_groups_and_branches_compete_by_what_each_costs(graph: depgraph.DependencyGraph) -> None:
    groups = {axis.name: np_ones(axis.size) for axis in graph.axes}
    dear, cheap = {f"{k}.mlp": 1e6 for k in range(1, 5)}, {f"{k}.mlp": 1e-6 for k in range(1, 5)}
    target = Target(params=0.6)
    assert not graph.plan(groups, target, scope="both", depth=dear).branches
    only = graph.plan(groups, target, scope="both", depth=cheap)
    assert only.branches and not only.removal
    mixed = graph.plan(groups, target, scope="both", depth=dear | {"2.mlp": 0.0})
    assert mixed.branches == ("2.mlp",) and mixed.removal
    assert mixed.cost().params <= 0.6 * graph.dense_cost.params
    assert mixed.apply_with_report().after.params == mixed.cost().params


def np_ones(size: int) -> Any:
    return torch.ones(size).numpy()


def test_what_does_nothing_to_the_loss_goes_before_any_group() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), *[Block() for _ in range(4)], nn.Linear(8, 3)).eval()
    with torch.no_grad():
        model[3].mlp[2].weight.zero_()  # type: ignore[union-attr, operator, index]
        model[3].mlp[2].bias.zero_()  # type: ignore[union-attr, operator, index]
    graph, data = depgraph.trace(model, batches()[0]), batches()
    groups, branches = depth.InLoss(importance.Taylor(data, loss), data), depth.LossIncrease(data)
    plan = graph.plan(groups, Target(params=0.7), scope="both", depth=branches)
    assert plan.branches[0] == "3.mlp"
    assert plan.cost().params <= 0.7 * graph.dense_cost.params


def test_scores_in_loss_add_up_to_what_the_loss_rises_by(graph: depgraph.DependencyGraph) -> None:
    data, metric = batches(), depth.LossMetric(loss, nonnegative=False)
    taylor = importance.Taylor(data, loss)
    found = depth.InLoss(taylor, data, keep=0.8, metric=metric)(graph)
    plan = graph.plan(taylor, Target(params=0.8), scope="global", rank="density")
    model = plan.apply()
    with torch.no_grad():
        rise = sum(float(loss(model(x), x) - loss(graph.model(x), x)) for x in data) / len(data)
    if rise > 0:
        assert sum(found[n][list(g)].sum() for n, g in plan.removal.items()) == pytest.approx(rise, rel=1e-4)
    alone = depth.LossIncrease(data, metric=metric)(graph)
    with torch.no_grad():
        whole = sum(float(loss(graph.model(x), x)) for x in data) / len(data)
        without = sum(float(loss(graph.cut_plan(branches=["2.mlp"]).apply()(x), x)) for x in data) / len(data)
    assert alone["2.mlp"] == pytest.approx(without - whole, rel=1e-4, abs=1e-7)


ASKED: dict[str, tuple[Callable[[depgraph.DependencyGraph], Any], type[DepgraphError], str]] = {
    "more than there are": (
        lambda g: g.plan({"1.mlp": 0.0}, Target(left_out=2), scope="depth"),
        TargetError,
        "2 blocks or branches of Sequential can't be left out: 1 of those",
    ),
    "too small a share": (
        lambda g: g.plan({"1.mlp": 0.0}, Target(params=0.1), scope="depth"),
        TargetError,
        "without all 1 blocks or branches that may go it is params=0",
    ),
    "a search, too small": (
        lambda g: g.plan(depth.FinerCut(batches(), "norm"), Target(params=0.01), scope="depth"),
        TargetError,
        "leaving out what FinerCut finds",
    ),
    "no share for groups": (
        lambda g: g.plan(importance.Magnitude(), Target(left_out=1)),
        TargetError,
        "use scope='depth'",
    ),
    "no number": (lambda g: Target(left_out=0.5), TargetError, "is no number of blocks"),
    "no depth": (
        lambda g: g.plan(importance.Magnitude(), Target(params=0.5), scope="both"),
        PlanError,
        "needs depth=",
    ),
    "other units": (
        lambda g: g.plan(importance.Magnitude(), Target(params=0.5), scope="both", depth=depth.LossIncrease(batches())),
        ScoreError,
        "InLoss",
    ),
    "a search among scores": (
        lambda g: g.plan({}, Target(params=0.5), scope="both", depth=depth.FinerCut(batches())),
        ScoreError,
        "is a search",
    ),
    "no score": (lambda g: g.plan("sleb", Target(left_out=1), scope="depth"), ScoreError, "scores no blocks"),
    "not finite": (
        lambda g: g.plan({"1.mlp": float("nan")}, Target(left_out=1), scope="depth"),
        ScoreError,
        "must be a finite number",
    ),
    "unknown": (
        lambda g: g.plan({"9.mlp": 0.0}, Target(left_out=1), scope="depth"),
        ScoreError,
        "no such branch or block",
    ),
}


@pytest.mark.parametrize("what", ASKED)
def test_what_cannot_be_met_is_said(graph: depgraph.DependencyGraph, what: str) -> None:
    asked, kind, text = ASKED[what]
    with pytest.raises(kind, match=text):
        asked(graph)


def test_a_model_without_branches_is_refused_with_the_reason() -> None:
    plain = depgraph.trace(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4))
    with pytest.raises(ScoreError, match="Sequential has no branches or blocks that could be left out: no addition"):
        plain.plan({}, Target(left_out=1), scope="depth")
    example = MODULES["used_twice"]()
    assert depgraph.trace(example.model, example.args, example.kwargs).branches


def test_all_attentions_or_all_blocks_of_a_decoder_cannot_go(llama: depgraph.DependencyGraph) -> None:
    attentions = [b.name for b in llama.branches if b.kind == "attention"]
    with pytest.raises(PlanError, match="all 2 attentions of LlamaForCausalLM, so that tokens never meet"):
        llama.cut_plan(branches=attentions)
    with pytest.raises(TargetError, match="1 of those with scores can go together"):
        llama.plan(dict.fromkeys(attentions, 0.0), Target(left_out=2), scope="depth")
    assert len(llama.plan({b.name: 0.0 for b in llama.blocks}, Target(left_out=1), scope="depth").branches) == 1


def test_a_text_shorter_than_one_window_is_refused() -> None:
    with pytest.raises(DepgraphError, match="less than one window of 64"):
        depth.windows(torch.arange(10), 64, 4)


class Clock:
    """A latency model that takes a millisecond for every thousand multiply-accumulates that are left."""

    def __init__(self, graph: depgraph.DependencyGraph) -> None:
        self.graph = graph

    def ms(self, kept: Any, /) -> float:
        gone = self.graph.left_out(kept.left_out)
        return float(kept.cost(gone.parameters, gone.nodes).macs) / 1e3

    def parts(self, kept: Any, /) -> dict[str, float]:
        return {"all": self.ms(kept)}


SCORES = {"1.mlp": 3.0, "2.mlp": 1.0, "3.mlp": 2.0, "4.mlp": 4.0}


def timed(graph: depgraph.DependencyGraph, share: float, **more: Any) -> Target:
    clock = Clock(graph)
    return Target(latency_ms=share * clock.ms(graph.widths.at({})), latency=clock, **more)


def taken(plan: depgraph.Plan) -> float:
    """The time that a plan leaves, as a share."""
    clock = Clock(plan.graph)
    return clock.ms(plan.kept()) / clock.ms(plan.graph.widths.at({}))


@pytest.mark.parametrize("search", [SCORES, depth.PairSearch])
def test_milliseconds_are_met_by_leaving_out_as_little_as_does(graph: depgraph.DependencyGraph, search: Any) -> None:
    plan = graph.plan(search if search is SCORES else search(batches(), "branches"), timed(graph, 0.6), scope="depth")
    assert plan.branches and not plan.removal and taken(plan) <= 0.6
    for name in plan.branches:
        assert taken(plan.without(name)) > 0.6
    with pytest.raises(
        TargetError, match=r"without all 4 blocks or branches that may go it is latency=.* ms at the least"
    ):
        graph.plan(SCORES, timed(graph, 0.01), scope="depth")


def test_milliseconds_are_met_by_depth_and_then_by_widths(graph: depgraph.DependencyGraph) -> None:
    plan = graph.plan(importance.Magnitude(), timed(graph, 0.5), depth=SCORES, depth_share=0.4)
    assert plan.branches == ("2.mlp",) and plan.removal and 0.45 < taken(plan) <= 0.5
    report = plan.apply_with_report()
    assert report.after.macs == plan.cost().macs and report.check is not None and report.check.error < 1e-4
    both = graph.plan(importance.Magnitude(), timed(graph, 0.7, params=0.4), depth=SCORES)
    assert taken(both) <= 0.7 and both.cost().params <= 0.4 * graph.dense_cost.params
    counted = graph.plan(importance.Magnitude(), timed(graph, 0.5, left_out=1), depth=SCORES)
    assert counted.branches == ("2.mlp",) and taken(counted) <= 0.5


def test_branches_and_groups_compete_for_milliseconds(graph: depgraph.DependencyGraph) -> None:
    scores = {axis.name: [1.0] * axis.size for axis in graph.axes}
    cheap = graph.plan(scores, timed(graph, 0.6), depth=dict.fromkeys(SCORES, 0.1), scope="both")
    dear = graph.plan(scores, timed(graph, 0.6), depth=dict.fromkeys(SCORES, 1e6), scope="both")
    assert len(cheap.branches) >= 2 and not dear.branches and dear.removal
    assert taken(cheap) <= 0.6 and taken(dear) <= 0.6
