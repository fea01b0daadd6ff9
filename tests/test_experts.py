"""Mixtures of experts: a router's outputs and its experts' parameters are one axis, and what is gone can't be chosen."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import depgraph
from depgraph.axes import Axis
from depgraph.cutting.choices import chosen_alike
from depgraph.cutting.verifying import Verifier
from depgraph.errors import CheckError, PlanError
from tests.test_end_to_end import random_scores
from tests.zoo import ZOO

EXPERTS, PICKED, WIDTH, INNER = 6, 2, 12, 10


class Stacked(nn.Module):
    """Experts in stacked weights; a token's matrices are looked up by the indices that top-k chose."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / 3)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / 3)
        self.bias = nn.Parameter(torch.randn(EXPERTS, WIDTH))
        self.out = nn.Linear(WIDTH, 3)

    def picked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shares, index = self.router(x).softmax(-1).topk(PICKED, dim=-1)
        return shares / shares.sum(-1, keepdim=True), index

    def forward(self, x: Tensor) -> Tensor:
        shares, index = self.picked(x)
        inner = F.silu(torch.einsum("nkiw,nw->nki", self.up[index], x))
        made = torch.einsum("nkwi,nki->nkw", self.down[index], inner) + F.embedding(index, self.bias)
        return self.out((shares.unsqueeze(-1) * made).sum(1))


class Dense(Stacked):
    """All experts run; their outputs are weighted with a one-hot of what was chosen."""

    def forward(self, x: Tensor) -> Tensor:
        shares, index = self.picked(x)
        weights = (F.one_hot(index, EXPERTS) * shares.unsqueeze(-1)).sum(1)
        inner = F.silu(torch.einsum("eiw,nw->nei", self.up, x))
        made = torch.einsum("ewi,nei->new", self.down, inner) + self.bias
        return self.out(torch.einsum("ne,new->nw", weights, made))


class Scattered(Dense):
    """As `Dense`, with the shares scattered to their places, and batched products over the experts."""

    def forward(self, x: Tensor) -> Tensor:
        shares, index = self.picked(x)
        weights = torch.zeros(x.shape[0], self.router.out_features).scatter(1, index, shares)
        rows = x.unsqueeze(0).expand(self.up.shape[0], -1, -1)
        made = torch.bmm(F.silu(torch.bmm(rows, self.up.mT)), self.down.mT) + self.bias.unsqueeze(1)
        return self.out((made * weights.t().unsqueeze(-1)).sum(0))


class Sorted(Stacked):
    """Pairs of tokens and experts are laid out by expert, in the order of an argsort, and put back."""

    def forward(self, x: Tensor) -> Tensor:
        shares, index = self.picked(x)
        order = index.flatten().argsort()
        expert, token = index.flatten()[order], order // PICKED
        inner = F.silu(torch.einsum("niw,nw->ni", self.up[expert], x[token]))
        made = torch.einsum("nwi,ni->nw", self.down[expert], inner) + self.bias.index_select(0, expert)
        return self.out(torch.zeros_like(x).index_add(0, token, made * shares.flatten()[order].unsqueeze(-1)))


class Guarded(Stacked):
    """The code looks out for indices that stand for no expert, and bounds them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = EXPERTS

    def picked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shares, index = super().picked(x)
        nobody = (index >= self.count) | (index == EXPERTS) | (index < 0) | (index == -1)
        return shares.masked_fill(nobody, 0.0), index.clamp(max=EXPERTS - 1).clamp_(0, self.count - 1)

    def forward(self, x: Tensor) -> Tensor:
        shares, index = self.picked(x)
        weights = (F.one_hot(index, self.count) * shares.unsqueeze(-1)).sum(1)
        made = torch.einsum("ewi,nei->new", self.down, F.silu(torch.einsum("eiw,nw->nei", self.up, x))) + self.bias
        return self.out(torch.einsum("ne,new->nw", weights, made))


class Barred(TorchFunctionMode):
    """The logits of a router of some experts are minus infinity."""

    def __init__(self, weight: Tensor, gone: Sequence[int]) -> None:
        super().__init__()
        self.weight, self.gone = weight, list(gone)

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = function(*args, **(kwargs or {}))
        if function is F.linear and args[1] is self.weight:
            made = made.index_fill(-1, torch.tensor(self.gone), float("-inf"))
        return made


def experts(graph: depgraph.DependencyGraph, target: str) -> Axis:
    """The axis of the rows of a router's weight."""
    return next(a for a in graph.axes if any((m.target, m.dim) == (target, 0) for m in a.members))


