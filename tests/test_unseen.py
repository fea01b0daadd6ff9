"""Ways of writing a model that no example in this repository has, each a small module of the pattern."""

from __future__ import annotations

import copy
import math
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
import importance
from depgraph.cutting.report import CutReport
from depgraph.cutting.verifying import Verifier
from depgraph.errors import CheckError, CutError, TargetError


def cut(model: nn.Module, example: Tensor, share: float = 0.6, **options: Any) -> CutReport:
    """A model that keeps a share of its parameters, and what was checked."""
    graph = depgraph.trace(model.eval(), example)
    report = graph.plan(importance.Magnitude(), depgraph.Target(params=share), **options).apply_with_report()
    assert report.check is not None and not report.check.vacuous
    return report


@lru_cache(64)
def parts_of(sizes: tuple[int, ...], heads: int) -> tuple[int, ...]:
    return (*sizes[:-1], heads, sizes[-1] // heads)


class SizesFromMemory(nn.Module):
    """Heads whose sizes a function gives that keeps what it gave before."""

    def __init__(self, width: int = 16, inner: int = 24, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.made = nn.ModuleList(nn.Linear(width, 3 * inner) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(inner, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for made, out in zip(self.made, self.out, strict=True):
            q, k, v = (
                t.reshape(parts_of(tuple(t.shape), self.heads)).transpose(1, 2) for t in made(x).chunk(3, dim=-1)
            )
            attended = (q @ k.transpose(-1, -2)).softmax(-1) @ v
            x = x + out(attended.transpose(1, 2).flatten(2))
        return x.mean(1)


def test_sizes_that_a_function_remembers_follow_a_cut() -> None:
    torch.manual_seed(0)
    model, example = SizesFromMemory(), torch.randn(2, 5, 16)
    model(example)  # the function knows these sizes by now
    report = cut(model, example)
    assert report.form == "module" and type(report.model) is SizesFromMemory
    assert parts_of.cache_info().maxsize == 64  # it is the function that it was


class Folded(nn.Module):
    """A layer that reshapes by what it makes of its options, and is copied by these."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.sizes = sizes
        self._pairs = tuple(sizes.items())

    def forward(self, x: Tensor) -> Tensor:
        width = dict(self._pairs)["width"]
        return x.unflatten(-1, (x.shape[-1] // width, width)).transpose(1, 2)

    def __getstate__(self) -> dict[str, Any]:
        return {"sizes": self.sizes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["sizes"])  # type: ignore[misc]


class FoldsByOptions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.made, self.out = nn.Linear(16, 3 * 24), nn.Linear(24, 16)
        self.fold = Folded(width=8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.fold(t) for t in self.made(x).chunk(3, dim=-1))
        return x + self.out(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_a_copy_of_a_layer_with_a_state_of_its_own_is_as_narrow() -> None:
    torch.manual_seed(0)
    model, example = FoldsByOptions(), torch.randn(2, 5, 16)
    report = cut(model, example)
    assert report.form == "module" and report.model.fold.sizes["width"] < 8
    assert torch.equal(copy.deepcopy(report.model)(example), report.model(example))
    assert model.fold.sizes["width"] == 8


class BiasInParts(nn.Module):
    """Queries, keys and values whose bias is put together from two, with none for the keys."""

    def __init__(self, width: int = 24, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.made = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.randn(width)) for _ in range(2))
        self.out, self.readout = nn.Linear(width, width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias, requires_grad=False), self.v_bias))
        made = F.linear(x, self.made.weight, bias)
        q, k, v = made.reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.readout(x + self.out(attended))


class QueriesReadTwice(nn.Module):
    """Queries that attention reads, and a bias of positions too: only the keys can make up for the scale."""

    def __init__(self, width: int = 24, heads: int = 2, length: int = 5) -> None:
        super().__init__()
        self.heads = heads
        self.made = nn.Linear(width, 3 * width)
        self.places = nn.Parameter(torch.randn(length, length, width // heads))
        self.out, self.readout = nn.Linear(width, width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.made(x).reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mask = torch.einsum("bhqd,qkd->bhqk", q, self.places)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return self.readout(x + self.out(attended))


class NormedMaps(nn.Module):
    """Attention over a picture, whose queries and keys come from batch norms."""

    def __init__(self, width: int = 12, inner: int = 16) -> None:
        super().__init__()
        self.q, self.k, self.v = (
            nn.Sequential(nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner)) for _ in range(3)
        )
        self.out = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        return x + self.out(attended.unflatten(2, x.shape[2:]))


@pytest.mark.parametrize(
    ("model", "shape"), [(BiasInParts, (2, 5, 24)), (QueriesReadTwice, (2, 5, 24)), (NormedMaps, (2, 12, 4, 4))]
)
def test_weights_make_up_for_the_scale_of_a_narrower_attention(model: type[nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    built, example = model(), torch.randn(shape)
    for norm in built.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.bias)
    graph = depgraph.trace(built.eval(), example)
    heads = [a for a in graph.axes if graph.sizes.solve(graph.widths.at({a.name: [0]})).drifts]
    assert heads
    report = graph.cut_plan({heads[0].name: range(heads[0].size // 3)}).apply_with_report()
    assert report.form == "module" and report.check is not None and report.check.error < 1e-5


class Amplifies(nn.Module):
    """Makes visible numbers of what rounding leaves of a difference."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(8, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        made = self.out(torch.tanh(self.inner(x)) + 3)
        return torch.sin(made * 1e4)


def test_rounding_that_a_model_amplifies_is_no_difference() -> None:
    torch.manual_seed(0)
    model, example = Amplifies(), torch.randn(4, 8)
    report = cut(model, example, 0.5)
    assert report.check is not None and report.check.rounding > report.check.tolerance > 1e3 * report.check.error
    assert "in double precision" in str(report)
    assert {t.dtype for t in (example, *model.parameters(), *report.model.parameters())} == {torch.float32}
    assert torch.get_default_dtype() is torch.float32


class AmplifiesStates(nn.Module):
    """The same of a recurrent layer, which asks whether its weights are of its input's precision."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.states, self.out = nn.Linear(8, 24), nn.LSTM(24, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.out(self.states(self.inner(x))[0] + 3) * 1e4)


@pytest.mark.parametrize("form", ["module", "graph"])
def test_rounding_that_a_recurrent_layer_hands_on_is_no_difference(form: str) -> None:
    torch.manual_seed(0)
    graph = depgraph.trace(AmplifiesStates().eval(), torch.randn(4, 30, 8))
    report = graph.cut_plan({axis.name: [0, 3, 4, 9, 11] for axis in graph.axes}).apply_with_report(form=form)
    assert report.check is not None and report.check.rounding > report.check.tolerance > 1e3 * report.check.error


def test_a_difference_that_a_model_amplifies_is_one() -> None:
    torch.manual_seed(0)
    model, example = Amplifies(), torch.randn(4, 8)
    graph = depgraph.trace(model, example)
    plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.5))
    small = plan.apply()
    with torch.no_grad():
        small.out.weight[0, 0] += 1e-4
    with pytest.raises(CheckError, match="differs from the zeroed original"):
        Verifier(plan).check(small)


class HalvesOfShuffled(nn.Module):
    """Halves of channels, mixed in between: how many groups each half loses can't be said for one block alone."""

    def __init__(self, width: int = 16, blocks: int = 2) -> None:
        super().__init__()
        half = width // 2
        self.stem = nn.Conv2d(3, width, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(half, 4 * half, 1), nn.ReLU(), nn.Conv2d(4 * half, half, 1)) for _ in range(blocks)
        )
        self.out = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            left, right = x.chunk(2, dim=1)
            x = torch.cat((left, block(right)), dim=1)
            x = x.unflatten(1, (2, x.shape[1] // 2)).transpose(1, 2).flatten(1, 2)
        return self.out(x.mean((2, 3)))


def test_a_plan_keeps_to_what_the_module_can_express_where_that_costs_little() -> None:
    torch.manual_seed(0)
    report = cut(HalvesOfShuffled(), torch.randn(2, 3, 4, 4), 0.7)
    assert type(report.model) is HalvesOfShuffled
    assert abs(report.after.params / report.before.params - 0.7) < 0.03


def test_a_plan_leaves_the_module_where_the_rest_would_have_to_pay_for_it() -> None:
    torch.manual_seed(0)
    report = cut(HalvesOfShuffled(), torch.randn(2, 3, 4, 4), 0.35)
    assert report.form == "graph"
    kept = cut(HalvesOfShuffled(), torch.randn(2, 3, 4, 4), 0.35, form="module")
    assert type(kept.model) is HalvesOfShuffled


class SlicesFromTheEnd(nn.Module):
    """Linear attention, whose normalisation is a last column that is put on and taken off again."""

    def __init__(self, width: int = 16, inner: int = 12) -> None:
        super().__init__()
        self.made, self.out = nn.Linear(width, 3 * inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.made(x).chunk(3, dim=-1)
        v = F.pad(v, (0, 1), value=1.0)
        made = F.relu(q) @ (F.relu(k).transpose(1, 2) @ v)
        return x + self.out(made[..., :-1] / (made[..., -1:] + 1e-3))


def test_slices_that_count_from_the_end_follow_a_cut() -> None:
    torch.manual_seed(0)
    report = cut(SlicesFromTheEnd(), torch.randn(2, 5, 16))
    assert report.form == "module" and report.model.out.in_features < 12


def test_what_the_forward_does_not_read_is_said_where_it_keeps_a_target_from_being_met() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    model[0].register_module("never_called", nn.Linear(50, 50))
    graph = depgraph.trace(model, torch.randn(2, 4))
    with pytest.raises(TargetError, match=r"doesn't read 95.*of the parameters.*never_called"):
        graph.plan(importance.Magnitude(), depgraph.Target(params=0.5))


class TakesSwitches(nn.Module):
    """Attention with a scale of Python's own making, and arguments that are no tensors."""

    def __init__(self, width: int = 16, inner: int = 12) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, inner) for _ in range(3))
        self.out = nn.Linear(inner, width)

    def forward(self, x: Tensor, as_dict: bool = True, options: dict[str, Any] | None = None) -> Any:
        q, k, v = self.q(x), self.k(x), self.v(x)
        made = self.out((q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1) @ v)
        return {"made": made} if as_dict else (made,)


def test_numbers_that_follow_a_size_are_found_beside_inputs_that_are_no_tensors() -> None:
    torch.manual_seed(0)
    kwargs = {"as_dict": False, "options": {"levels": 3, "mask": None}}
    graph = depgraph.trace(TakesSwitches(), torch.randn(2, 5, 16), kwargs)
    report = graph.plan(importance.Magnitude(), depgraph.Target(params=0.7)).apply_with_report()
    assert report.form == "module" and report.check is not None and report.check.error < 1e-5


class ComparesFeatures(nn.Module):
    """Features of two pictures by one network, compared at all places: its weights stand in both factors."""

    def __init__(self, inner: int = 24) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, inner, 3))
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        one, other = self.features(torch.cat((x, y))).chunk(2)
        one, other = one.flatten(2), other.flatten(2)
        compared = one.transpose(1, 2) @ other / torch.sqrt(torch.tensor(one.shape[1]))
        return self.out(compared)


class AddsFeatures(ComparesFeatures):
    """The same, but the features of one picture are read once more: a factor on them would be seen."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, y) + self.features(x).tanh().mean((1, 2, 3))[:, None, None]


def test_weights_that_stand_in_both_factors_make_up_for_a_scale_by_its_root() -> None:
    torch.manual_seed(0)
    graph = depgraph.trace(ComparesFeatures(), (torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)))
    plan = graph.cut_plan({"features.2.weight:0": range(4)})
    report = plan.apply_with_report(form="module")
    assert report.check is not None and report.check.error < 1e-5 < report.check.sensitivity


def test_weights_that_stand_in_both_factors_and_elsewhere_do_not() -> None:
    torch.manual_seed(0)
    graph = depgraph.trace(AddsFeatures(), (torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)))
    plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.9))
    with pytest.raises(CutError, match="no weight that only this reads can make up for it"):
        graph.cut_plan({"features.2.weight:0": range(4)}).apply(form="module")
    report = plan.apply_with_report()
    assert report.check is not None and report.check.error < 1e-5
