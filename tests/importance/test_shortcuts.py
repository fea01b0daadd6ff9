"""SliceGPT as published: a basis for every normalisation, and products where a stream passes from one to the next."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
import exporters
import importance
from depgraph.errors import CheckpointError, RotationError
from importance import recipes
from importance.rotation import Rotation, principal, rotate
from importance.shortcuts import with_shortcuts
from tests.importance.test_rotation import NORMS, WIDTH, WORDS, Block, Words, apart, batches, layer_norm

EACH = Rotation(bases="each", damping=0)


@pytest.fixture(autouse=True)
def _seed() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def traced(model: nn.Module) -> tuple[depgraph.DependencyGraph, list[Tensor]]:
    data = batches()
    return depgraph.trace(model.double().eval(), (data[0],)), data


@pytest.mark.parametrize("norm", ["rms", "layer norm", "without a scale"])
def test_every_normalisation_has_a_basis_and_products_lie_between(norm: str) -> None:
    graph, data = traced(Words(NORMS[norm], tied=True))
    found = rotate(graph, data, how=EACH)
    assert apart(graph.model, found.model, data[1]) < 1e-8
    first, second, last = found.bases.values()  # of two blocks and of the last norm
    for turn in (first, second, last):
        assert torch.allclose(turn.T @ turn, torch.eye(WIDTH, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(found.model.get_parameter("product_0.weight"), second.T @ first, atol=1e-12)
    assert torch.allclose(found.model.get_parameter("product_1.weight"), last.T @ second, atol=1e-12)
    assert not torch.allclose(first, second, atol=0.1)
    assert found.notes == ("head.weight is a weight of its own now: what it was tied to has another basis",)


class PostNorm(Words):
    """Norms after the additions; the last hidden states are put out."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.table(ids) + self.positions)
        for block in self.blocks:
            x = block.norm(x + block.down(block.up(x).relu()))
        return x


class Sandwich(Words):
    """A norm before and one after every branch."""

    def __init__(self) -> None:
        super().__init__(layer_norm)
        self.after = nn.ModuleList(layer_norm() for _ in self.blocks)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.positions
        for block, after in zip(self.blocks, self.after, strict=True):
            x = x + after(block.down(block.up(block.norm(x)).relu()))
        return self.head(self.norm(x))


class Squashed(Words):
    """Something is done to every channel of the stream at first."""

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.table(ids) + self.positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Waves(Words):
    """Positions are computed from a parameter, and not linear in it."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + torch.sin(self.positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Shared(Words):
    """One block, three times."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.positions
        for _ in range(3):
            x = self.blocks[0](x)
        return self.head(self.norm(x))


class InPlace(Words):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.positions
        for block in self.blocks:
            x += block.down(block.up(block.norm(x)).relu())
        return self.head(self.norm(x))


@pytest.mark.parametrize(
    ("build", "bases", "products"),
    [
        (lambda: Words(layer_norm).requires_grad_(False), 3, 2),
        (lambda: PostNorm(layer_norm), 3, 3),
        (Sandwich, 5, 4),
        (Squashed, 2, 2),
        (Waves, 3, 3),
        (Shared, 1, 0),
        (InPlace, 1, 0),
    ],
    ids=["frozen", "post-norm", "sandwich", "squashed", "waves", "shared", "in place"],
)
def test_streams_of_all_kinds_are_parted(build: Callable[[], nn.Module], bases: int, products: int) -> None:
    graph, data = traced(build())
    found = rotate(graph, data, how=EACH)
    assert apart(graph.model, found.model, data[1]) < 1e-8
    held = [name for name, _ in found.model.named_parameters() if name.startswith("product_")]
    assert (len(found.bases), len(held)) == (bases, products)
    plan = graph_plan(found)
    report = plan.apply_with_report()
    assert report.check is not None and report.check.error < 1e-9 < report.check.sensitivity


def graph_plan(found: Any) -> depgraph.Plan:
    plan: depgraph.Plan = found.graph.cut_plan({axis: range(WIDTH - 3, WIDTH) for axis in found.axes})
    return plan