@pytest.mark.parametrize("kind", [Stacked, Dense, Scattered, Sorted, Guarded])
def test_experts_go_with_the_rows_of_their_router(kind: type[Stacked]) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(9, WIDTH)
    graph = depgraph.trace(model, x)
    axis = experts(graph, "router.weight")
    assert axis.size == EXPERTS and axis.prunable.all() and not axis.exact and not axis.tried
    assert {(m.target, m.dim) for m in axis.members} == {
        (n, 0) for n in ("router.weight", "router.bias", "up", "down", "bias")
    }
    pruned = graph.cut_plan({axis.name: [1, 4]}).apply()
    assert pruned.up.shape == (EXPERTS - 2, INNER, WIDTH)
    with torch.no_grad(), Barred(model.router.weight, [1, 4]):
        expected = model(x)
    torch.testing.assert_close(pruned(x), expected)
    assert not torch.allclose(expected, model(x), atol=1e-3)


def test_inner_neurons_and_experts_go_together() -> None:
    model = Stacked().eval()
    graph = depgraph.trace(model, torch.randn(9, WIDTH))
    report = graph.plan(random_scores(graph), depgraph.Target(params=0.5), scope="axis").apply_with_report()
    assert report.check is not None and report.check.error < 1e-5 and not report.check.vacuous
    left, inner, _ = report.model.up.shape
    assert PICKED <= left < EXPERTS and inner < INNER


def test_as_many_experts_stay_as_are_chosen() -> None:
    graph = depgraph.trace(Stacked().eval(), torch.randn(9, WIDTH))
    axis = experts(graph, "router.weight")
    with pytest.raises(PlanError, match=r"leaves 1 indices.*2 of its indices are chosen.*topk"):
        graph.cut_plan({axis.name: range(EXPERTS - 1)})
    graph.cut_plan({axis.name: range(EXPERTS - PICKED)}).apply()
    most = graph.cost({axis.name: range(EXPERTS - PICKED)}).share_of(graph.dense_cost)["params"] + 1e-9
    assert len(graph.plan(random_scores(graph), depgraph.Target(params=most), only=axis).removal[axis.name]) == 4


class Counting(Stacked):
    """Expert 2 is treated in its own way: by its number."""

    def picked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shares, index = super().picked(x)
        return torch.where(index == 2, 0.5 * shares, shares), index


class Offset(Stacked):
    """Numbers are computed from what was chosen."""

    def picked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shares, index = super().picked(x)
        return shares, (index + 1) % EXPERTS


class Telling(Stacked):
    """What was chosen is an output."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), self.picked(x)[1]


class Capped(Stacked):
    """The last expert is never taken, whatever is chosen."""

    def picked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shares, index = super().picked(x)
        return shares, index.clamp(max=EXPERTS - 2)


class Preferred(Stacked):
    """The first expert counts twice."""

    def picked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shares, index = super().picked(x)
        return torch.where(index < 1, 2 * shares, shares), index


@pytest.mark.parametrize("kind", [Counting, Offset, Telling, Capped, Preferred])
def test_numbers_of_experts_that_count_keep_them_all(kind: type[Stacked]) -> None:
    graph = depgraph.trace(kind().eval(), torch.randn(9, WIDTH))
    assert not any(
        a.prunable.any() for a in graph.axes if any((m.target, m.dim) == ("router.weight", 0) for m in a.members)
    )


@pytest.mark.parametrize("router", ["mixtral:mlp.gate", "gpt_oss:mlp.router"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_experts_of_transformers(router: str, implementation: str) -> None:
    """Independent of our own reference: the original whose router can't choose the experts that went."""
    name, _, path = router.partition(":")
    example = ZOO[name]()
    model = example.model
    model.set_experts_implementation(implementation)
    graph = depgraph.trace(model, example.args, example.kwargs)
    axis = experts(graph, f"model.layers.1.{path}.weight")
    pruned = graph.cut_plan({axis.name: [0, 3]}).apply(form="module")
    with torch.no_grad(), Barred(model.get_parameter(f"model.layers.1.{path}.weight"), [0, 3]):
        expected = model(**example.kwargs).logits
    torch.testing.assert_close(pruned(**example.kwargs).logits, expected, rtol=1e-4, atol=1e-4)
    pruned.set_experts_implementation("eager")
    torch.testing.assert_close(pruned(**example.kwargs).logits, expected, rtol=1e-4, atol=1e-4)


