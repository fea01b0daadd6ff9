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
    with pytest.raises(CheckError, match="no graph form: what was captured of it is off by .*plan with form=.module."):
        plan.apply(form="graph")
    assert plan.apply().first.out_features == 10


class Filled(nn.Module):
    """Writes into every second place of tensors, which aren't every second any more once one goes."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 12), norm(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        made = torch.zeros_like(hidden)
        made[:, ::2] = hidden[:, ::2].tanh()
        odd = made[:, 1::2]
        odd.add_(hidden[:, 1::2]).mul_(2)
        found: Tensor = self.last(self.norm(made))
        return found


@pytest.mark.parametrize("norm", [nn.Identity, nn.RMSNorm])
def test_what_is_written_through_a_view_whose_places_are_no_view_any_more_gets_there(norm: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = Filled(norm).eval(), torch.randn(5, 6)
    graph = depgraph.trace(model, x)
    plan = graph.cut_plan({axis.name: [1] for axis in graph.axes if axis.prunable.any()})
    report = plan.apply_with_report(form="graph")
    assert report.check.error < 1e-5 < report.check.sensitivity
    stays = torch.tensor([k for k in range(12) if k not in _gone(plan, "first.weight")])
    with torch.no_grad():
        hidden = model.first(x)
        made = torch.stack([hidden[:, ::2].tanh(), hidden[:, 1::2] * 2], 2).flatten(1)[:, stays]
        normed = made if norm is nn.Identity else nn.functional.rms_norm(made, (len(stays),), model.norm.weight[stays])
        assert torch.allclose(report.model(x), normed @ model.last.weight[:, stays].T + model.last.bias, atol=1e-5)


def _gone(plan: depgraph.Plan, name: str) -> set[int]:
    return {index for removed in plan.removed() if removed.target == name for index in removed.indices}
