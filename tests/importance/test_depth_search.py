"""Searches for blocks and branches to leave out: the same as by brute force, for fewer layer evaluations."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import depgraph
from depgraph.cutting.bypassing import bypassed
from depgraph.errors import DataError, ScoreError
from importance import depth

from ..zoo import ZOO
from .stacks import decoder, taught, texts, traced, untaught, without

LOSS = depth.LossMetric(untaught)


def nll(model: Any, batches: list[Tensor], gone: list[str]) -> float:
    """The mean over batches of the next-token cross-entropy without these parts."""
    logits = [without(model, ids, gone) for ids in batches]
    losses = [
        nn.functional.cross_entropy(x[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        for x, ids in zip(logits, batches, strict=True)
    ]
    return float(sum(losses)) / len(losses)


def by_brute_force(names: list[str], count: int, value: Callable[[list[str]], float]) -> tuple[list[str], list[float]]:
    """The published procedure: everything is run again for each candidate at each step."""
    gone: list[str] = []
    values = []
    for _ in range(count):
        found = {name: value([*gone, name]) for name in names if name not in gone}
        best = min(found, key=found.__getitem__)
        gone.append(best)
        values.append(found[best])
    return gone, values


def test_sleb_removes_what_brute_force_removes_for_half_of_the_layer_evaluations() -> None:
    model, batches, layers, count = decoder(32), texts(1), 32, 7
    names = [f"layers.{k}" for k in range(layers)]
    wanted, values = by_brute_force(names[1:-1], count, lambda gone: nll(model, batches, gone))
    order = depth.Sleb(batches)(traced(model), count)
    assert list(order.names) == wanted
    assert [step.value for step in order.steps] == pytest.approx(values)
    assert order.whole == pytest.approx(nll(model, batches, []))
    published = sum((layers - i - 2) * (layers - i - 1) for i in range(count)) * len(batches)
    assert order.evaluations < published / 2


def distances(model: Any, batches: list[Tensor], name: str) -> Callable[[list[str]], float]:
    """The mean distance of the logits without parts from the whole model's, in plain code."""

    def js(p: Tensor, q: Tensor, kl: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p * (p / q).log()).mean()

    def of(whole: Tensor, cut: Tensor) -> Tensor:
        p, q = whole.softmax(-1), cut.softmax(-1)
        return {
            "norm": lambda: torch.stack([(a - b).norm() for a, b in zip(whole, cut, strict=True)]).mean(),
            "angular": lambda: (
                (whole * cut).sum(-1).div(whole.norm(dim=-1) * cut.norm(dim=-1)).clip(0, 1).arccos().mean()
            ),
            "kl": lambda: kl(p, q),
            "js": lambda: js(p, q, kl),
            "js-reversed": lambda: js(p, q, lambda a, b: kl(b, a)),
        }[name]()

    whole = [without(model, ids, ()) for ids in batches]
    return lambda gone: float(
        sum(of(w, without(model, ids, gone)) for w, ids in zip(whole, batches, strict=True)) / len(batches)
    )


@pytest.mark.parametrize("name", ["norm", "angular", "kl", "js", "js-reversed"])
def test_finercut_removes_what_brute_force_removes(name: str) -> None:
    model, batches = decoder(8), texts(3)
    names = [f"layers.{k}.{part}" for k in range(8) for part in ("attention", "mlp")]
    wanted, values = by_brute_force(names, 4, distances(model, batches, name))
    order = depth.FinerCut(batches, name)(traced(model), 4)
    assert list(order.names) == wanted
    assert [step.value for step in order.steps] == pytest.approx(values)
    assert order.whole == pytest.approx(0, abs=1e-12)
    assert order.evaluations < sum((16 - i) * (15 - i) for i in range(4)) * len(batches) / 2


def test_finercut_may_hold_the_first_branches_back() -> None:
    graph = traced(decoder(4))
    order = depth.FinerCut(texts(), late=0.4)(graph, 8)  # 3 of 8 until 4 are gone
    first = {"layers.0.attention", "layers.0.mlp", "layers.1.attention"}
    assert not first & set(order.names[:4]) and set(order.names) == {b.name for b in graph.branches}
    with pytest.raises(ScoreError, match="holds 6 of 8 back until 7 are gone"):
        depth.FinerCut(texts(), late=0.8)(graph, 3)


