"""What models of packages do that the library was first tried on long after it was written."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor, nn

import depgraph
import importance
from depgraph.errors import CheckError, CutError, TargetError
from tests.rules.torchvision_operators import define

HALF = depgraph.Target(params=0.5)
define()


class Pairs(nn.Module):
    """Looks at all pairs of different positions, which a mask picks; it has one number for all features."""

    def __init__(self, mask: str) -> None:
        super().__init__()
        self.first, self.second, self.mask = nn.Linear(6, 16), nn.Linear(16, 4), mask

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        pairs = (hidden[:, None] + hidden[:, :, None]).relu()
        mask = ~torch.eye(x.shape[1], dtype=torch.bool)
        if self.mask == "values":
            mask = x.sum(-1)[:, None] > x.sum(-1)[:, :, None]
        return self.second(pairs.masked_select(mask[..., None]).view(-1, self.second.in_features))


@pytest.mark.parametrize("mask", ["constant", "values"])
def test_what_a_mask_picks_keeps_its_features(mask: str) -> None:
    torch.manual_seed(0)
    model, x = Pairs(mask).eval(), torch.randn(2, 5, 6)
    plan = depgraph.trace(model, (x,)).plan(importance.Magnitude(), HALF)
    report = plan.apply_with_report(form="module")
    assert report.check is not None and not report.check.vacuous
    for parameter in (model.first.weight, model.first.bias):
        gone = plan.removed()[0].indices
        parameter.data[gone] = 0
    other = torch.randn(3, 4, 6)
    torch.testing.assert_close(report.model(other), model(other), rtol=1e-4, atol=1e-5)


class Parts(nn.Module):
    """Each position has a part of the vocabulary, all other words are masked in what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 40)

    def forward(self, x: Tensor) -> Tensor:
        mine = torch.arange(40) // 5 == torch.arange(8)[:, None]
        return self.second(self.first(x).relu()).masked_fill(~mine, -torch.finfo(torch.float32).max)


def test_masks_that_are_most_of_what_comes_out_hide_nothing() -> None:
    torch.manual_seed(0)
    plan = depgraph.trace(Parts().eval(), (torch.randn(2, 8, 6),)).plan(importance.Magnitude(), HALF)
    report = plan.apply_with_report()
    assert report.check is not None
    assert not report.check.vacuous
    assert 0.01 < report.check.sensitivity < 10


class Sequence(nn.Module):
    """Lays out the last state for a caller that may want it, by a size that it says nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 12
        self.first, self.second = nn.Linear(6, 12), nn.Linear(6, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        states = (self.first(x) + self.second(x)).tanh()
        return states, states[:, -1].reshape(x.shape[0], 1, self.width)


class Caller(nn.Module):
    """Takes the states and leaves the last of them."""

    def __init__(self) -> None:
        super().__init__()
        self.sequence, self.head = Sequence(), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.sequence(x)
        return self.head(states)


class Backbone(nn.Module):
    """Gives the states of its layers, and norms the last one, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 12)
        self.norms, self.last = nn.ModuleList([nn.LayerNorm(12), nn.LayerNorm(12)]), nn.LayerNorm(12)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        first = self.first(x)
        second = first + self.second(first).tanh()
        return self.last(second), [norm(state) for norm, state in zip(self.norms, (first, second), strict=True)]


class TakesStates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = Backbone(), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat(self.backbone(x)[1], dim=-1))


def test_a_norm_that_nobody_takes_follows() -> None:
    plan = depgraph.trace(TakesStates().eval(), torch.randn(2, 5, 6)).plan(importance.Magnitude(), HALF)
    pruned = plan.apply(form="module")
    assert pruned.backbone.last.normalized_shape[0] == pruned.backbone.first.out_features < 12


def test_sizes_of_what_nobody_takes_follow() -> None:
    plan = depgraph.trace(Caller().eval(), torch.randn(2, 5, 6)).plan(importance.Magnitude(), HALF)
    pruned = plan.apply(form="module")
    assert pruned.sequence.width == pruned.sequence.first.out_features < 12
    assert pruned.sequence(torch.randn(2, 5, 6))[1].shape == (2, 1, pruned.sequence.width)


class Frequencies(nn.Module):
    """Splits keys into heads as it does queries, and attends by queries alone."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 8
        self.queries, self.keys = nn.Linear(6, 16), nn.Linear(6, 16)
        self.weights, self.head = nn.Parameter(torch.rand(8, 2, 2)), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries(x).view(*x.shape[:2], self.heads, -1)
        self.keys(x).view(*x.shape[:2], self.heads, -1)
        return self.head(torch.einsum("bthi,hij->bthj", queries, self.weights).flatten(2))


def test_what_is_split_like_the_rest_keeps_as_many_heads() -> None:
    torch.manual_seed(0)
    graph = depgraph.trace(Frequencies().eval(), torch.randn(2, 5, 6))
    heads = [axis.name for axis in graph.axes if axis.size == 8]
    pruned = graph.plan(importance.Magnitude(), depgraph.Target(params=0.8), form="module", only=heads).apply_()
    assert pruned.heads < 8
    assert pruned.keys.out_features == pruned.queries.out_features == 2 * pruned.heads
    assert pruned(torch.randn(3, 4, 6)).shape == (3, 4, 4)


class Padding(nn.Module):
    """Fills up what is narrower than a number in its code, and computes a number from its width; which way it takes depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.own, self.head = nn.Parameter(torch.rand(16, 16)), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        if x.sum() > 1e9:
            hidden = hidden + 1
        if hidden.shape[-1] < 16:
            hidden = torch.cat([hidden, hidden.new_zeros(*hidden.shape[:-1], 16 - hidden.shape[-1])], -1)
        return self.head((hidden @ self.own) / math.sqrt(hidden.shape[-1]))


