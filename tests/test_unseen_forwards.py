"""More ways of writing a model that no example in this repository has; see `test_unseen.py`."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
import exporters
import importance
from depgraph.errors import CheckError
from tests.test_unseen import Amplifies, cut


@torch.compile(dynamic=True)
def gated(x: Tensor, gate: Tensor) -> Tensor:
    return torch.relu(x) * torch.sigmoid(gate)


class CompiledWithin(nn.Module):
    """A function of the forward is compiled, the module isn't."""

    def __init__(self) -> None:
        super().__init__()
        self.made, self.gate, self.out = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(gated(self.made(x), self.gate(x)))


@pytest.mark.ci
def test_a_function_that_is_compiled_runs_as_it_is_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    example = torch.randn(2, 8)
    report = cut(CompiledWithin(), example)
    assert report.form == "module" and report.model.out.in_features < 16
    exporters.to_onnx(report.model, (example,), tmp_path / "m.onnx")


def shifted_by_zeros(scores: Tensor) -> Tensor:
    zeros = torch.zeros((*scores.size()[:3], 1))
    wide = torch.cat([zeros, scores], -1).view(*scores.size()[:2], scores.size(3) + 1, scores.size(2))
    return wide[:, :, 1:].view_as(scores)[:, :, :, : scores.size(-1) // 2 + 1]


def shifted_by_padding(scores: Tensor) -> Tensor:
    b, h, q, n = scores.shape
    return F.pad(scores, (1, 0)).view(b, h, n + 1, q)[:, :, 1:].view(b, h, q, n)[..., : n // 2 + 1]


class RelativePositions(nn.Module):
    """Attention by content and by distance, both divided by the root of a head's width (Dai et al., "Transformer-XL")."""

    def __init__(self, shift: object, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.each, self.shift = heads, width // heads, shift
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.distance = nn.Linear(width, width, bias=False)
        self.content_bias = nn.Parameter(torch.randn(heads, self.each))
        self.distance_bias = nn.Parameter(torch.randn(heads, self.each))
        self.register_buffer("table", torch.randn(1, 9, width))

    def forward(self, x: Tensor) -> Tensor:
        b = x.size(0)
        q = self.q(x).view(b, -1, self.heads, self.each)
        k, v = (f(x).view(b, -1, self.heads, self.each).transpose(1, 2) for f in (self.k, self.v))
        p = self.distance(self.table).view(1, -1, self.heads, self.each).transpose(1, 2)
        content = (q + self.content_bias).transpose(1, 2) @ k.transpose(-2, -1)
        distance = self.shift((q + self.distance_bias).transpose(1, 2) @ p.transpose(-2, -1))  # type: ignore[operator]
        attended = ((content + distance) / math.sqrt(self.each)).softmax(-1) @ v
        return x + self.out(attended.transpose(1, 2).contiguous().view(b, -1, self.heads * self.each))


@pytest.mark.parametrize("shift", [shifted_by_zeros, shifted_by_padding])
def test_the_scale_of_scores_that_are_shifted_is_made_up_for(shift: object) -> None:
    torch.manual_seed(0)
    report = cut(RelativePositions(shift), torch.randn(2, 5, 16))
    assert report.form == "module" and report.model.each < 8


class Attends(nn.Module):
    """Attention of one sequence to another, without a mask, written out."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, to: Tensor) -> Tensor:
        q, k, v = (
            f(t).view(*t.shape[:2], self.heads, -1).transpose(1, 2)
            for f, t in ((self.q, x), (self.k, to), (self.v, to))
        )
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class PositionsInABuffer(nn.Module):
    """Blocks in lists, between which a softmax shares out positions that a buffer holds one by one."""

    def __init__(self, width: int = 16, length: int = 6) -> None:
        super().__init__()
        self.register_buffer("positions", torch.randn(length, width))
        self.wide = nn.Linear(4, width)
        self.reads, self.writes = (nn.ModuleList(Attends(width) for _ in range(2)) for _ in range(2))
        self.start, self.head = nn.Parameter(torch.randn(3, width)), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(x) + self.positions
        for block in self.reads:
            x = block(x, x)
        y = self.start.expand(len(x), -1, -1)
        for block in self.writes:
            y = block(y, x)
        return self.head(y)


def test_positions_in_a_buffer_are_no_parts_to_choose_from() -> None:
    torch.manual_seed(0)
    report = cut(PositionsInABuffer(), torch.randn(2, 6, 4))
    assert len(report.model.positions) == 6 and len(report.model.reads) == 2


class FindsNothing(nn.Module):
    """A second head looks at what passes a threshold, which nothing of the example does."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 8, 3, padding=1)
        self.score, self.box = nn.Linear(8, 1), nn.Sequential(nn.Linear(8 * 16, 12), nn.ReLU(), nn.Linear(12, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        made = self.features(x)
        score = self.score(made.mean((2, 3))).sigmoid()
        found = torch.where(score[:, 0] > 1.0)[0]
        return score, self.box(made[found].flatten(start_dim=1)).reshape(len(found), 2, 2)


def test_a_head_that_is_given_nothing_is_cut_all_the_same() -> None:
    torch.manual_seed(0)
    report = cut(FindsNothing(), torch.randn(2, 3, 4, 4))
    channels = report.model.features.out_channels
    assert channels < 8 and report.model.box[0].in_features == channels * 16
    assert report.model.box(torch.randn(3, channels * 16)).shape == (3, 4)


class RotatesComplexPairs(nn.Module):
    """Queries and keys are pairs that are rotated as complex numbers, and divided by the root of their width."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.each = heads, width // heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        angles = torch.outer(torch.arange(9.0), 100.0 ** -torch.linspace(0, 1, self.each // 2))
        self.turns = torch.polar(torch.ones_like(angles), angles)

    def rotated(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.turns[: x.shape[1], None]).flatten(3).type_as(x)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, self.heads, self.each) for f in (self.q, self.k, self.v))
        q, k, v = (t.transpose(1, 2) for t in (self.rotated(q), self.rotated(k), v))
        attended = (q @ k.transpose(2, 3) / math.sqrt(self.each)).softmax(-1) @ v
        return x + self.out(attended.transpose(1, 2).contiguous().view(b, n, -1))


def test_the_scale_of_pairs_that_are_rotated_is_made_up_for() -> None:
    torch.manual_seed(0)
    report = cut(RotatesComplexPairs(), torch.randn(2, 5, 16))
    assert report.form == "module" and report.model.each < 8


class AmplifiesAttention(nn.Module):
    """Makes visible numbers of how weights are rounded that make up for a scale, too."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.inner, self.out = RotatesComplexPairs(), nn.Linear(16, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 3 * self.attention(x)
        return torch.sin(self.out(torch.tanh(self.inner(x)) + 3) * 3e3)


def test_weights_that_make_up_for_a_scale_are_rounded_in_double_precision_too() -> None:
    torch.manual_seed(0)
    report = cut(AmplifiesAttention(), torch.randn(2, 5, 16), form="module")
    assert report.form == "module" and report.check is not None
    assert report.check.rounding > report.check.tolerance > 10 * report.check.error > 1e-5


class StandardisesByNumbers(Amplifies):
    """The mean and deviation that it standardises by are numbers in its code, which single precision rounds."""

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = torch.tensor([0.485, 0.456] * 4), torch.as_tensor([0.229, 0.224] * 4, dtype=x.dtype)
        return super().forward((x - mean) / deviation) if x.abs().max() > 0 else x[:, :3]


def test_numbers_of_the_code_are_rounded_alike_in_both_that_are_compared() -> None:
    torch.manual_seed(0)
    report = cut(StandardisesByNumbers(), torch.randn(4, 8), 0.5)
    assert report.check is not None and report.check.rounding > report.check.tolerance > 1e3 * report.check.error


class TakesAny(nn.Module):
    """A forward that takes any number of inputs, and sees them in a shape that has their batch."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(6, 8) for _ in range(3))
        self.out = nn.Linear(8, 4)

    def forward(self, scale: Tensor, *given: Tensor, gain: float = 1.0) -> Tensor:
        summed = sum(part(x) for part, x in zip(self.parts, given, strict=True))
        return self.out(torch.relu(summed * scale * gain).view(summed.shape[0], 2, -1).flatten(1))


def test_a_graph_of_a_forward_that_takes_any_number_of_inputs_takes_other_batches() -> None:
    torch.manual_seed(0)
    model, inputs = TakesAny().eval(), (torch.rand(1), *(torch.randn(5, 6) for _ in range(3)))
    graph = depgraph.trace(model, inputs)
    plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.7), form="graph")
    report = plan.apply_with_report(form="graph")
    assert report.check.error < 1e-5
    assert report.model(torch.rand(1), *(torch.randn(9, 6) for _ in range(3))).shape == (9, 4)


class RotatesWhatIsSplitOff(nn.Module):
    """The last few of what one layer makes are seen in place as complex numbers, an odd number of places apart after some cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.wide, self.mix = nn.Linear(8, 16 + 4), nn.Linear(16, 12), nn.Linear(4, 12)
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        rest, pairs = self.both(x).split([self.both.out_features - 4, 4], -1)
        turned = torch.view_as_complex(pairs.reshape(*pairs.shape[:-1], 2, 2)) * torch.tensor([1j, -1j])
        return self.out(torch.relu(self.wide(rest)) * self.mix(torch.view_as_real(turned).flatten(-2)))


@pytest.mark.parametrize("rows", [1, 5])
def test_what_lies_between_complex_numbers_stays_even(rows: int) -> None:
    graph = depgraph.trace(RotatesWhatIsSplitOff().eval(), torch.randn(2, rows, 8))
    name = next(a.name for a in graph.axes if any(m.target == "wide.weight" and m.dim == 1 for m in a.members))
    for share in (0.95, 0.9, 0.8):
        plan = graph.plan(importance.Random(0), depgraph.Target(params=share), only=name, form="module")
        assert len(plan.removal[name]) % 2 == 0 and plan.apply_with_report().check.error < 1e-5
    odd = graph.cut_plan({name: [0, 3, 7]})
    with pytest.raises(CheckError, match="17 indices, no multiple of 2: torch sees pairs as complex numbers"):
        odd.apply(form="module")
    assert odd.apply_with_report(form="graph").check.error < 1e-5
