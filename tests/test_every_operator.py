"""Every operator that torch tests itself, with its own samples, in the middle of a small network: what may be cut there is cut right."""

from __future__ import annotations

import sys
import unittest
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import depgraph
from depgraph.errors import CaptureError, CheckError, CutError

pytestmark = pytest.mark.slow
SAMPLES, LOOKED_AT, PARTS = 3, 40, 8
RANDOM = "draws random numbers"
REFUSED = {
    "__getitem__": "lists of places, given to the method itself, become others in torch.export",
    "argwhere": "how many places there are is computed from values",
    "histogramdd": "torch.export can't capture it",
    "nonzero": "how many places there are is computed from values",
    "unique": "how many numbers there are is computed from values",
    "unique_consecutive": "how many numbers there are is computed from values",
    "linalg.lstsq": "its residuals have no dims where there are none",
    "linalg.lstsq.grad_oriented": "its residuals have no dims where there are none",
}
"""Operators of which a cut may be refused, and why; nowhere may one be wrong."""


class Between(nn.Module):
    """An operator whose tensors are mixed along each of their dims before, and along those of what it makes behind."""

    def __init__(self, operator: Any, sample: Any) -> None:
        super().__init__()
        self.operator = operator
        leaves, self.spec = pytree.tree_flatten(((sample.input, *sample.args), dict(sample.kwargs)))
        moved = [k for k, leaf in enumerate(leaves) if _is_mixed(leaf)]
        self.fixed = [
            None if k in moved else pytree.tree_map_only(Tensor, Tensor.detach, x) for k, x in enumerate(leaves)
        ]
        self.inputs = {k: leaves[k].detach().clone() for k in moved}
        for k, tensor in self.inputs.items():
            self._hold(f"in{k}", tensor.shape, 0.05)
        with torch.no_grad():
            for k, made in enumerate(self._made(*self.inputs.values())):
                self._hold(f"out{k}", made.shape, 0.1)

    def _hold(self, name: str, shape: torch.Size, much: float) -> None:
        for d, size in enumerate(shape):
            if size > 1:
                self.register_parameter(f"{name}_{d}", nn.Parameter(torch.eye(size) + much * torch.rand(size, size)))

    def _mixed(self, x: Tensor, name: str) -> Tensor:
        for d in range(x.ndim):
            if hasattr(self, f"{name}_{d}"):
                x = (x.movedim(d, -1) @ getattr(self, f"{name}_{d}")).movedim(-1, d)
        return x

    def _made(self, *given: Tensor) -> list[Tensor]:
        leaves = list(self.fixed)
        for k, x in zip(self.inputs, given, strict=True):
            leaves[k] = self._mixed(x, f"in{k}")  # type: ignore[call-overload]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        made = pytree.tree_leaves(self.operator(*args, **kwargs))
        return [torch.view_as_real(t) if t.is_complex() else t for t in made if isinstance(t, Tensor)]

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        made = [t if t.is_floating_point() else t.float() for t in self._made(*given)]
        return tuple(self._mixed(t, f"out{k}") for k, t in enumerate(made))


def _is_mixed(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 0 and leaf.numel() > 1


def operators() -> list[Any]:
    """torch's own table, without what takes no floats and what leaves memory as it finds it."""
    sys.modules.setdefault("expecttest", SimpleNamespace(TestCase=unittest.TestCase))  # type: ignore[arg-type]
    from torch.testing._internal.common_methods_invocations import op_db  # takes seconds

    unset = ("empty", "new_empty", "resize")
    return [i for i in op_db if i.supports_dtype(torch.float32, "cpu") and not i.name.startswith(unset)]


def networks(info: Any) -> Iterator[tuple[int, Between]]:
    """Networks around the first samples that give finite numbers, the same each time."""
    torch.manual_seed(0)
    found = 0
    for number, sample in enumerate(info.sample_inputs("cpu", torch.float32)):
        if found == SAMPLES or number == LOOKED_AT:
            return
        try:
            network = Between(info.op, sample).eval()
            with torch.no_grad():
                first, second = network(*network.inputs.values()), network(*network.inputs.values())
            finite = all(bool(t.isfinite().all()) for t in first) and any(t.numel() for t in first)
        except Exception:  # what torch itself refuses
            continue
        if network.inputs and finite and all(map(torch.equal, first, second)):
            found += 1
            yield number, network


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(PARTS))
def test_what_may_go_around_an_operator_goes(part: int) -> None:
    wrong, tried = {}, 0
    for info in operators()[part::PARTS]:
        name = f"{info.name}.{info.variant_test_name}".rstrip(".")
        for sample, network in networks(info):
            tried += 1
            try:
                _cut_each(network)
            except CheckError as error:
                if RANDOM not in str(error) and "nothing but NaN" not in str(error):
                    wrong[name, sample] = str(error)
            except (CaptureError, CutError) as error:
                if name not in REFUSED:
                    wrong[name, sample] = str(error)
    assert not wrong
    assert tried > 100


def _cut_each(network: Between) -> None:
    """Take a third of each axis, by itself."""
    graph, rng = depgraph.trace(network, tuple(network.inputs.values())), np.random.default_rng(0)
    for axis in graph.axes:
        free = rng.permutation(np.flatnonzero(axis.prunable))[: max(1, axis.size // 3)]
        if 0 < len(free) < axis.size:
            graph.cut_plan({axis.name: sorted(free.tolist())}).apply_with_report()
