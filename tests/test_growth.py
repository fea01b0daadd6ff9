"""Work that grows no faster than the model, whatever its shape: calls are counted, not seconds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import depgraph
import importance
from depgraph.cutting.settling import Settler, inexpressible
from depgraph.cutting.ties import find_ties
from depgraph.dependency import DependencyGraph
from depgraph.describing import describe
from depgraph.graph import Value
from depgraph.joins import Flow
from depgraph.layers import Anatomy
from depgraph.patterns import Matcher

LINEAR = 2.5  # how often more is done for twice the size, at the most


class Summed(nn.Module):
    """The sum of many branches of one stream, which nothing else reads before the last."""

    def __init__(self, branches: int) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8)) for _ in range(branches)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        found = x
        for branch in self.branches:
            found = found + branch(x).tanh()
        return found


class Averaged(nn.Module):
    """Each layer reads the mean of all before it."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for layer in self.layers:
            seen.append(torch.relu(layer(sum(seen) / len(seen))))
        return sum(seen)


def _traced(branches: int) -> DependencyGraph:
    return depgraph.trace(Summed(branches).eval(), torch.randn(2, 4), free=["output 0"])


def _counted(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, work: Callable[[], Any]) -> int:
    """How often a method is called, or a property asked for, while `work` is done."""
    calls = 0
    own = owner.__dict__[name]

    def counting(self: Any, *given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return own.fget(self) if isinstance(own, property) else own(self, *given, **named)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, property(counting) if isinstance(own, property) else counting)
        work()
    return calls


def _growth(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, work: Callable[[DependencyGraph], Any]) -> float:
    """How much more often that is for twice as many branches."""
    few, many = _traced(20), _traced(40)
    small = _counted(monkeypatch, owner, name, lambda: work(few))
    return _counted(monkeypatch, owner, name, lambda: work(many)) / small


def test_branches_of_a_long_sum_are_each_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _growth(monkeypatch, Flow, "between", lambda graph: graph.branches) < LINEAR


def test_branches_of_a_sum_of_hundreds_of_terms_are_found() -> None:
    graph = _traced(520)
    assert len(graph.branches) == 520


def test_what_one_axis_needs_of_the_code_is_asked_of_what_it_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _growth(monkeypatch, Value, "dims", inexpressible) < LINEAR


class _Chunked(nn.Module):
    """Blocks each of which has ties of its own: the equal parts of a chunk."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.wide = nn.ModuleList(nn.Linear(8, 24) for _ in range(blocks))
        self.narrow = nn.ModuleList(nn.Linear(12, 8) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for wide, narrow in zip(self.wide, self.narrow, strict=True):
            value, gate = wide(x).chunk(2, dim=-1)
            x = x + narrow(value.tanh() * gate)
        return x


def test_what_ties_an_axis_is_looked_for_among_its_own_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for blocks in (8, 16):
        graph = depgraph.trace(_Chunked(blocks).eval(), torch.randn(2, 8))
        assert len(find_ties(graph.sizes)) >= blocks
        counts.append(_counted(monkeypatch, Settler, "_gap", lambda graph=graph: inexpressible(graph)))
    assert counts[1] <= LINEAR * counts[0]


def test_ties_that_undo_one_another_are_mended_until_numbers_come_again() -> None:
    settler = object.__new__(Settler)
    settler.ties, rounds = [None] * 500, []

    def mend(k: int, counts: dict[str, int], direction: int, steps: dict[str, int]) -> bool:
        counts["axis"] = 1 - counts["axis"]
        return True

    def broken(counts: dict[str, int]) -> list[int]:
        rounds.append(counts["axis"])
        return [0]

    settler._mend, settler.broken = mend, broken
    for count, after in ((500, 0), (501, 1)):
        settler.ties = [None] * count
        rounds.clear()
        assert settler._settle({"axis": 0}, (1, -1), {}) == {"axis": after}  # as after so many rounds and eight more
        assert len(rounds) < 6


def test_what_is_read_elsewhere_is_tried_from_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = [depgraph.trace(Averaged(layers).eval(), torch.randn(2, 8), free=["output 0"]) for layers in (10, 20)]
    joins = [len(Flow(graph).joins) for graph in graphs]
    calls = [_counted(monkeypatch, Flow, "between", lambda graph=graph: graph.branches) for graph in graphs]
    assert calls[1] / calls[0] < 1.2 * joins[1] / joins[0]


def test_scores_look_up_single_weights_without_listing_all(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = []
    for branches in (10, 20):
        graph, recipe = _traced(branches), importance.recipes.obs([torch.randn(6, 4)])
        prune = partial(recipe.prune, graph, depgraph.Target(params=0.7))
        listed.append(_counted(monkeypatch, DependencyGraph, "held", prune))
    assert listed[0] == listed[1]


def test_a_tensor_by_name_is_that_among_all() -> None:
    graph = _traced(2)
    assert all(graph.tensor(name) is tensor for name, tensor in graph.tensors().items())
    with pytest.raises(KeyError):
        graph.tensor("branches.0.0.none")
    with pytest.raises(KeyError):
        graph.tensor("nowhere.weight")


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("both", [True, False])
def test_a_recurrent_layer_is_not_stepped_through(
    kind: Any, first: bool, both: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its outputs have the layout that torch gives them, and looking at 40 steps costs no more than at 4."""
    layer = kind(4, 6, 2, batch_first=first, bidirectional=both).eval()
    counts = []
    for steps in (4, 40):
        x = torch.randn(*((3, steps, 4) if first else (steps, 3, 4)))
        counts.append(_counted(monkeypatch, torch._ops.OpOverload, "__call__", partial(depgraph.trace, layer, x)))
        made = next(n.meta["val"] for n in depgraph.trace(layer, x).nodes if n.name == "getitem")
        assert (made.shape, made.stride()) == (layer(x)[0].shape, layer(x)[0].stride())
    assert counts[0] == counts[1]


class _Again(nn.Module):
    """One block, applied again and again."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(self.times):
            x = self.block(x)
        return self.head(x)


def test_sizes_of_a_block_that_is_applied_again_are_bent_once() -> None:
    few, many = (depgraph.trace(_Again(times).eval(), torch.randn(2, 4, 6)) for times in (4, 16))
    assert len(find_ties(few.sizes)) == len(find_ties(many.sizes))


def test_patterns_are_sorted_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(graph: DependencyGraph) -> None:
        names = [axis.name for axis in graph.axes]
        graph.plan(importance.Magnitude(), depgraph.Target(params=0.8), only=names, floor=dict.fromkeys(names, 0.2))

    assert _growth(monkeypatch, Matcher, "__init__", plan) < LINEAR
    assert _growth(monkeypatch, Matcher, "__call__", plan) < LINEAR


def test_roles_are_found_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _growth(monkeypatch, Anatomy, "class_of", lambda graph: describe(Anatomy(graph))) < LINEAR
