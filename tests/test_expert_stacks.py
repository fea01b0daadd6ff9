"""Experts whose weights the code takes one by one, from stacks, from views of one matrix, or from children by number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
import importance
from depgraph.axes import Axis
from depgraph.describing import describe
from depgraph.errors import CutError, PlanError
from depgraph.layers import Anatomy
from depgraph.plan import Plan
from tests.test_experts import EXPERTS, INNER, PICKED, WIDTH, Barred, Stacked


class Looped(Stacked):
    """Over the experts that were chosen, by a one-hot mask for each."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS

    def made(self, e: int | Tensor, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.up[e])), self.down[e]) + self.bias[e]

    def mixed(self, x: Tensor, shares: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(index, self.num_experts).permute(2, 1, 0)
        for hit in torch.greater(mask.sum((-1, -2)), 0).nonzero():
            place, token = torch.where(mask[hit[0]])
            out.index_add_(0, token, self.made(hit[0], x[token]) * shares[token, place, None])
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mixed(x, *self.picked(x)))


class Ranged(Looped):
    """Over all numbers; those that aren't chosen weigh nothing."""

    def mixed(self, x: Tensor, shares: Tensor, index: Tensor) -> Tensor:
        return sum(  # type: ignore[return-value]
            (shares * (index == e)).sum(-1, keepdim=True) * self.made(e, x) for e in range(self.num_experts)
        )


class Viewed(Looped):
    """All experts' weights are rows of one matrix, of which each has a view."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = INNER
        self.up = nn.Parameter(torch.randn(EXPERTS * INNER, WIDTH) / 3)
        self.down = nn.Parameter(torch.randn(EXPERTS * INNER, WIDTH) / 3)

    def made(self, e: int | Tensor, x: Tensor) -> Tensor:
        up, down = (w.view(self.num_experts, self.inner, -1)[e] for w in (self.up, self.down))
        return F.silu(F.linear(x, up)) @ down + self.bias[e]


class Behind(Looped):
    """The experts are the last dim of their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(INNER, WIDTH, EXPERTS) / 3)
        self.down = nn.Parameter(torch.randn(WIDTH, INNER, EXPERTS) / 3)

    def made(self, e: int | Tensor, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.up[..., e])), self.down[..., e]) + self.bias[e]


class Beside(Looped):
    """Modules by number beside other children, a norm in a dict that says so, and one that all tokens go through."""

    def __init__(self) -> None:
        super().__init__()
        for e in range(EXPERTS):
            setattr(self, f"expert_{e}", nn.Linear(WIDTH, WIDTH))
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.parts = nn.ModuleDict({f"norm_{e}": nn.LayerNorm(WIDTH) for e in range(EXPERTS)})
        self.parts["drop"] = nn.Dropout()

    def made(self, e: int | Tensor, x: Tensor) -> Tensor:
        made = getattr(self, f"expert_{int(e)}")(x) + super().made(e, x)
        return self.parts["drop"](self.parts[f"norm_{int(e)}"](made))

    def mixed(self, x: Tensor, shares: Tensor, index: Tensor) -> Tensor:
        return super().mixed(x, shares, index) + self.shared(x)


class Skipping(Looped):
    """The router has two more outputs, of experts that do nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS + 2)
        self.classes = EXPERTS + 2

    def mixed(self, x: Tensor, shares: Tensor, index: Tensor) -> Tensor:
        out = x * (shares * (index >= self.num_experts)).sum(-1, keepdim=True)
        for e in range(self.num_experts):
            token, place = torch.where(index == e)
            if token.numel():
                out = out.index_add(0, token, self.made(e, x[token]) * shares[token, place, None])
        return out


class Choosing(Looped):
    """Experts choose their tokens."""

    def forward(self, x: Tensor) -> Tensor:
        shares, token = self.router(x).softmax(-1).t().topk(4, dim=-1)
        inner = F.silu(torch.bmm(x[token], self.up.mT))
        made = torch.bmm(inner, self.down.mT) + self.bias.unsqueeze(1)
        return self.out(torch.zeros_like(x).index_add(0, token.flatten(), (made * shares[..., None]).flatten(0, 1)))


class Shared(Looped):
    """One output of the router, the last one, is the share of an expert that all tokens go through."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS + 1)
        self.always, self.common = 1, nn.Linear(WIDTH, WIDTH)
        self.register_buffer("balance", torch.randn(EXPERTS) / 5)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        index = (logits[:, : -self.always].sigmoid() + self.balance).topk(PICKED, dim=-1)[1]
        shares = logits[:, : -self.always].gather(1, index).sigmoid()
        return self.out(self.mixed(x, shares, index) + logits[:, -self.always :].sigmoid() * self.common(x))


KINDS = [Looped, Ranged, Viewed, Behind, Beside, Skipping, Choosing, Shared]


def traced(kind: type[Looped]) -> tuple[depgraph.DependencyGraph, Tensor]:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(20, WIDTH)
    return depgraph.trace(model, x), x


def experts(graph: depgraph.DependencyGraph) -> Axis:
    (found,) = [axis for axis in graph.axes if axis.tried]
    return found


