"""LLM Surgeon: Kronecker-factored costs and the update that makes up for what goes."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import checkpoint

import depgraph
import importance
from depgraph.errors import ScoreError
from importance import Surgeon, surgeon_update
from importance.layout import Layout
from importance.surgeon import Use
from tests.importance.toys import regression
from tests.zoo import MODULES, ZOO

A = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
G = torch.diag(torch.tensor([2.0, 1.0]))
W = torch.tensor([[1.0, 1.0], [1.0, 0.0]])


class Between(nn.Module):
    """A square map between two others, the first of which changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.square, self.last = (nn.Linear(2, 2, bias=False) for _ in range(3))
        with torch.no_grad():
            for linear, weight in zip(
                (self.first, self.square, self.last), (torch.eye(2), W, torch.eye(2)), strict=True
            ):
                linear.weight.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.square(self.first(x)))


def pulled(output: Tensor, batch: Any) -> Tensor:
    """A loss whose gradient with respect to the output is the batch's second tensor."""
    return (output * batch[1]).sum()


def test_costs_of_rows_and_columns() -> None:
    """METHODS.md 2.14: with G = diag(2, 1), A = [[2, 1], [1, 2]], W = [[1, 1], [1, 0]]: rows [6, 1], columns [2.25, 1.5]."""
    x = torch.linalg.cholesky(2 * A).T
    g = torch.linalg.cholesky(2 * G).T
    model = Between()
    graph = depgraph.trace(model, x)
    layout = Layout.of(graph)
    found = Surgeon([(x, g)], pulled, damping=0)._gathered(graph, layout)[Use("square.weight")]
    costs = dict(found.costs(0, "here"))
    np.testing.assert_allclose(costs[0], [6, 1], rtol=1e-5)
    np.testing.assert_allclose(costs[1], [2.25, 1.5], rtol=1e-5)
    scores = Surgeon([(x, g)], pulled, damping=0)(graph)
    made = dict(Surgeon([(x, g)], pulled, damping=0)._gathered(graph, layout)[Use("first.weight")].costs(0, "here"))[0]
    np.testing.assert_allclose(scores["first.weight:0"], made.numpy() + [2.25, 1.5], rtol=1e-5)


def test_the_update_when_a_column_goes() -> None:
    """METHODS.md 2.14: removing column 1 leaves [[1.5, 0], [1, 0]]."""
    torch.testing.assert_close(surgeon_update(W, A, G, columns=[1]), torch.tensor([[1.5, 0.0], [1.0, 0.0]]))
    torch.testing.assert_close(surgeon_update(W, A, G), W)


def test_the_update_is_the_best_there_is() -> None:
    """It minimises 1/2 tr(dW A dW' G) where rows or columns are given, and what goes is zero."""
    torch.manual_seed(0)
    weight = torch.randn(4, 5, dtype=torch.float64)
    inputs, outputs = (m @ m.T + torch.eye(len(m)) for m in (torch.randn(5, 5).double(), torch.randn(4, 4).double()))
    for rows, columns in (([1, 3], []), ([], [0, 4])):
        best = surgeon_update(weight, inputs, outputs, rows, columns)
        assert not best[rows].any() and not best[:, columns].any()
        change = outputs @ (best - weight) @ inputs
        free = torch.ones_like(weight, dtype=torch.bool)
        free[rows], free[:, columns] = False, False
        torch.testing.assert_close(change[free], torch.zeros_like(change[free]))
    both = surgeon_update(weight, inputs, outputs, [1], [2])
    apart = surgeon_update(weight, inputs, outputs, [1]) + surgeon_update(weight, inputs, outputs, columns=[2]) - weight
    kept = np.ix_([0, 2, 3], [0, 1, 3, 4])
    torch.testing.assert_close(both[kept], apart[kept])
    assert not both[1].any() and not both[:, 2].any()


def test_the_cost_is_what_the_loss_rises_by() -> None:
    weight = torch.randn(4, 5, dtype=torch.float64)
    x, g = torch.randn(40, 5).double(), torch.randn(40, 4).double()
    inputs, outputs = x.T @ x / 40, g.T @ g / 40
    column = (weight.T @ outputs @ weight)[2, 2] / torch.linalg.inv(inputs)[2, 2] / 2
    change = surgeon_update(weight, inputs, outputs, columns=[2]) - weight
    assert float(torch.trace(change @ inputs @ change.T @ outputs) / 2) == pytest.approx(float(column))