def test_whether_candidates_are_stopped_early_and_states_kept_changes_no_choice() -> None:
    graph, batches = traced(decoder(10)), texts(4)

    def order(nonnegative: bool = True, **effort: Any) -> depth.Order:
        metric = depth.Distance("kl", nonnegative)
        return depth.Sleb(batches, metric=metric, effort=depth.Effort(**effort))(graph, 4)

    usual, in_full, little, none = order(), order(nonnegative=False), order(memory=20_000), order(memory=0)
    assert usual.names == in_full.names == little.names == none.names
    assert usual.evaluations < in_full.evaluations
    assert usual.evaluations < little.evaluations < none.evaluations
    hurried = order(share=0.5)
    assert hurried.evaluations < in_full.evaluations and len(set(hurried.names)) == 4
    with pytest.raises(ScoreError, match="share in"):
        depth.Effort(share=0)


class InPlace(nn.Module):
    """Convolutions that write in place into what they are given, as far as the blocks before leave it to them."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            out = self.second(self.first(x).relu_())
            out += x
            return out.relu_()

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(*[self.Block() for _ in range(5)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x).relu_()).mean((2, 3))


class Added(InPlace):
    """One stream that all branches are added to in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x += block.second(block.first(x).relu())
        return x.mean((2, 3))


@pytest.mark.parametrize("make", [InPlace, Added])
def test_runs_from_the_middle_are_whole_runs_also_where_memory_is_written_to(make: type[InPlace]) -> None:
    torch.manual_seed(0)
    model, images = make().eval(), [torch.randn(2, 3, 5, 5), torch.randn(1, 3, 7, 5)]
    graph = traced(model, images[0])
    names = [branch.name for branch in graph.branches]
    assert len(names) == 5
    engine = depth.Engine(graph, images, names)
    for chosen in [(), *combinations(names, 1), *combinations(names, 3), *combinations(names, 2)]:
        (wanted,) = bypassed(graph, chosen).run((images[0],), {})
        assert torch.equal(engine.output(frozenset(chosen), 0), wanted)
    order = depth.PairSearch(images, of="branches")(graph, 2)  # by the distance of outputs
    assert order.value == pytest.approx(depth.Exhaustive(images, of="branches")(graph, 2).value)
    assert order.whole == 0


