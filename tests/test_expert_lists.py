"""Experts that are modules of a list or dict: each goes, whole, with what stands for it in the router."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
import importance
from depgraph.axes import Axis
from depgraph.cutting import experts as trials
from depgraph.describing import describe
from depgraph.errors import CheckError, CutError, PlanError
from depgraph.layers import Anatomy
from tests.test_experts import Barred

EXPERTS, WIDTH, INNER = 6, 8, 10


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Mixture(nn.Module):
    """A router, experts in a list and a shared expert; classes below differ in how they go through the list."""

    picked = 2

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.top_k = EXPERTS, self.picked
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts: nn.Module = nn.ModuleList(Expert() for _ in range(EXPERTS))
        self.shared = Expert()
        self.out = nn.Linear(WIDTH, 3)

    def chosen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shares, index = self.router(x).softmax(-1).topk(self.top_k, dim=-1)
        return shares / shares.sum(-1, keepdim=True), index

    def mixed(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mixed(x) + self.shared(x))


class Masked(Mixture):
    """A one-hot mask for each expert, by its number; rows are added in place."""

    def mixed(self, x: Tensor) -> Tensor:
        shares, index = self.chosen(x)
        out = torch.zeros_like(x)
        mask = F.one_hot(index, num_classes=self.num_experts).permute(2, 1, 0)
        for e in range(self.num_experts):
            place, token = torch.where(mask[e])
            if token.numel():
                out.index_add_(0, token, self.experts[e](x[token]) * shares[token, place, None])
        return out


class Enumerated(Mixture):
    """Numbers are compared with what was chosen; top-1."""

    picked = 1

    def mixed(self, x: Tensor) -> Tensor:
        shares, index = self.chosen(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):  # type: ignore[arg-type,var-annotated]
            rows = (index == e).any(-1)
            if rows.any():
                out[rows] += (shares * (index == e)).sum(-1, keepdim=True)[rows] * expert(x[rows])
        return out


class Weighted(Mixture):
    """All experts run; those that aren't chosen have the weight 0."""

    def mixed(self, x: Tensor) -> Tensor:
        shares, index = self.chosen(x)
        weights = torch.zeros(x.shape[0], len(self.experts)).scatter(1, index, shares)  # type: ignore[arg-type]
        return sum(weights[:, e, None] * expert(x) for e, expert in enumerate(self.experts))  # type: ignore[arg-type,return-value]


class Stacking(Mixture):
    """All experts run and have a share."""

    def mixed(self, x: Tensor) -> Tensor:
        made = torch.stack([expert(x) for expert in self.experts], 1)  # type: ignore[union-attr,operator]
        return (self.router(x).softmax(-1).unsqueeze(-1) * made).sum(1)


class Single(Mixture):
    """Token by token, the expert whose number stands there."""

    def mixed(self, x: Tensor) -> Tensor:
        shares, index = self.chosen(x)
        rows = [
            sum(shares[n, k] * self.experts[int(index[n, k])](x[n]) for k in range(self.top_k))  # type: ignore[index]
            for n in range(x.shape[0])
        ]
        return torch.stack(rows)  # type: ignore[arg-type]


