"""Code that divides by a number of features which one weight makes for both sides of a product, or which choices also read."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph


class Correlates(nn.Module):
    """All pairs of places of two images, whose features one convolution makes, over the root of how many these are."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.features = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 1)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        both = self.features(self.stem(torch.cat([first, second])).relu())
        a, b = (t.flatten(2) for t in both.split(len(first)))
        pairs = a.transpose(1, 2) @ b / math.sqrt(a.shape[1])
        return self.head(pairs.view(len(first), *first.shape[2:], -1).permute(0, 3, 1, 2))


class Gram(nn.Module):
    """The products of all features with each other, over how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Linear(5, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        return self.head(features @ features.transpose(1, 2) / features.shape[-1])


class Sparse(nn.Module):
    """Attention of those queries that stand out; the order of how far they do is all that is used of the scores."""

    def __init__(self, width: int = 24, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (p(x).view(batch, length, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1)
        chosen = (scores.max(-1)[0] - scores.sum(-1) / length).topk(3, sorted=False)[1]
        rows = chosen[..., None].expand(-1, -1, -1, q.shape[-1])
        weights = (q.gather(2, rows) @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        mean = v.mean(2, keepdim=True).expand(-1, -1, length, -1)
        mixed = mean.scatter(2, chosen[..., None].expand(-1, -1, -1, v.shape[-1]), weights @ v)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, -1))


class Shared(nn.Module):
    """Attention whose queries are its keys, these over their lengths."""

    def __init__(self, width: int = 24, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qk, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qk, v = (p(x).view(batch, length, self.heads, -1).transpose(1, 2) for p in (self.qk, self.v))
        keys = qk / (qk.norm(dim=-1, keepdim=True) + 1e-6)
        scores = torch.einsum("bhid,bhjd->bhij", qk, keys) * qk.shape[-1] ** -0.5
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1))


class Normalised(Shared):
    """The same, with a length that is kept from zero."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qk, v = (p(x).view(batch, length, self.heads, -1).transpose(1, 2) for p in (self.qk, self.v))
        scores = qk @ F.normalize(qk, dim=-1).transpose(-2, -1) / math.sqrt(qk.shape[-1])
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1))


class InPlace(nn.Module):
    """Attention that divides its scores where they lie."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        scores = (q @ k.transpose(1, 2)).div_(math.sqrt(q.shape[-1]))
        return self.out(scores.softmax(-1) @ v)


CASES = {
    "correlation": (Correlates, (torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)), "features.weight"),
    "gram": (Gram, (torch.randn(2, 4, 5),), "features.weight"),
    "sparse": (Sparse, (torch.randn(2, 9, 24),), "k.weight"),
    "shared": (Shared, (torch.randn(2, 9, 24),), "qk.weight"),
    "normalised": (Normalised, (torch.randn(2, 9, 24),), "qk.weight"),
    "in place": (InPlace, (torch.randn(2, 9, 24),), "q.weight"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_divisor_is_made_up_for_in_the_weight(name: str) -> None:
    torch.manual_seed(0)
    make, inputs, target = CASES[name]
    graph = depgraph.trace(make().eval(), inputs)
    axes = [a for a in graph.axes if any(m.target == target and m.dim == 0 for m in a.members)]
    axis = max(axes, key=lambda a: a.size)
    report = graph.cut_plan({axis.name: [0, 2, 3]}).apply_with_report(form="module")
    assert report.check is not None and not report.check.vacuous and report.check.error < 1e-5


class ByNumber(nn.Module):
    """The same number is a size of a view and what its scores are divided by."""

    def __init__(self, width: int = 24, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.dim = heads, width // heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / self.dim).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, -1))


def test_a_number_may_be_a_size_and_a_divisor() -> None:
    torch.manual_seed(0)
    graph = depgraph.trace(ByNumber().eval(), torch.randn(2, 9, 24))
    axes = [a for a in graph.axes if any(m.target == "qkv.weight" for m in a.members) and a.size == 12]
    report = graph.cut_plan({axis.name: [1, 2, 3] for axis in axes}).apply_with_report(form="module")
    assert report.model.dim == 9
    assert report.check is not None and report.check.error < 1e-5 < report.check.sensitivity


class Maps(nn.Module):
    """Attention over a picture as autoencoders have it: the number of channels is made whole before the root is taken."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        b, c, h, w = q.shape
        weights = torch.bmm(q.reshape(b, c, h * w).permute(0, 2, 1), k.reshape(b, c, h * w))
        weights = (weights * (int(c) ** (-0.5))).softmax(2)
        return x + self.out(torch.bmm(v.reshape(b, c, h * w), weights.permute(0, 2, 1)).reshape(b, c, h, w))


def test_a_number_that_int_makes_ordinary_is_made_up_for() -> None:
    torch.manual_seed(0)
    graph = depgraph.trace(Maps().eval(), torch.randn(2, 16, 3, 4) * 3)
    report = graph.cut_plan({"q.weight:0": range(6), "v.weight:0": range(6)}).apply_with_report(form="module")
    assert report.check is not None and report.check.error < 1e-5 < report.check.sensitivity


class Rooted(ByNumber):
    """The root is numpy's."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / np.sqrt(k.size(-1))).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, -1))


def test_a_root_that_numpy_takes_is_made_up_for() -> None:
    torch.manual_seed(0)
    graph = depgraph.trace(Rooted().eval(), torch.randn(2, 9, 24))
    axes = [a for a in graph.axes if any(m.target == "qkv.weight" for m in a.members) and a.size == 12]
    report = graph.cut_plan({axis.name: [1, 2, 3] for axis in axes}).apply_with_report(form="module")
    assert report.check is not None and report.check.error < 1e-5 < report.check.sensitivity


class AlsoRead(Shared):
    """Reads its queries in another way beside the scores: no factor on them goes unseen."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.qk(x).tanh()


def test_what_else_reads_the_rows_keeps_them_as_they_are() -> None:
    torch.manual_seed(0)
    graph = depgraph.trace(AlsoRead().eval(), torch.randn(2, 9, 24))
    axes = [a for a in graph.axes if any(m.target == "qk.weight" and m.dim == 0 for m in a.members)]
    for axis in (a for a in axes if a.prunable.any()):
        report = graph.cut_plan({axis.name: [0]}).apply_with_report()
        assert report.check is not None and report.check.error < 1e-5