class Redundant(nn.Module):
    """Two blocks do the same, so that one of them does nothing; a third does a little."""

    class Block(nn.Module):
        def __init__(self, at: int, height: float) -> None:
            super().__init__()
            self.read, self.write = nn.Linear(2, 1), nn.Linear(1, 2, bias=False)
            self.read.weight.data = -torch.eye(2)[at : at + 1]
            self.read.bias.data.fill_(height)
            self.write.weight.data = torch.eye(2)[:, at : at + 1]

        def forward(self, x: Tensor) -> Tensor:
            return x + self.write(self.read(x).relu())

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(self.Block(0, 1.0), self.Block(0, 1.0), self.Block(1, 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def test_greedy_sees_that_of_two_blocks_that_do_the_same_one_must_stay() -> None:
    graph, batches = traced(Redundant(), torch.zeros(1, 2)), [torch.zeros(1, 2)]
    metric = depth.LossMetric(lambda output, batch: (torch.tensor([1.0, 0.1]) - output).abs().sum())

    def gone(by: str) -> tuple[str, ...]:
        return depth.Sleb(batches, by, first=0, last=0, metric=metric)(graph, 2).names

    assert gone("single") == ("blocks.0", "blocks.1")
    assert gone("greedy") == ("blocks.0", "blocks.2")
    search = depth.PairSearch(batches, metric=metric)(graph, 2)
    assert set(search.names) == {"blocks.0", "blocks.2"} and search.value == pytest.approx(0.1)


def test_the_search_by_pairs_finds_the_best_set_for_fewer_evaluations_than_trying_all() -> None:
    model = decoder(9, seed=3)
    graph, batches = traced(model), taught(model)
    for count in (1, 3):
        best = depth.Exhaustive(batches, metric=LOSS)(graph, count)
        found = depth.PairSearch(batches, metric=LOSS)(graph, count)
        assert (set(found.names), found.value) == (set(best.names), best.value)
        assert found.value <= depth.Sleb(batches, first=0, last=0, metric=LOSS)(graph, count).value
    assert found.evaluations < best.evaluations
    kept = depth.PairSearch(batches, metric=LOSS, ends=(3, 3))(graph, 2)
    assert set(kept.names) < {"layers.3", "layers.4", "layers.5"}


def test_nothing_to_remove_is_no_error() -> None:
    graph = traced(decoder(3))
    for search in (depth.Sleb(texts()), depth.PairSearch(texts()), depth.Exhaustive(texts())):
        order = search(graph, 0)
        assert order.names == () and order.value == order.whole > 0


class AddedOutside(nn.Module):
    """Layers whose results the model adds, none of them by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x).relu()
        return x


def test_a_model_with_branches_and_no_blocks_says_so() -> None:
    graph = traced(AddedOutside(), torch.zeros(1, 4))
    with pytest.raises(ScoreError, match=r"no blocks .*: no entry .* it has branches, such as 'layers.0'"):
        depth.OutputShift([torch.zeros(1, 4)], of="blocks")(graph)


SEARCHES: list[Callable[..., depth.Search]] = [
    lambda batches: depth.Sleb(batches),
    lambda batches: depth.Sleb(batches, "single"),
    lambda batches: depth.Sleb(batches, "similarity"),
    lambda batches: depth.FinerCut(batches, of="blocks"),
    lambda batches: depth.AngularDrop(batches),
    lambda batches: depth.PairSearch(batches),
    lambda batches: depth.Exhaustive(batches),
    lambda batches: depth.OneShot(depth.Perplexity(batches)),
]


@pytest.mark.parametrize("make", SEARCHES)
def test_what_a_search_can_not_do_is_one_sentence(make: Callable[..., depth.Search]) -> None:
    graph = traced(decoder(3))
    for count in (4, -1):
        with pytest.raises(ScoreError, match=r"can't go: there are \d"):
            make(texts())(graph, count)
    with pytest.raises(ScoreError, match="1.5 .* can't go: give a whole number"):
        make(texts())(graph, 1.5)  # type: ignore[arg-type]
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ScoreError, match="Sequential has no blocks that could be left out: no addition joins"):
        make([torch.zeros(1, 4)])(traced(plain, torch.zeros(1, 4)), 1)
    with pytest.raises(DataError, match="there are no batches"):
        make([])(graph, 1)
    with pytest.raises(DataError, match="a batch is empty"):
        make([torch.zeros((0, 5), dtype=torch.long)])(graph, 1)
    with pytest.raises(DataError, match="batches is a Tensor"):
        make(texts()[0])


def test_tokens_beyond_the_vocabulary_are_a_batch_that_does_not_fit() -> None:
    with pytest.raises(DataError, match="a batch doesn't fit Decoder"):
        depth.Sleb([torch.full((2, 5), 11)])(traced(decoder(3)), 1)


def test_a_text_shorter_than_a_window_is_an_error() -> None:
    rows = depth.windows(torch.arange(11), 3, 4, batch=2)
    assert [batch["input_ids"].tolist() for batch in rows] == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8]]]
    with pytest.raises(DataError, match="the text has 4 tokens, less than one window of 5"):
        depth.windows(torch.arange(4), 5, 1)


def test_what_can_not_be_measured_is_never_the_best() -> None:
    graph = traced(Redundant(), torch.zeros(1, 2))
    metric = depth.LossMetric(lambda output, batch: torch.where(output[0, 1] == 0, torch.nan, 1 - output[0, 0]))
    for search in (
        depth.Sleb([torch.zeros(1, 2)], first=0, last=0, metric=metric),
        depth.PairSearch([torch.zeros(1, 2)], metric=metric),
    ):
        assert set(search(graph, 2).names) == {"blocks.0", "blocks.1"}
    broken = depth.LossMetric(lambda output, batch: output.sum() * torch.nan)
    with pytest.raises(ScoreError, match="the metric of the whole model is nan"):
        depth.Sleb([torch.zeros(1, 2)], metric=broken)(graph, 1)


def test_a_loss_below_zero_must_be_said() -> None:
    graph, batches = traced(decoder(3)), texts()
    with pytest.raises(ScoreError, match="below 0, though it says"):
        depth.Sleb(batches, metric=depth.LossMetric(lambda output, batch: -output.abs().mean()))(graph, 1)
    metric = depth.LossMetric(lambda output, batch: -output.abs().mean(), nonnegative=False)
    assert depth.Sleb(batches, metric=metric)(graph, 1).value < 0


@pytest.mark.parametrize("name", ["t5", "swin", "gptj", "mamba"])
def test_any_model_can_be_run_from_the_middle(name: str) -> None:
    example = ZOO[name]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    batch = example.args or example.kwargs
    names = [part.name for part in (*graph.branches, *graph.blocks)]
    engine = depth.Engine(graph, [batch], names)
    for chosen in [*combinations(names, 1), tuple(names[:2]), tuple(names[::2]), tuple(names[1:3])]:
        found = pytree.tree_leaves(engine.output(frozenset(chosen), 0))
        wanted = bypassed(graph, chosen).run(example.args, example.kwargs)
        assert [torch.equal(a, b) for a, b in zip(found, wanted, strict=True)] == [True] * len(wanted)
    runs = len(names) + 4
    assert engine.evaluations < runs * len(names) * 0.9
    assert len(depth.PairSearch([batch], of="branches")(graph, 2).names) == 2