class Keyed(Mixture):
    """A dict of experts by names with numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({f"expert_{e}": Expert() for e in range(EXPERTS)})

    def mixed(self, x: Tensor) -> Tensor:
        shares, index = self.chosen(x)
        out = torch.zeros_like(x)
        for e in index.unique().tolist():
            token, place = torch.where(index == e)
            out = out.index_add(0, token, self.experts[f"expert_{e}"](x[token]) * shares[token, place, None])  # type: ignore[index]
        return out


class Sorted(Mixture):
    """Pairs of tokens and experts lie in the order of the experts, and counts say where each begins."""

    def mixed(self, x: Tensor) -> Tensor:
        shares, index = self.chosen(x)
        counts = index.new_zeros((x.shape[0], len(self.experts))).scatter_(1, index, 1).sum(0)  # type: ignore[arg-type]
        order = index.flatten().argsort()
        rows, made, begin = x[order // self.top_k], [], 0
        for e, count in enumerate(counts.cpu().numpy()):
            if count:
                made.append(self.experts[e](rows[begin : begin + count]))  # type: ignore[index]
            begin += count
        joined = torch.cat(made)
        back = torch.empty_like(joined)
        back[order] = joined
        return (back.view(x.shape[0], self.top_k, -1) * shares.unsqueeze(-1)).sum(1)


KINDS = [Masked, Enumerated, Weighted, Stacking, Single, Keyed, Sorted]


def traced(kind: type[Mixture], rows: int = 16) -> tuple[depgraph.DependencyGraph, Tensor]:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(rows, WIDTH)
    return depgraph.trace(model, x), x


def experts(graph: depgraph.DependencyGraph) -> Axis:
    (found,) = [axis for axis in graph.axes if axis.entries]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_leaves_its_list_with_its_row_of_the_router(kind: type[Mixture]) -> None:
    graph, x = traced(kind)
    axis = experts(graph)
    assert axis.size == EXPERTS and axis.prunable.all()
    group = {name for name, _, _ in axis.group(4).members}
    whole = {n for n, _ in graph.model.named_parameters() if n.startswith(("experts.4.", "experts.expert_4."))}
    assert len(whole) == 5 and group == whole | {"router.weight", "router.bias"}
    plan = graph.cut_plan({axis.name: [1, 4]})
    report = plan.apply_with_report()
    pruned = report.model
    assert len(pruned.experts) == EXPERTS - 2 and pruned.router.out_features == EXPERTS - 2
    assert plan.cost().params == sum(p.numel() for p in pruned.parameters())
    assert report.check is not None and report.check.chosen == 1 and not report.check.vacuous
    others = torch.randn(50, WIDTH)
    with torch.no_grad(), Barred(graph.model.router.weight, [1, 4]):  # type: ignore[arg-type,union-attr]
        expected = graph.model(x), graph.model(others)
    torch.testing.assert_close((pruned(x), pruned(others)), expected)
    assert not torch.allclose(expected[0], graph.model(x), atol=1e-3)


@pytest.mark.parametrize("kind", [Masked, Weighted])
def test_experts_and_what_is_within_them_go_together(kind: type[Mixture], tmp_path: Path) -> None:
    graph, x = traced(kind)
    scores = {a.name: np.random.default_rng(0).random(a.size) for a in graph.axes}
    plan = graph.plan(scores, depgraph.Target(params=0.5), scope="axis")
    assert experts(graph).name in plan.removal and len(plan.removal) > 3
    report = plan.apply_with_report()
    assert report.check is not None and report.check.error < 1e-5 and report.check.exact_axes > 1
    assert sum(p.numel() for p in report.model.parameters()) == report.after.params
    depgraph.save(report.model, tmp_path / "small")
    again = depgraph.load(tmp_path / "small", model=kind)
    assert torch.equal(again.eval()(x), report.model(x))
    assert again.num_experts == len(again.experts) < EXPERTS


def test_a_plan_for_the_graph_form_leaves_lists_whole() -> None:
    graph, _ = traced(Weighted)
    scores = {a.name: np.random.default_rng(0).random(a.size) for a in graph.axes}
    plan = graph.plan(scores, depgraph.Target(params=0.7), form="graph", scope="axis")
    assert plan.removal and experts(graph).name not in plan.removal
    report = plan.apply_with_report(form="graph")
    assert report.form == "graph" and report.check is not None and report.check.error < 1e-5


def test_experts_of_other_widths_are_experts_still() -> None:
    graph, x = traced(Weighted)
    neurons = next(a for a in graph.axes if a.name.startswith("experts.1."))
    narrower = depgraph.trace(graph.cut_plan({neurons.name: [0, 3]}).apply(), x)
    axis = experts(narrower)
    assert len({narrower.cost({axis.name: [e]}).params for e in (0, 1)}) == 2
    pruned = narrower.cut_plan({axis.name: [0, 5]}).apply()
    assert [e.up.out_features for e in pruned.experts] == [INNER - 2, INNER, INNER, INNER]
    assert importance.ExpertClusters()(narrower)[axis.name].shape == (EXPERTS,)


def test_what_goes_as_a_whole_is_listed() -> None:
    graph, _ = traced(Weighted)
    removed = graph.cut_plan({experts(graph).name: [2]}).removed()
    found = {r.target: r.indices.tolist() for r in removed if r.target.startswith(("router.weight", "experts"))}
    assert found.pop("router.weight") == [2]
    assert found == {n: list(range(len(p))) for n, p in graph.model.named_parameters() if n.startswith("experts.2.")}


def test_in_place_and_back_where_it_fails() -> None:
    graph, x = traced(Masked)
    model, name = graph.model, experts(graph).name
    expected = graph.cut_plan({name: [0, 3]}).apply()(x)
    before, names = model(x), [n for n, _ in model.named_parameters()]
    neurons = next(a for a in graph.axes if a.exact and a.prunable.all())
    plan = graph.cut_plan({name: [0, 3], neurons.name: [1]})
    model.experts[5].down.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))  # type: ignore[index,union-attr]
    with pytest.raises((CheckError, RuntimeError)):
        plan.apply_()
    model.experts[5].down._forward_hooks.clear()  # type: ignore[index,union-attr]
    assert torch.equal(model(x), before) and [n for n, _ in model.named_parameters()] == names
    assert not hasattr(model, "depgraph_record")
    assert graph.cut_plan({name: [0, 3]}).apply_() is model
    assert torch.equal(model(x), expected)


def test_as_many_stay_as_are_chosen_at_once() -> None:
    graph, _ = traced(Masked)
    name = experts(graph).name
    with pytest.raises(PlanError, match=r"leaves 1 indices.*2 of its indices are chosen.*topk"):
        graph.cut_plan({name: range(EXPERTS - 1)})
    with pytest.raises(CutError, match="a list of the module"):
        graph.cut_plan({name: [0]}).apply(form="graph")
    assert len(graph.cut_plan({name: range(EXPERTS - 2)}).apply().experts) == 2


class Special(Weighted):
    """Expert 1 counts twice: by its number."""

    def mixed(self, x: Tensor) -> Tensor:
        shares, index = self.chosen(x)
        weights = torch.zeros(x.shape[0], self.num_experts).scatter(1, index, shares)
        return sum(weights[:, e, None] * (2 if e == 1 else 1) * f(x) for e, f in enumerate(self.experts))  # type: ignore[arg-type,return-value]


class Backwards(Masked):
    """Experts lie in another order than what stands for them."""

    def mixed(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        return sum(weights[:, e, None] * self.experts[EXPERTS - 1 - e](x) for e in range(EXPERTS))  # type: ignore[index,return-value]


class Layers(Mixture):
    """As many layers as the router has outputs, one after the other."""

    def mixed(self, x: Tensor) -> Tensor:
        for e, layer in enumerate(self.experts):  # type: ignore[arg-type,var-annotated]
            x = x + layer(x) * self.router(x)[:, e, None].sigmoid().round()
        return x * self.router(x).argmax(-1, keepdim=True)


@pytest.mark.parametrize("kind", [Special, Backwards, Layers])
def test_what_is_no_list_of_experts_stays(kind: type[Mixture]) -> None:
    graph, x = traced(kind)
    before = graph.model.state_dict()
    assert not any(axis.entries for axis in graph.axes)
    assert all(torch.equal(before[n], t) for n, t in kind.state_dict(graph.model).items())
    assert len(graph.model.experts) == graph.model.num_experts == EXPERTS  # type: ignore[arg-type]


def test_where_nothing_would_show_a_wrong_cut_none_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tried = Masked().eval(), list[object]()
    monkeypatch.setattr("depgraph.experts.shorten", lambda *given: tried.append(given))
    with torch.no_grad():
        model.out.weight.zero_()
    assert not any(axis.entries for axis in depgraph.trace(model, torch.randn(4, WIDTH)).axes) and not tried
    with torch.no_grad():
        model.out.weight.normal_()
    depgraph.trace(model, torch.randn(4, WIDTH))
    assert tried, "here a trial would tell"


class Several(nn.Module):
    """Three lists of experts beside one another."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Masked() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part(x) for part in self.parts]).sum(0)