def test_a_sliced_model_is_checked_saved_loaded_and_exported(tmp_path: Path) -> None:
    model = Words(tied=True).eval()
    graph, data = depgraph.trace(model, (batches()[0],)), batches()
    done = recipes.slicegpt_shortcuts(data).prune(graph, depgraph.Target(params=0.8))
    assert done.plan is not None and done.report is not None and done.report.check is not None
    assert done.report.check.error < 1e-5 < done.report.check.sensitivity
    params = sum(p.numel() for p in done.model.parameters())
    assert params == done.report.after.params <= 0.8 * graph.dense_cost.params
    widths = [WIDTH - len(groups) for groups in done.plan.removal.values()]
    assert len(widths) == 3 and max(widths) - min(widths) <= 1
    assert done.model.get_parameter("product_0.weight").shape[1] == done.model.get_parameter("table.weight").shape[1]
    saved = depgraph.save(done.model, tmp_path / "sliced")
    assert (saved.format, saved.why) == ("depgraph", "it is cut as a graph")
    again = depgraph.load(tmp_path / "sliced", model=Words(tied=True))
    assert apart(done.model, again, data[1]) == 0
    with pytest.raises(CheckpointError, match="doesn't fit|which was saved"):
        depgraph.load(tmp_path / "sliced", model=nn.Sequential(nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)))
    made = exporters.to_onnx(done.model, (data[0],), tmp_path / "sliced.onnx")
    assert made.path.is_file() and made.max_rel_error < 1e-5
    assert model.head.weight is model.table.weight


def test_what_lies_in_few_directions_is_cut_without_loss() -> None:
    model = Words(rank=5)
    graph, data = traced(model)
    found = principal(graph, data, EACH)
    plan = found.graph.cut_plan({axis: range(5, WIDTH) for axis in found.axes})
    found.settle(plan)
    assert apart(model, plan.apply(), data[1]) < 1e-6


@pytest.mark.parametrize("signals", ["sliced", "dense"])
def test_later_bases_are_found_from_what_earlier_cuts_leave(signals: str) -> None:
    """With the first stream cut alone, what is read of the second has uncorrelated channels, if it was looked at then."""
    graph, data = traced(Words())
    found = principal(graph, data, Rotation(bases="each", damping=0, signals=signals))
    plan = found.graph.cut_plan({found.axes[0]: range(4, WIDTH)})
    found.settle(plan)
    cut = depgraph.trace(plan.apply(), (data[0],))
    statistics = importance.collect(cut, data, [importance.Gram()])
    (gate,) = [c for c in statistics.consumers if c.weight == "blocks.1.gate.weight" and c.weight_dim == 1]
    gram = statistics.of(gate, importance.Gram()).gram
    beside = float((gram - torch.diag(gram.diagonal())).abs().max() / gram.diagonal().max())
    assert beside < 1e-5 if signals == "sliced" else beside > 1e-2


class Windowed(Words):
    """Slices that take all, as masks of attentions have them: captures leave them out where sizes are numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 32, WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.positions[:, : ids.shape[1]]
        for block in self.blocks:
            x = block(x[:, : ids.shape[1]]).contiguous()
        return self.head(self.norm(x))


def test_sizes_stay_open() -> None:
    graph, data = traced(Windowed())
    found = with_shortcuts(graph)
    assert not any("dimension 0" in note or "fixed" in note for note in found.notes)
    for ids in (data[1][:3], data[1].repeat(2, 1)):
        assert apart(graph.model, found.graph.model, ids) < 1e-12


def test_a_stream_on_which_nothing_could_be_turned_is_refused_with_the_place() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            return self.last((x + self.inner(x)).relu())

    graph = depgraph.trace(Gated().eval(), torch.randn(4, 6))
    with pytest.raises(RotationError, match=r"relu at .*test_shortcuts.py:\d+ acts on every channel of it by itself"):
        with_shortcuts(graph)


def test_scores_are_the_mean_squares_that_the_models_own_weights_read() -> None:
    graph, data = traced(Words())
    found = rotate(graph, data, how=EACH)
    statistics = importance.collect(found.graph, data, [importance.Gram()])
    for axis, name in zip(found.axes, ("blocks.0.gate.weight", "blocks.1.gate.weight", "head.weight"), strict=True):
        (reader,) = [c for c in statistics.consumers if c.weight == name and c.weight_dim == 1]
        sums = statistics.of(reader, importance.Gram())
        assert torch.allclose(
            (sums.gram / sums.rows).diagonal().double(), torch.from_numpy(found.scores[axis]), rtol=1e-4
        )


def test_branches_scales_go_into_what_writes_them() -> None:
    class Scaled(Block):
        def __init__(self) -> None:
            super().__init__(layer_norm)
            self.scale = nn.Parameter(torch.rand(WIDTH) + 0.1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.scale * self.down(F.silu(self.up(self.norm(x))))

    model = Words(layer_norm)
    model.blocks = nn.ModuleList(Scaled() for _ in range(2))
    graph, data = traced(model)
    found = rotate(graph, data, how=EACH)
    assert apart(model, found.model, data[1]) < 1e-8
    assert all(bool((found.model.get_parameter(f"blocks.{k}.scale") == 1).all()) for k in range(2))
