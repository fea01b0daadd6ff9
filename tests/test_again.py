"""What was cut in graph form is cut again like a module: by block, by recipes in steps, without blocks and branches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import depgraph
import importance
from depgraph.errors import CutError


class Folded(nn.Module):
    """A block whose code says in numbers how wide its MLP is."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.up(self.norm(x)).reshape(x.shape[0], -1, 24)
        return x + self.down(nn.functional.gelu(wide))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers, self.head = nn.Linear(4, 8), nn.ModuleList(Folded() for _ in range(4)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.drop = nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3, padding=1), nn.Dropout(0.1)
        self.second = nn.Conv2d(12, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.first(torch.relu(self.norm(x))).reshape(x.shape[0], 12, 6, 6)
        return x + self.drop(self.second(torch.relu(wide)))


class Named(nn.Module):
    """Blocks by name, of a convolutional network that asks for sizes of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.parts = nn.Conv2d(3, 8, 3), nn.ModuleDict({"left": Convolved(), "right": Convolved()})
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for part in self.parts.values():
            x = part(x)
        return self.head(x.mean((2, 3)))


INPUTS = {Stack: (3, 5, 4), Named: (3, 3, 8, 8)}


def dense(kind: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return kind().eval(), torch.randn(*INPUTS[kind])


def narrowed(kind: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    """A graph form of the model, without a fifth of its parameters."""
    model, x = dense(kind)
    plan = depgraph.trace(model, x).plan(importance.Magnitude(), depgraph.Target(params=0.8), form="graph")
    report = plan.apply_with_report(form="graph")
    assert isinstance(report.model, torch.fx.GraphModule)
    return report.model, x


@pytest.mark.parametrize("kind", [Stack, Named])
def test_a_graph_form_has_the_blocks_and_branches_of_its_module(kind: type[nn.Module]) -> None:
    model, x = dense(kind)
    whole, cut = depgraph.trace(model, x), depgraph.trace(copy.deepcopy(narrowed(kind)[0]), x)
    assert [block.name for block in whole.blocks] == [block.name for block in cut.blocks] != []
    assert [branch.name for branch in whole.branches] == [branch.name for branch in cut.branches] != []


class Wide(nn.Module):
    """A block as `Folded`, which asks how wide it is."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Blocks(nn.Module):
    """A stage."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Wide() for _ in range(number))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("form", ["module", "graph"])
def test_stages_whose_blocks_were_cut_unevenly_still_hold_these(form: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Blocks(3), Blocks(3)).eval(), torch.randn(2, 5, 8)
    graph = depgraph.trace(model, x)
    names = [block.name for block in graph.blocks]
    assert names == [f"{stage}.layers.{k}" for stage in range(2) for k in range(3)]
    removal = {a.name: range(1 + k) for k, a in enumerate(a for a in graph.axes if a.size == 24)}
    cut = graph.cut_plan(removal).apply(form=form)
    assert [block.name for block in depgraph.trace(cut, x).blocks] == names


def test_axes_of_the_first_block_of_a_graph_form_are_protected() -> None:
    whole, cut = (depgraph.trace(*found) for found in (dense(Stack), narrowed(Stack)))
    first = importance.allocations.first_and_last
    assert first(whole, 1, 0) == first(cut, 1, 0) == ("layers.0.up.weight:0",)


@pytest.mark.parametrize(("kind", "gone"), [(Stack, "layers.1"), (Named, "parts.left")])
def test_a_block_of_a_graph_form_is_left_out(kind: type[nn.Module], gone: str, tmp_path: Path) -> None:
    model, x = narrowed(kind)
    graph = depgraph.trace(model, x)
    block = next(block for block in graph.blocks if block.name == gone)
    report = graph.cut_plan(branches=[gone]).apply_with_report()
    assert report.check is not None and report.check.error < 1e-5 and report.check.sensitivity > 1e-3
    assert report.after.params == report.before.params - block.params
    assert not any(name.startswith(f"{gone}.") for name, _ in report.model.named_parameters())
    depgraph.save(report.model, tmp_path / "cut")
    loaded = depgraph.load(tmp_path / "cut", model=kind())
    assert torch.equal(loaded(x), report.model(x))
    names = [b.name for b in graph.blocks if b.name != gone]
    assert [block.name for block in depgraph.trace(loaded, x).blocks] == names
    again = depgraph.trace(loaded, x).plan(importance.Magnitude(), depgraph.Target(params=0.9)).apply_with_report()
    assert again.check is not None and again.check.error < 1e-5


def test_a_module_form_of_what_a_graph_form_leaves_out_is_refused() -> None:
    model, x = narrowed(Stack)
    with pytest.raises(CutError, match="form='graph'"):
        depgraph.trace(model, x).cut_plan(branches=["layers.1"]).apply(form="module")


def test_blocks_of_a_graph_form_are_scored_and_searched() -> None:
    model, x = narrowed(Stack)
    graph = depgraph.trace(model, x)
    scores = importance.depth.BlockInfluence([x, x + 1])(graph)
    assert list(scores) == ["layers.0", "layers.1", "layers.2", "layers.3"] and len(set(scores.values())) == 4
    order = importance.depth.Sleb([x, x + 1])(graph, 2)
    assert set(order.names) < set(scores)
    plan = graph.plan(scores, depgraph.Target(left_out=1), scope="depth")
    assert plan.branches == (min(scores, key=scores.__getitem__),)


@pytest.mark.ci
def test_a_recipe_in_steps_goes_on_where_a_step_took_the_graph_form() -> None:
    model, x = dense(Stack)
    batches = [torch.randn(3, 5, 4) for _ in range(2)]

    def loss(output: Any, batch: Any) -> Tensor:
        return output.square().mean()

    pruned = importance.recipes.adapt_pruner(batches, loss).prune(depgraph.trace(model, x), depgraph.Target(params=0.6))
    assert pruned.scheduled is not None and len(pruned.scheduled.steps) > 3
    assert isinstance(pruned.model, torch.fx.GraphModule)
    assert pruned.after.params <= 0.6 * depgraph.trace(model, x).dense_cost.params
    widths = {pruned.model.get_submodule(f"layers.{k}.up").weight.shape[0] for k in range(4)}
    assert len(widths) > 1 and max(widths) < 24