def test_the_whole_model_runs_once_on_each_input_however_many_trials_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, plain = [], trials.outputs

    def counted(graph: Any, model: nn.Module, inputs: Any, *within: Any) -> list[Tensor]:
        runs.append(within)
        return plain(graph, model, inputs, *within)

    monkeypatch.setattr(trials, "outputs", counted)
    monkeypatch.setattr("depgraph.experts.shorten", lambda *given: 1 / 0)
    depgraph.trace(Several().eval(), torch.randn(4, WIDTH))
    assert sum(not within for within in runs) <= 3  # on the example, on others, and to see what is taken
    assert sum(bool(within) for within in runs) > 6


class Limited(Mixture):
    """Experts are chosen within the best sets of three."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.n_group, self.topk_group = 12, 4, 2
        self.router = nn.Linear(WIDTH, 12)
        self.experts = nn.ModuleList(Expert() for _ in range(12))

    def mixed(self, x: Tensor) -> Tensor:
        scores = self.router(x).sigmoid()
        best = scores.view(-1, self.n_group, self.num_experts // self.n_group).amax(-1).topk(self.topk_group)[1]
        open_sets = torch.zeros(len(x), self.n_group).scatter(1, best, 1.0)
        allowed = open_sets.repeat_interleave(self.num_experts // self.n_group, 1)
        index = scores.masked_fill(allowed == 0, -torch.inf).topk(self.top_k)[1]
        shares = scores.gather(1, index)
        weights = torch.zeros_like(scores).scatter(1, index, shares / shares.sum(-1, keepdim=True))
        return sum(weights[:, e, None] * self.experts[e](x) for e in range(self.num_experts))  # type: ignore[index,return-value]


def test_sets_of_experts_go_whole() -> None:
    graph, _ = traced(Limited)
    sets = next(a for a in graph.axes if a.entries and a.size == 4)
    assert sets.entries[0].going([1]) == [3, 4, 5]
    pruned = graph.cut_plan({sets.name: [1]}).apply()
    assert (len(pruned.experts), pruned.num_experts, pruned.n_group) == (9, 9, 3)
    assert graph.widths.least(sets.name) == 2


def test_what_they_are_and_which_are_alike() -> None:
    graph, _ = traced(Weighted)
    name = experts(graph).name
    assert str(describe(Anatomy(graph))[name]) == "experts of experts, 2 chosen at a time"
    with torch.no_grad():
        twin, other = graph.model.experts[2], graph.model.experts[5]  # type: ignore[index]
        other.load_state_dict(twin.state_dict())  # type: ignore[union-attr]
        graph.model.router.weight[5] = graph.model.router.weight[2]  # type: ignore[index,union-attr]
    scores = importance.ExpertClusters()(graph)[name]
    assert int(np.argmin(scores)) in (2, 5)
    assert importance.Magnitude()(graph)[name].shape == (EXPERTS,)