def test_sets_of_experts_and_experts_within_sets_are_axes() -> None:
    example = ZOO["deepseek_v3"]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    target = "model.layers.1.mlp.gate.weight"
    sizes = [a.size for a in graph.axes if any((m.target, m.dim) == (target, 0) for m in a.members)]
    assert sizes == [3, 4]


def test_widths_stay_multiples_that_grouped_products_take() -> None:
    example = ZOO["mixtral"]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    plan = graph.plan(random_scores(graph), depgraph.Target(params=0.7), scope="axis")
    pruned = plan.apply(form="module")
    held = pruned.model.layers[0].mlp.experts
    assert held.down_proj.shape[1] % 4 == held.down_proj.shape[2] % 4 == 0
    assert held.num_experts == len(held.down_proj) < 6
    pruned(**example.kwargs)
    inner = next(
        a
        for a in graph.axes
        if any((m.target, m.dim) == ("model.layers.0.mlp.experts.down_proj", 2) for m in a.members)
    )
    assert any("no multiple of 4" in note for note in graph.cut_plan({inner.name: [0]}).apply_with_report().notes)


class Grouped(nn.Module):
    """Two products of tokens with matrices of their experts, which lie as they are multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(16, 4), nn.Linear(20, 3)
        self.up, self.down = nn.Parameter(torch.randn(4, 16, 32) / 4), nn.Parameter(torch.randn(4, 32, 20) / 6)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        order = chosen.argsort()
        ends = torch.bincount(chosen, minlength=4).cumsum(0).to(torch.int32)
        made = F.grouped_mm(F.grouped_mm(x[order], self.up, offs=ends).relu(), self.down, offs=ends)
        return self.head(made[order.argsort()])


def test_rows_of_matrices_that_grouped_products_take_as_they_lie_stay_multiples() -> None:
    graph = depgraph.trace(Grouped().eval(), torch.randn(12, 16))
    pruned = graph.plan(random_scores(graph), depgraph.Target(params=0.7), scope="axis").apply()
    assert pruned.up.shape[2] in (20, 24, 28) and pruned.down.shape[2] in (12, 16)


def test_a_uniform_plan_takes_experts_by_the_config() -> None:
    example = ZOO["mixtral"]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    only = [a for a in graph.axes if any("mlp.gate" in m.target and m.dim == 0 for m in a.members)]
    plan = graph.plan(random_scores(graph), depgraph.Target(params=0.8), scope="uniform", only=only)
    assert plan.config == {"num_local_experts": 4}


@pytest.mark.parametrize(
    ("operator", "args"), [("topk.default", (1,)), ("max.dim", (1,)), ("argmax.default", (1, True))]
)
def test_the_reference_chooses_alike_where_only_rounding_decides(operator: str, args: tuple[object, ...]) -> None:
    name, overload = operator.split(".")
    target = getattr(getattr(torch.ops.aten, name), overload)
    source = torch.tensor([[0.5, 0.5000001, 0.1]] * 2)
    made = target(source, *args)
    theirs = torch.tensor([[0], [2]]).reshape((made if name == "argmax" else made[1]).shape)
    followed = chosen_alike(target, ((source, *args), {}), made, theirs, 1e-4)
    values, indices = (None, followed) if name == "argmax" else followed
    assert indices.flatten().tolist() == [0, 1]
    assert values is None or torch.equal(values.flatten(), source[0, :2])


def test_wrong_choices_are_seen() -> None:
    torch.manual_seed(0)
    graph = depgraph.trace(Stacked().eval(), torch.randn(50, WIDTH))
    plan = graph.cut_plan({experts(graph, "router.weight").name: [1]})
    pruned = plan.apply()
    with torch.no_grad():
        pruned.router.weight.copy_(pruned.router.weight[[1, 0, 2, 3, 4]])
    with pytest.raises(CheckError, match="differs"):
        Verifier(plan).check(pruned)
