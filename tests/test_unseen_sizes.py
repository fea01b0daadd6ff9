"""Sizes that the code of an unseen model compares, or that only fit together: what can be cut in the module is, the rest stays whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
import exporters
import importance
from depgraph import choosing, planning
from tests.test_unseen import cut


class Turned(nn.Module):
    """Attention whose queries and keys are rotated by angles in a plane; the table asserts that it fits its options."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.dim = heads, width // heads
        self.patch, self.qkv, self.out = nn.Linear(6, width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("periods", 100.0 ** (torch.arange(self.dim // 4) / (self.dim // 4)), persistent=False)
        self.readout = nn.Linear(width, 3)

    def angles(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        assert self.periods.numel() == self.dim // 4
        places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1).view(-1, 2)
        turned = (places[:, :, None] / self.periods).flatten(1).repeat_interleave(2, -1)
        return turned.sin(), turned.cos()

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        x = self.patch(x).flatten(1, 2)
        q, k, v = self.qkv(x).reshape(batch, height * width, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        sin, cos = self.angles(height, width)
        q, k = (t * cos + torch.stack((-t[..., 1::2], t[..., ::2]), -1).flatten(-2) * sin for t in (q, k))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, height * width, -1)
        return self.readout((x + self.out(attended)).mean(1))


def test_an_option_that_is_only_compared_follows_the_table() -> None:
    torch.manual_seed(0)
    graph = depgraph.trace(Turned().eval(), torch.randn(2, 3, 4, 6))
    pairs = next(a for a in graph.axes if any(m.target == "periods" for m in a.members))
    report = graph.cut_plan({pairs.name: [1]}).apply_with_report()
    assert report.form == "module" and report.check is not None and not report.check.vacuous
    assert report.model.dim // 4 == len(report.model.periods) < len(graph.model.periods)
    assert report.model.dim % 4 == 0


class Sections(nn.Module):
    """Parts of uneven sizes that are convolved in turn; then attention over channels, whose heads take all of them up."""

    def __init__(self, width: int = 22, heads: int = 2, parts: int = 3) -> None:
        super().__init__()
        self.heads, self.parts = heads, parts
        self.patch = nn.Linear(6, width)
        self.mixed = nn.ModuleList(nn.Linear(-(-width // parts), -(-width // parts)) for _ in range(parts - 1))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.temperature = nn.Parameter(torch.rand(heads, 1, 1) + 0.5)
        self.up, self.down, self.readout = nn.Linear(width, 64), nn.Linear(64, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        part, *others = self.patch(x).chunk(self.parts, -1)
        made = [part := self.mixed[0](part)]
        for mixed, other in zip(self.mixed[1:], others, strict=False):
            made.append(part := mixed(part + other))
        x = torch.cat([*made, others[-1]], -1)
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 4, 1).unbind(0)
        attended = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.temperature).softmax(-1) @ v
        x = x + self.out(attended.permute(0, 3, 1, 2).reshape(batch, tokens, width))
        return self.readout((x + self.down(self.up(x).relu())).mean(1))


def test_form_module_leaves_whole_what_does_not_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (planning, choosing):  # each axis can lose a group by itself, which tells nothing about several
        monkeypatch.setattr(module, "inexpressible", lambda graph: frozenset())
    monkeypatch.setitem(
        planning._ATTEMPTS, "module", (choosing.Attempt(settle=False, pin=True),)
    )  # nor can sizes be bent
    torch.manual_seed(0)
    graph = depgraph.trace(Sections().eval(), torch.randn(2, 5, 6))
    plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.7), form="module")
    report = plan.apply_with_report(form="module")
    assert report.check is not None and not report.check.vacuous
    assert plan.cost().params <= 0.7 * graph.dense_cost.params
    assert report.model.up.out_features < 64


class Products(nn.Module):
    """Attention and a readout whose sizes are products that numpy takes of other sizes."""

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(3)), nn.Linear(width, width)
        self.readout = nn.Linear(5 * width, 3)

    def split(self, x: Tensor, shape: list[int]) -> Tensor:
        assert shape.count(-1) <= 1
        shape[shape.index(-1)] = int(x.size(-1) / -np.prod(shape))
        return x.view(*x.size()[:-1], *shape)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(part(x), [self.heads, -1]).transpose(1, 2) for part in self.qkv)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        states = torch.relu(self.out(mixed))
        return self.readout(states.reshape([states.shape[0], int(np.prod(states.shape[1:]))]))


@pytest.mark.parametrize("target", ["qkv.2.weight", "out.weight"])
def test_products_that_numpy_takes_of_sizes_follow_the_cut(target: str) -> None:
    torch.manual_seed(0)
    graph = depgraph.trace(Products().eval(), torch.randn(2, 5, 24))
    axes = [a for a in graph.axes if any(m.target == target and m.dim == 0 for m in a.members) and a.prunable.any()]
    plan = graph.cut_plan({max(axes, key=lambda a: a.size).name: [0, 1]})
    report = plan.apply_with_report(form="module")
    assert report.check is not None and report.check.error < 1e-5 < report.check.sensitivity
    assert type(np.prod([2, 3])) is np.int64


class TokensAsChannels(nn.Module):
    """Tokens are mixed by a convolution with windows of one place, over which features lie (Liu et al., "Pay Attention to MLPs")."""

    def __init__(self, mix: Callable[[], nn.Module], width: int = 16) -> None:
        super().__init__()
        self.into, self.norm, self.mix = nn.Linear(4, 2 * width), nn.LayerNorm(width), mix()
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        kept, gate = F.gelu(self.into(x)).chunk(2, dim=-1)
        return self.out(kept * self.mix(self.norm(gate)))


MIXES: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Conv1d(6, 6, 1),
    "transposed": lambda: nn.ConvTranspose1d(6, 6, 1),
    "groups": lambda: nn.Conv1d(6, 6, 1, groups=2),
}


@pytest.mark.parametrize("mix", MIXES)
def test_features_pass_a_convolution_over_tokens(mix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, example = TokensAsChannels(MIXES[mix]).eval(), torch.randn(2, 6, 4)
    report = cut(model, example)
    assert report.form == "module" and report.model.out.in_features < 16
    assert report.model.mix.weight.shape == model.mix.weight.shape
    exporters.to_onnx(report.model, (example,), tmp_path / "m.onnx")
    file = depgraph.trace(tmp_path / "m.onnx")
    again = file.plan(importance.Magnitude(), depgraph.Target(params=0.8)).apply_with_report()
    assert again.after.params < again.before.params and again.check.error < 1e-4


def padded(hidden: Tensor, size: int) -> Tensor:
    return F.pad(hidden, (0, size - hidden.shape[-1])) if hidden.shape[-1] < size else hidden


def padded_by_what_lacks(hidden: Tensor, size: int) -> Tensor:
    return F.pad(hidden, (0, max(0, size - hidden.shape[-1])))


def cut_off(hidden: Tensor, size: int) -> Tensor:
    return hidden if size >= hidden.shape[-1] else hidden[..., :size] * 2


class Fits(nn.Module):
    """Makes features fit a width that it declares, which they have already."""

    def __init__(self, fit: Callable[[Tensor, int], Tensor], width: int = 16) -> None:
        super().__init__()
        self.width, self.fit = width, fit
        self.into, self.out = nn.Linear(8, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fit(torch.relu(self.into(x)), self.width))


@pytest.mark.parametrize("fit", [padded, padded_by_what_lacks, cut_off])
def test_a_width_that_sizes_are_held_against_follows(fit: Callable[[Tensor, int], Tensor]) -> None:
    torch.manual_seed(0)
    report = cut(Fits(fit), torch.randn(4, 8))
    assert report.form == "module" and report.model.out.in_features < 16
    assert report.model.width == {padded: report.model.out.in_features, cut_off: 16}.get(fit, report.model.width)


class GatesByKeys(nn.Module):
    """Attention over the root of its width, whose queries and keys also make a gate: no weight can make up for another root."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.q, self.k, self.v, self.gate = (nn.Linear(8, width) for _ in range(4))
        self.turn, self.out = nn.Linear(2 * width, width), nn.Linear(width, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 256), nn.GELU(), nn.Linear(256, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(x)
        q, k, v = self.q(x), self.k(x), self.v(x)
        attended = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        return self.out(attended * torch.sigmoid(self.turn(torch.cat([q, k], -1))))


@pytest.mark.parametrize("form", ["module", "auto"])
def test_what_no_weight_makes_up_for_stays_whole_in_plans_for_the_module(form: str) -> None:
    torch.manual_seed(0)
    graph = depgraph.trace(GatesByKeys().eval(), torch.randn(2, 5, 8))
    plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.7), scope="axis", form=form)
    report = plan.apply_with_report(form=form)
    assert report.form == "module" and report.check.error < 1e-5 < report.check.sensitivity
    assert report.model.q.out_features == 16 > report.model.out.in_features