def cut_of_two(kind: type[Looped], folder: Path) -> tuple[Plan, nn.Module]:
    """A plan without experts 1 and 4 and what it makes, compared with the original whose router can't choose them: independent
    of our own reference."""
    graph, x = traced(kind)
    axis = experts(graph)
    assert axis.size == EXPERTS and axis.prunable.all()
    plan = graph.cut_plan({axis.name: [1, 4]})
    report = plan.apply_with_report()
    pruned = report.model
    assert report.check is not None and not report.check.vacuous
    assert pruned.num_experts == EXPERTS - 2
    assert pruned.router.out_features == graph.model.router.out_features - 2  # type: ignore[union-attr,operator]
    assert plan.cost().params == sum(p.numel() for p in pruned.parameters())
    others = torch.randn(50, WIDTH)
    with torch.no_grad(), Barred(graph.model.router.weight, [1, 4]):  # type: ignore[arg-type,union-attr]
        expected = graph.model(x), graph.model(others)
    torch.testing.assert_close((pruned(x), pruned(others)), expected)
    assert not torch.allclose(expected[0], graph.model(x), atol=1e-3)
    depgraph.save(pruned, folder / "small")
    assert torch.equal(depgraph.load(folder / "small", model=kind()).eval()(x), pruned(x))
    return plan, pruned


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_leaves_with_all_that_is_its_own(kind: type[Looped], tmp_path: Path) -> None:
    _, pruned = cut_of_two(kind, tmp_path)
    assert pruned.bias.shape[0] == EXPERTS - 2  # type: ignore[union-attr,index]


def cut_of_half(kind: type[Looped]) -> None:
    """A plan for half of the parameters takes experts and other axes, and cuts in place what it makes anew."""
    graph, x = traced(kind)
    scores = {a.name: np.random.default_rng(0).random(a.size) for a in graph.axes}
    plan = graph.plan(scores, depgraph.Target(params=0.5), scope="axis")
    assert experts(graph).name in plan.removal and len(plan.removal) > 1
    report = plan.apply_with_report()
    assert report.check is not None and report.check.error < 1e-5
    assert sum(p.numel() for p in report.model.parameters()) == report.after.params
    expected = report.model(x)
    assert plan.apply_() is graph.model and torch.equal(graph.model(x), expected)  # type: ignore[operator]


@pytest.mark.parametrize("kind", [Looped, Viewed])
def test_experts_and_neurons_that_share_a_matrix_go_together(kind: type[Looped]) -> None:
    cut_of_half(kind)


def test_as_many_stay_as_are_chosen_and_only_in_the_module() -> None:
    graph, _ = traced(Looped)
    axis = experts(graph)
    assert graph.widths.least(axis.name) == PICKED
    with pytest.raises(PlanError, match=r"leaves 1 indices.*2 of its indices are chosen.*topk"):
        graph.cut_plan({axis.name: range(EXPERTS - 1)})
    with pytest.raises(CutError, match="form='module'"):
        graph.cut_plan({axis.name: [0]}).apply(form="graph")
    assert str(describe(Anatomy(graph))[axis.name]) == "experts, 2 chosen at a time"


def test_experts_of_experts_in_two_layers_stay_apart() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Looped(), nn.Linear(3, WIDTH), Looped()).eval()
    graph = depgraph.trace(model, torch.randn(20, WIDTH))
    tried = [axis for axis in graph.axes if axis.tried]
    assert [{m.target.split(".")[0] for m in axis.members} for axis in tried] == [{"0"}, {"2"}]
    pruned = graph.cut_plan({tried[1].name: [0, 5]}).apply()
    assert [len(pruned[k].up) for k in (0, 2)] == [EXPERTS, EXPERTS - 2]


class Special(Ranged):
    """Expert 2 counts twice: by its number."""

    def made(self, e: int | Tensor, x: Tensor) -> Tensor:
        return super().made(e, x) * (2 if e == 2 else 1)


class Backwards(Ranged):
    """Weights lie in another order than what stands for them."""

    def made(self, e: int | Tensor, x: Tensor) -> Tensor:
        return super().made(EXPERTS - 1 - e, x)


class Untold(Looped):
    """Where it isn't being captured, the code counts on all experts."""

    def mixed(self, x: Tensor, shares: Tensor, index: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and len(self.up) != EXPERTS:
            raise RuntimeError("where have they gone?")
        return super().mixed(x, shares, index)


@pytest.mark.parametrize("kind", [Special, Backwards, Untold])
def test_what_goes_by_its_number_stays(kind: type[Looped]) -> None:
    graph, _ = traced(kind)
    assert not any(axis.tried for axis in graph.axes)
    assert graph.model.num_experts == EXPERTS and graph.model.up.shape[0] == EXPERTS  # type: ignore[union-attr,index]


@pytest.mark.parametrize("kind", [Looped, Viewed, Skipping])
def test_recipes_for_experts_rank_them(kind: type[Looped]) -> None:
    graph, x = traced(kind)
    name = experts(graph).name
    with torch.no_grad():
        graph.model.down.mul_(1e-3)  # type: ignore[union-attr,operator]
        graph.model.bias[[0, 1, 3, 5]] *= 9  # type: ignore[index,operator]
    for recipe in (importance.recipes.minitron_experts([x]), importance.recipes.stun()):
        pruned = recipe.prune(graph, depgraph.Target(params=0.8))
        assert pruned.plan is not None and list(pruned.plan.removal) == [name]
        if recipe.name == "minitron_experts":
            assert set(pruned.plan.removal[name]) <= {2, 4}
