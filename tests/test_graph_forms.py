"""What a graph form must be: the model that was traced, in the modes of its modules, call after call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import depgraph
from depgraph.errors import CheckError, CutError


def test_modules_that_are_frozen_stay_so() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
    model, x = nn.Sequential(*layers).train(), torch.randn(4, 3, 8, 8)
    model[1].eval(), model[5].eval()
    plan = depgraph.trace(model, x).cut_plan({"0.weight:0": [1, 3]})
    pruned = plan.apply(form="graph")
    assert torch.allclose(pruned(x), plan.apply(form="module")(x), atol=1e-5)
    before = {name: buffer.clone() for name, buffer in pruned.named_buffers()}
    assert torch.equal(pruned(x), pruned(x))
    moved = [name for name, buffer in pruned.named_buffers() if not torch.equal(before[name], buffer)]
    assert moved and all(name.startswith("4.") for name in moved)
    pruned.train()
    assert not torch.equal(pruned(x), pruned(x))


class Shuffled(nn.Module):
    """Puts channels into an order that is drawn in each run, anew from one seed or not."""

    def __init__(self, *, seeded: bool) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 12), nn.Linear(12, 16), nn.Linear(16, 3)
        self.seeded, self.source = seeded, torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        source = torch.Generator().manual_seed(5) if self.seeded else self.source
        order = torch.randperm(12, generator=source)
        found: Tensor = self.last(self.second(self.first(x)[:, order]).relu())
        return found


def test_numbers_that_are_seeded_in_each_run_have_no_graph_form() -> None:
    model, x = Shuffled(seeded=True).eval(), torch.randn(5, 6)
    plan = depgraph.trace(model, x).cut_plan({"second.weight:0": [1, 2]})
    with pytest.raises(
        CutError, match=r"seeds a generator in each run at .*test_graph_forms.py:\d+, which a graph can't"
    ):
        plan.apply(form="graph")
    pruned = plan.apply()
    assert pruned.second.out_features == 14 and torch.equal(pruned(x), pruned(x))


def test_numbers_that_are_drawn_on_and_on_have_one() -> None:
    model, x = Shuffled(seeded=False).eval(), torch.randn(5, 6)
    pruned = depgraph.trace(model, x).cut_plan({"second.weight:0": [1, 2]}).apply(form="graph", check="none")
    assert not torch.equal(pruned(x), pruned(x))


class Asking(nn.Module):
    """Computes something else while it is captured."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden = hidden.relu() if torch.compiler.is_compiling() else hidden.tanh()
        found: Tensor = self.last(hidden)
        return found


def test_a_model_that_is_another_while_it_is_captured_has_no_graph_form() -> None:
    plan = depgraph.trace(Asking().eval(), torch.randn(5, 6)).cut_plan({"first.weight:0": [1, 2]})
    with pytest.raises(CheckError, match="no graph form: what was captured of it is off by"):
        plan.apply(form="graph")
    assert plan.apply().first.out_features == 10