def test_a_cut_that_does_not_run_is_refused_in_a_sentence() -> None:
    plan = depgraph.trace(Padding().eval(), torch.randn(5, 6)).plan(importance.Magnitude(), HALF)
    for apply in (plan.apply, plan.apply_):
        with pytest.raises(CheckError, match="the pruned Padding doesn't run"):
            apply()


class Scores(nn.Module):
    """Divides by the root of a width in a forward that depends on values, so that there is no graph form."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys = nn.Linear(6, 16), nn.Linear(6, 16)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys = self.queries(x).relu() + 1, self.keys(x).relu() + 1
        if x.sum() > 1e9:
            queries = queries + 1
        return (queries * keys).sum(-1) / math.sqrt(queries.shape[-1])


def test_where_there_is_no_graph_form_none_is_offered() -> None:
    graph = depgraph.trace(Scores().eval(), torch.randn(5, 6))
    (axis,) = graph.axes
    with pytest.raises(
        TargetError, match=rf"the module keeps all of axis '{axis.name}', as .* no weight can make up for \(.*:193\)"
    ):
        graph.plan(importance.Magnitude(), HALF)
    plan = graph.cut_plan({axis.name: range(8)})
    with pytest.raises(
        CutError, match=re.escape(f"leave whole the axis whose size that is (protect=[{axis.kind!r}])") + "$"
    ):
        plan.apply()


class Heuristic(nn.Module):
    """Chooses how to compute the same by a number that it makes of its sizes, as a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(6, 16)), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        work = torch.tensor([float(size) for size in self.weight.shape]).sum()
        hidden = x @ self.weight if bool(work > 1e3) else torch.einsum("ni,io->no", x, self.weight)
        return self.head(hidden.relu() + 1 if x.sum() > 1e9 else hidden.relu())


def test_a_number_that_sizes_alone_make_may_change_with_them() -> None:
    torch.manual_seed(0)
    report = (
        depgraph.trace(Heuristic().eval(), torch.randn(5, 6)).plan(importance.Magnitude(), HALF).apply_with_report()
    )
    assert report.form == "module"
    assert report.check is not None and not report.check.vacuous


class Boxes(nn.Module):
    """A head of a detector with torchvision's operators: it looks where it says, then at crops, whole and place by place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.moves = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 18, 1)
        self.deformed, self.bias = nn.Parameter(torch.randn(12, 4, 3, 3) / 6), nn.Parameter(torch.zeros(12))
        self.places, self.box, self.kind = nn.Conv2d(12, 20, 1), nn.Linear(12 * 4, 4), nn.Linear(5, 3)

    def forward(self, image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = self.stem(image).relu(), self.deformed
        groups, mask = x.shape[1] // weight.shape[1], x.new_zeros(x.shape[0], 1)
        steps = (1, 1, 1, 1, 1, 1)
        x = torch.ops.torchvision.deform_conv2d(
            x, weight, self.moves(x), mask, self.bias, *steps, groups, 1, False
        ).relu()
        crops = torch.ops.torchvision.roi_align(x, boxes, 1.0, 2, 2, 1, True)
        votes, _ = torch.ops.torchvision.ps_roi_align(self.places(x), boxes, 1.0, 2, 2, 1)
        return self.box(crops.flatten(1)), self.kind(votes.mean((2, 3)))


@pytest.mark.parametrize("form", ["module", "graph"])
def test_operators_of_torchvision_pass_channels_on(form: str) -> None:
    torch.manual_seed(0)
    model, boxes = Boxes().eval(), torch.tensor([[0.0, 1, 1, 5, 6], [1, 0, 2, 7, 7]])
    graph = depgraph.trace(model, (torch.randn(2, 3, 8, 8), boxes))
    assert not graph.unknown
    sizes = {axis.size: int(axis.prunable.sum()) for axis in graph.axes}
    assert sizes == {2: 2, 4: 4, 6: 6, 5: 5}, "groups, channels of each that come in and go out, classes of places"
    for axis in graph.axes:
        report = graph.cut_plan({axis.name: [1]}).apply_with_report(form=form)
        assert report.check is not None and not report.check.vacuous, axis.name
    plan = graph.cut_plan({axis.name: [0] for axis in graph.axes})
    pruned = plan.apply(form=form)
    assert sum(p.numel() for p in pruned.parameters()) == plan.cost().params