def test_with_diagonal_inputs_and_even_outputs_a_column_costs_its_own_size() -> None:
    """METHODS.md 2.14: 1/2 |W_c|^2 A_cc."""
    x = torch.diag(torch.tensor([1.0, 2.0, 3.0])) * 3**0.5
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3))
    graph = depgraph.trace(model, x)
    scorer = Surgeon([(x, torch.eye(3) * 3**0.5)], pulled, damping=0)
    found = dict(scorer._gathered(graph, Layout.of(graph))[Use("1.weight")].costs(0, "here"))
    sizes = model[1].weight.detach().square().sum(dim=0).numpy()
    np.testing.assert_allclose(found[1], sizes * np.array([1.0, 4.0, 9.0]) / 2, rtol=1e-5)


class Mixed(nn.Module):
    """Linear maps in several forms, and convolutions with windows, strides, padding and groups, all with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding="same", dilation=2)
        self.grouped = nn.Conv2d(8, 6, (3, 2), stride=2, padding=1, groups=2)
        self.line = nn.Conv1d(6, 5, 3, padding=1)
        self.turned, self.bias = nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(7))
        self.straight = nn.Parameter(torch.randn(9, 7))
        self.last = nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(torch.relu(self.first(x))))
        x = torch.relu(self.line(x.flatten(2))).transpose(1, 2).flatten(0, 1)
        x = torch.tanh(torch.addmm(self.bias, x, self.turned))
        return self.last(torch.tanh(x @ self.straight.t()))


def windows(x: Tensor, conv: nn.Module) -> Tensor:
    """The columns of a convolution by its own arithmetic: the gradients of what it puts out with one-hot kernels."""
    weight = torch.eye(conv.weight[0].numel()).reshape(-1, *conv.weight.shape[1:])
    function = F.conv1d if weight.ndim == 3 else F.conv2d
    parts = x.chunk(conv.groups, dim=1)
    made = [function(part, weight, None, conv.stride, conv.padding, conv.dilation) for part in parts]
    return torch.stack([m.flatten(2).transpose(1, 2).flatten(0, 1) for m in made])


def test_every_form_of_a_linear_map_is_seen_with_its_columns() -> None:
    """What was gathered against full matrices: A from windows, G from the gradients of what layers put out."""
    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(3, 3, 7, 6)
    graph = depgraph.trace(model, x[:1])
    loss = lambda output, batch: output.square().mean()  # noqa: E731
    layout = Layout.of(graph)
    found = Surgeon([x], loss)._gathered(graph, layout)
    held = {"first.weight", "grouped.weight", "line.weight", "turned", "straight", "last.weight"}
    assert {use.name for use in found} == held
    turned = found[Use("turned", transposed=True, biased=True)]
    assert (turned.rows, turned.columns) == (1, 0)
    gradients: dict[str, list[Tensor]] = {name: [] for name in ("first", "grouped", "line")}
    inputs: dict[str, list[Tensor]] = {name: [] for name in gradients}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, made: Tensor) -> None:
            inputs[name].append(args[0].detach())
            made.register_hook(lambda g: gradients[name].append(g))

        return hook

    handles = [getattr(model, name).register_forward_hook(watch(name)) for name in gradients]
    for sample in x:
        loss(model(sample[None]), None).backward()
    for handle in handles:
        handle.remove()
    for name in gradients:
        conv = getattr(model, name)
        columns = windows(torch.cat(inputs[name]), conv)
        columns = torch.cat([columns, torch.ones(*columns.shape[:2], 1)], dim=2)
        rows = torch.cat(gradients[name]).flatten(2).transpose(1, 2).flatten(0, 1)
        rows = rows.reshape(len(rows), conv.groups, -1).transpose(0, 1)
        factors, count = found[Use(f"{name}.weight", biased=True)], columns.shape[1]
        assert factors.count == count
        a, g = columns.mT @ columns / count, rows.mT @ rows / count
        weight = (
            torch.cat([conv.weight.flatten(1), conv.bias[:, None]], 1).detach().reshape(conv.groups, g.shape[1], -1)
        )
        expected = []
        for part, inner, outer in zip(weight.double(), a.double(), g.double(), strict=True):
            inner, outer = (m + 0.01 * m.diagonal().mean() * torch.eye(len(m)) for m in (inner, outer))
            expected.append((part @ inner @ part.T).diagonal() / torch.linalg.inv(outer).diagonal() / 2)
        costs = dict(factors.costs(0.01, name))
        if 0 in costs:
            np.testing.assert_allclose(costs[0], torch.cat(expected), rtol=1e-3)
        if 1 in costs:
            assert costs[1].shape == (conv.weight.shape[1],)
    model.zero_grad()


@pytest.mark.parametrize(
    ("name", "unseen"),
    [
        ("residual_cnn", set()),
        ("gpt2", {"transformer.wpe.weight"}),
        ("llama_8_2", {"model.embed_tokens.weight"}),
        ("multihead_attention", set()),
    ],
)
def test_all_weights_of_whole_architectures_are_seen(name: str, unseen: set[str]) -> None:
    example = (MODULES | ZOO)[name]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    layout = Layout.of(graph)
    loss = lambda output, _: (output if isinstance(output, Tensor) else output.logits).square().mean()  # noqa: E731
    scorer = Surgeon([example.kwargs or example.args], loss)
    wide = {n for n, p in layout.parameters.items() if p.ndim > 1}
    assert wide - {use.name for use in scorer._gathered(graph, layout)} == unseen
    found = scorer(graph)
    assert all(np.isfinite(s).all() and (s >= 0).all() for s in found.values())


def test_what_is_changed_in_place_or_computed_again_counts_once() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)
            self.form = "plain"

        def middle(self, x: Tensor) -> Tensor:
            return torch.relu(self.two(x))

        def forward(self, x: Tensor) -> Tensor:
            h = self.one(x).relu_() if self.form == "in place" else torch.relu(self.one(x))
            if self.form == "again":
                return self.three(checkpoint.checkpoint(self.middle, h, use_reentrant=True))
            return self.three(self.middle(h))

    model, x = Net(), torch.randn(30, 4)
    graph = depgraph.trace(model, x)
    found = {}
    for form in ("plain", "in place"):
        model.form = form
        found[form] = Surgeon([x], lambda output, _: output.square().mean())(graph)
    for one in graph.axes:
        for form in ("in place", "again"):
            np.testing.assert_allclose(found[form][one.name], found["plain"][one.name], rtol=1e-5)


def test_nothing_of_a_batch_is_held_on_to() -> None:
    """Rows of a layer would be seen by nobody else: they are gone once scores are there."""
    model, batches, loss = regression()
    graph = depgraph.trace(model, batches[0][0])
    seen: list[weakref.ref[Tensor]] = []
    model[0].register_forward_hook(lambda module, args, made: seen.append(weakref.ref(made)))
    gc.disable()
    try:
        Surgeon(batches, loss)(graph)
        assert len(seen) == 12 and not any(held() is not None for held in seen)
    finally:
        gc.enable()


def test_padding_does_not_count() -> None:
    example = ZOO["llama_8_2"]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    mask = example.kwargs["attention_mask"]
    found = Surgeon([example.kwargs])._gathered(graph, Layout.of(graph))
    assert not mask.all() and {f.count for f in found.values()} == {int(mask.sum())}


def test_few_positions_need_damping() -> None:
    model, batches, loss = regression()
    graph = depgraph.trace(model, batches[0][0])
    few = [(batches[0][0][:2], batches[0][1][:2])]
    with pytest.raises(ScoreError, match=r"'?0.weight.* is singular .*use damping above 0, or more data"):
        Surgeon(few, loss, damping=0)(graph)
    assert np.isfinite(Surgeon(few, loss)(graph)["0.weight:0"]).all()
    with pytest.raises(ScoreError, match="damping must be at least 0"):
        Surgeon(few, loss, damping=-1)


def test_a_weight_that_is_used_both_ways_round_costs_what_both_uses_do() -> None:
    """An encoder and its transpose as the decoder."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.code, self.out = nn.Linear(4, 6), nn.Parameter(torch.randn(5, 6)), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(torch.tanh(F.linear(self.into(x), self.code)) @ self.code))

    model, x = Tied(), torch.randn(30, 4)
    graph = depgraph.trace(model, x)
    scorer = Surgeon([x], lambda output, _: output.square().mean())
    found = scorer._gathered(graph, Layout.of(graph))
    uses = [Use("code"), Use("code", transposed=True)]
    assert [found[use].rows for use in uses] == [0, 1]
    expected = sum(dict(found[use].costs(0.01, "code"))[0] for use in uses)
    inner = next(a for a in graph.axes if a.size == 5)
    np.testing.assert_allclose(scorer(graph)[inner.name], expected)


class Matched(nn.Module):
    """Two tables meet in a product; nothing but that reads their columns."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Embedding(7, 6), nn.Embedding(7, 6)
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x))) + (self.one(ids) * self.two(ids)).sum(-1, keepdim=True)


def test_an_axis_of_which_nothing_is_multiplied_goes_last() -> None:
    model, inputs = Matched(), (torch.tensor([1, 2]), torch.randn(2, 4))
    graph = depgraph.trace(model, inputs)
    found = Surgeon([inputs], lambda output, _: output.square().mean())(graph)
    assert found["one.weight:1"].min() > found["first.weight:0"].max()
    np.testing.assert_array_equal(
        np.argsort(found["one.weight:1"]), np.argsort(importance.Magnitude()(graph)["one.weight:1"])
    )
