"""LLM Surgeon: the numbers of METHODS.md 2.14, the factors of any model's maps, and what holds for its costs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import depgraph
from depgraph.errors import DataError, ScoreError
from importance import (
    Compensation,
    FisherBrain,
    RowUpdate,
    Surgeon,
    column_costs,
    compensate,
    recipes,
    row_costs,
    surgeon_update,
)
from importance.factors import Side
from importance.problems import Problem, damped
from importance.products import Product
from importance.row_update import row_change
from tests.importance.test_activation import NEURONS, _net
from tests.importance.toys import regression
from tests.zoo import MODULES, ZOO

G = torch.tensor([[2.0, 0], [0, 1]])
A = torch.tensor([[2.0, 1], [1, 2]])
W = torch.tensor([[1.0, 1], [1, 0]])


def squared(output: Tensor, batch: Any) -> Tensor:
    return output.square().mean()


def test_the_numbers_by_hand() -> None:
    """METHODS.md 2.14: rows [6, 1], columns [2.25, 1.5]; removing column 1 gives [[1.5, 0], [1, 0]]."""
    assert row_costs(W, A, G).tolist() == pytest.approx([6, 1])
    assert column_costs(W, A, G).tolist() == pytest.approx([2.25, 1.5])
    assert torch.allclose(surgeon_update(W, A, G, [], [1]), torch.tensor([[1.5, 0], [1, 0]]))
    assert torch.allclose(surgeon_update(W, A, G, [0], []), torch.tensor([[0.0, 0], [1, 0]]))
    assert torch.equal(surgeon_update(W, A, G, [], []), W)


def test_without_correlation_a_column_costs_half_its_power_and_with_even_gradients_it_is_optimal_brain_surgery() -> (
    None
):
    weight, x = torch.randn(3, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    inputs, even = x.T @ x, torch.eye(3, dtype=torch.float64)
    alone = column_costs(weight, inputs.diagonal().diag(), even)
    assert torch.allclose(alone, weight.square().sum(0) * inputs.diagonal() / 2)
    problem = Problem(weight.clone(), torch.linalg.inv(inputs), np.arange(4))
    losses = problem.losses(range(4))
    assert column_costs(weight, inputs, even).tolist() == pytest.approx([losses[c] / 2 for c in range(4)])
    problem.remove([1, 3])
    assert torch.allclose(surgeon_update(weight, inputs, even, [], [1, 3]), problem.weight)


def test_an_update_lowers_what_removing_costs() -> None:
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(30, n, n, generator=generator, dtype=torch.float64).sum(0) for n in (4, 3))
    inputs, gradients = x @ x.T, g @ g.T
    weight = torch.randn(3, 4, generator=generator, dtype=torch.float64)

    def cost(after: Tensor) -> float:
        change = after - weight
        return float((gradients @ change @ inputs * change).sum() / 2)

    for rows, columns in (([1], []), ([], [2])):
        plain = weight.clone()
        plain[rows] = 0
        plain[:, columns] = 0
        updated = cost(surgeon_update(weight, inputs, gradients, rows, columns))
        expected = row_costs(weight, inputs, gradients)[1] if rows else column_costs(weight, inputs, gradients)[2]
        assert updated == pytest.approx(float(expected))
        assert updated < cost(plain)


def by_hand(model: nn.Module, x: Tensor, damping: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Row and column costs of every nn.Linear, from hooks on the modules and full factors."""
    held: dict[str, tuple[Tensor, Tensor]] = {}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}

    def keep(name: str, given: Tensor, made: Tensor) -> None:
        made.retain_grad()
        held[name] = (given.detach(), made)

    hooks = [
        layer.register_forward_hook(lambda _, given, made, name=name: keep(name, given[0], made))
        for name, layer in layers.items()
    ]
    squared(model(x), None).backward()
    model.zero_grad()
    found = {}
    for name, layer in layers.items():
        inputs, gradients = (t.double().flatten(0, -2) for t in (held[name][0], held[name][1].grad * len(x)))
        inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
        weight = torch.cat([layer.weight, layer.bias[:, None]], 1).detach().double()
        a, g = (damped(t.T @ t / len(t), damping) for t in (inputs, gradients))
        positions = len(inputs) / len(x)
        found[name] = (positions * row_costs(weight, a, g), positions * column_costs(weight, a, g)[:-1])
    for hook in hooks:
        hook.remove()
    return found


def test_costs_are_sums_over_positions() -> None:
    """A layer with many positions beside one with few: what each position adds to the loss, all of them do."""
    model, (x, y) = (
        nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)),
        (torch.randn(20, 1, 5), torch.randn(20, 1, 3)),
    )
    graph = depgraph.trace(model, x)
    loss = lambda output, batch: (output * batch[1]).sum(dim=(1, 2)).mean()  # noqa: E731
    once, often = (
        Surgeon([(x.repeat(1, count, 1), y.repeat(1, count, 1))], loss)(graph)["0.weight:0"] for count in (1, 7)
    )
    np.testing.assert_allclose(often, 7 * once, rtol=1e-4)


@pytest.mark.parametrize("damping", [0.01, 0.5])
def test_scores_are_the_costs_of_a_groups_rows_and_columns(damping: float) -> None:
    model, _ = _net()
    x = torch.randn(6, 7, 5)
    graph = depgraph.trace(model, x)
    costs = by_hand(model, x, damping)
    expected = costs["gate"][0] + costs["up"][0] + costs["down"][1]
    whole = Surgeon([x], squared, damping)(graph)
    assert whole[NEURONS] == pytest.approx(expected.tolist(), rel=1e-3)
    (stream,) = (name for name in whole if name != NEURONS)
    residual = costs["embed"][0] + costs["down"][0] + costs["gate"][1] + costs["up"][1] + costs["head"][1]
    assert whole[stream] == pytest.approx(residual.tolist(), rel=1e-3)
    parts = Surgeon([x[:2], x[2:3], x[3:]], squared, damping)(graph)
    for name, scores in whole.items():
        assert parts[name] == pytest.approx(scores, rel=1e-3)


class Written(nn.Module):
    """The same two maps, as modules, as products with either layout, and as convolutions."""

    def __init__(self, how: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        first, last = (torch.randn(o, i, generator=generator) for o, i in ((6, 4), (2, 6)))
        self.how = how
        shape: Callable[[Tensor], Tensor] = {
            "stored turned": lambda w: w.T.contiguous(),
            "convolution": lambda w: w[..., None],
        }.get(how, lambda w: w)
        self.first, self.last = nn.Parameter(shape(first)), nn.Parameter(shape(last))

    def forward(self, x: Tensor) -> Tensor:
        for weight in (self.first, self.last):
            x = self._times(torch.tanh(x), weight)
        return x

    def _times(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.how == "convolution":
            return torch.nn.functional.conv1d(x.mT, weight).mT
        return x @ (weight if self.how == "stored turned" else weight.mT)


def test_it_does_not_matter_how_a_product_is_written() -> None:
    x = torch.randn(3, 5, 4)
    found = []
    for how in ("matrix", "stored turned", "convolution"):
        graph = depgraph.trace(Written(how), x)
        (scores,) = Surgeon([x], squared)(graph).values()
        found.append(scores)
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)
    assert found[0].min() > 0


def test_dead_units_are_lowest_and_a_linear_path_may_be_rescaled() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3))
    _, batches, loss = regression()
    batches = [(torch.randn(64, 5), torch.randn(64, 3))]
    with torch.no_grad():
        for dead in (model[0].weight[6], model[0].bias[6], model[1].weight[:, 6]):
            dead.zero_()
    graph = depgraph.trace(model, batches[0][0])
    found = Surgeon(batches, loss)(graph)["0.weight:0"]
    assert (found.argmin(), found[6]) == (6, 0)


def test_tiny_gradients_keep_their_curvature() -> None:
    """Squares of gradients of 1e-25 leave float32's range; costs only scale, by the square of the loss."""
    model, batches = _net()
    graph = depgraph.trace(model, batches[0])
    whole = Surgeon(batches, squared)(graph)[NEURONS]
    tiny = Surgeon(batches, lambda output, batch: 1e-22 * squared(output, batch))(graph)[NEURONS]
    assert tiny == pytest.approx(1e-44 * whole, rel=1e-3, abs=0)


def test_units_may_be_permuted() -> None:
    model, batches = _net()
    before = Surgeon(batches, squared)(depgraph.trace(model, batches[0]))[NEURONS]
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    with torch.no_grad():
        for layer in (model.gate, model.up):
            layer.weight.copy_(layer.weight[order].clone())
            layer.bias.copy_(layer.bias[order].clone())
        model.down.weight.copy_(model.down.weight[:, order].clone())
    after = Surgeon(batches, squared)(depgraph.trace(model, batches[0]))[NEURONS]
    assert after == pytest.approx(before[order.numpy()], rel=1e-3)


@pytest.mark.parametrize("name", ["llama_8_2", "gpt2", "residual_cnn", "multihead_attention", "tied_weights"])
@pytest.mark.parametrize("score", [Surgeon, FisherBrain])
def test_every_axis_of_any_model_has_scores(name: str, score: Any) -> None:
    example = (MODULES | ZOO)[name]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    batch = example.kwargs or example.args
    loss = (
        None if name in ZOO else lambda output, _: (output[0] if isinstance(output, tuple) else output).square().mean()
    )
    scorer = score([batch], loss)
    found = scorer(graph)
    for axis in graph.axes:
        assert found[axis.name].shape == (axis.size,)
        assert np.isfinite(found[axis.name]).all()
    assert graph.plan(scorer, depgraph.Target(params=0.9)).removal
    assert not any(p.grad is not None for p in example.model.parameters())


def test_padding_does_not_count() -> None:
    example = ZOO["llama_8_2"]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    ids, mask = example.kwargs["input_ids"], example.kwargs["attention_mask"]
    right = {"input_ids": ids[:1], "attention_mask": torch.ones_like(mask[:1])}
    longer = {n: torch.cat([t, torch.zeros_like(t)], 1) for n, t in right.items()}
    found, padded = Surgeon([right])(graph), Surgeon([longer])(graph)
    for axis in graph.axes:
        np.testing.assert_allclose(padded[axis.name], found[axis.name], rtol=1e-2)


@pytest.mark.parametrize(
    ("error", "batches", "loss", "message"),
    [
        (DataError, [], squared, "no batches"),
        (DataError, [torch.randn(4, 9)], squared, "doesn't fit Sequential"),
        (ScoreError, [torch.randn(4, 5)], None, "pass loss=callable"),
        (ScoreError, [torch.full((4, 5), float("nan"))], squared, "loss of a batch is nan"),
    ],
)
def test_what_cant_be_used_is_refused(error: Any, batches: Any, loss: Any, message: str) -> None:
    model, _, _ = regression()
    with pytest.raises(error, match=message):
        Surgeon(batches, loss)(depgraph.trace(model, torch.randn(2, 5)))


def test_a_singular_factor_is_refused_without_damping() -> None:
    model, _, _ = regression()
    graph = depgraph.trace(model, torch.randn(2, 5))
    with pytest.raises(ScoreError, match="singular"):
        Surgeon([torch.randn(2, 5)], squared, damping=0.0)(graph)
    with pytest.raises(ScoreError, match="damping"):
        Surgeon([torch.randn(2, 5)], damping=-1)


def test_rows_make_up_for_rows_as_computed_by_hand() -> None:
    """G = [[2, 1], [1, 2]], W = [[1, 1], [1, 0]]: without row 0, -G^-1_10 / G^-1_00 = 1/2 of it goes to row 1: [1.5, 0.5]."""
    assert row_change(W, A, torch.tensor([0]), 0).tolist() == [[0, 0], [0.5, 0.5]]
    updated = surgeon_update(W, G, A, rows=[0], columns=[])
    assert torch.allclose(updated, torch.tensor([[0, 0], [1.5, 0.5]]))


class Weighed(nn.Module):
    """Two maps of which the second is the identity, so that gradients of the first are what the loss weighs outputs by."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(W)
            self.first.bias.copy_(torch.tensor([4.0, 1]))
            self.second.weight.copy_(torch.eye(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def weighed(output: Tensor, batch: Any) -> Tensor:
    return (output * batch[1]).sum(dim=1).mean()


def test_a_cut_updates_the_rows_beside_those_that_went() -> None:
    """Gradients [1, 1], [1, 0], [0, 1] have the second moments [[2, 1], [1, 2]] / 3: half of the row, and of its bias, moves."""
    model = Weighed()
    batch = (torch.randn(3, 2), torch.tensor([[1.0, 1], [1, 0], [0, 1]]))
    graph = depgraph.trace(model, batch[0])
    update = RowUpdate(damping=0)
    Surgeon([batch], weighed, damping=1e-9, note=update.note)(graph)
    (name,) = (axis.name for axis in graph.axes)
    plan = graph.cut_plan({name: [0]})
    pruned: Any = plan.apply()
    done = compensate(pruned, plan, [batch[0]], Compensation("bias", biases="existing", rows=update))
    assert pruned.first.weight.tolist() == [pytest.approx([1.5, 0.5])]
    assert pruned.first.bias.tolist() == pytest.approx([3])
    assert set(done.changed) == {"first.weight", "first.bias"}
    with pytest.raises(ScoreError, match="Weighed wasn't scored by importance.Surgeon"):
        RowUpdate()(plan)
    with pytest.raises(ScoreError, match='goes with inputs="dense"'):
        Compensation(inputs="pruned", rows=update)


@pytest.mark.parametrize("how", ["matrix", "stored turned", "convolution"])
def test_it_does_not_matter_for_an_update_how_a_product_is_written(how: str) -> None:
    x = torch.randn(6, 5, 4)
    found = []
    for way in ("matrix", how):
        graph, update = depgraph.trace(Written(way), x), RowUpdate()
        Surgeon([x], squared, note=update.note)(graph)
        changes = update(graph.cut_plan({graph.axes[0].name: [1, 4]}))
        assert list(changes) == ["first"]
        change = changes["first"]
        found.append(change.T if way == "stored turned" else change.flatten(1))
    assert torch.allclose(found[0], found[1], rtol=1e-3, atol=1e-9)
    assert not found[0][[1, 4]].any() and found[0][[0, 2, 3, 5]].all()


def test_rows_of_a_grouped_convolution_take_over_within_their_group() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.Conv1d(6, 2, 1)), torch.randn(5, 4, 9)
    graph, update = depgraph.trace(model, x), RowUpdate()
    Surgeon([x], squared, note=update.note)(graph)
    plan = graph.cut_plan({"0.weight:0/within": [0]})
    change = update(plan)["0.weight"]
    assert change.shape == model[0].weight.shape
    assert change.flatten(1).any(dim=1).tolist() == [False, True, True] * 2
    between = model[0](x)
    gradients = torch.autograd.grad(squared(model[1](between), None), between)[0].movedim(1, -1).flatten(0, 1)
    for rows in (slice(0, 3), slice(3, 6)):
        factor = (gradients[:, rows].T @ gradients[:, rows]).double()
        weight = model[0].weight[rows].detach().double().flatten(1)
        expected = row_change(weight, factor, torch.tensor([0]), 0.01)
        assert torch.allclose(change[rows].flatten(1), expected, rtol=1e-3, atol=1e-6)


def test_the_recipe_says_which_weights_are_updated() -> None:
    example = ZOO["llama_8_2"]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    target = depgraph.Target(params=0.9)
    changed = {}
    for update in ("both", "columns"):
        done = recipes.llm_surgeon([example.kwargs], shots=1, update=update).prune(graph, target)
        assert done.compensated is not None
        changed[update] = set(done.compensated.changed)
    more = changed["both"] - changed["columns"]
    assert more and all(name.endswith("weight") for name in more)
    with pytest.raises(ScoreError, match="unknown update 'rows'"):
        recipes.llm_surgeon([example.kwargs], update="rows")


def test_nothing_of_a_backward_pass_stays() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(4, 6)
    graph = depgraph.trace(model, x)
    Surgeon([x], squared)(graph)
    gc.collect()
    assert not [found for found in gc.get_objects() if type(found) is Product]


def _curvature(generator: torch.Generator, size: int) -> Tensor:
    rows = torch.randn(3 * size, size, generator=generator, dtype=torch.float64)
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("summed", [False, True])
def test_rows_that_go_together_cost_what_the_general_formula_says(summed: bool) -> None:
    """1/2 w'E [E'(G (x) A)^-1 E]^-1 E'w of the elements E of rows 0 and 2 (METHODS.md 2.14), not the sum of what each costs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    gradients, inputs = _curvature(generator, 4), _curvature(generator, 3)
    energy = weight @ inputs @ weight.T if summed else inputs
    found = Side(weight, gradients, energy, summed).costs(np.array([1, 0, 1, -1]), 3)
    inverse = torch.linalg.inv(torch.kron(gradients, inputs))
    gone = torch.tensor([0, 1, 2, 6, 7, 8])
    elements = weight.flatten()[gone]
    expected = float(elements @ torch.linalg.inv(inverse[gone][:, gone]) @ elements / 2)
    alone = row_costs(weight, inputs, gradients)
    assert found.tolist() == pytest.approx([float(alone[1]), expected, 0])
    assert expected > 1.05 * float(alone[0] + alone[2])


def test_a_group_of_several_rows_and_columns_costs_what_they_cost_together() -> None:
    """The value dims of two heads: groups of the rows of one map and the columns of another, which are no single indices."""
    torch.manual_seed(0)

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values, self.output = nn.Linear(5, 6, bias=False), nn.Linear(6, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            heads = self.values(x).unflatten(-1, (2, 3))
            return self.output((heads * torch.softmax(heads.sum(dim=-1, keepdim=True), dim=-2)).flatten(-2))

    model, x = Heads(), torch.randn(7, 5)
    graph = depgraph.trace(model, x)
    (axis,) = (axis for axis in graph.axes if axis.size == 3)
    made = model.values(x)
    heads = made.unflatten(-1, (2, 3))
    between = (heads * torch.softmax(heads.sum(dim=-1, keepdim=True), dim=-2)).flatten(-2)
    output = model.output(between)
    back = torch.autograd.grad(squared(output, None), [made, output])
    damp = lambda t: damped((t.T @ t / len(t)).detach().double(), 0.01)  # noqa: E731
    groups = np.array([0, 1, 2, 0, 1, 2])
    rows = Side(model.values.weight.detach().double(), damp(back[0] * 7), damp(x)).costs(groups, 3)
    columns = Side(model.output.weight.detach().double().T, damp(between), damp(back[1] * 7)).costs(groups, 3)
    found = Surgeon([x], squared)(graph)[axis.name]
    assert found == pytest.approx((rows + columns).tolist(), rel=1e-3)
    assert Surgeon([x], squared, sides="columns")(graph)[axis.name] == pytest.approx(columns.tolist(), rel=1e-3)


class _StepsBefore(nn.Module):
    """Linear maps of tensors with their first dims the other way round, laid out anew or not."""

    def __init__(self, *, contiguous: bool) -> None:
        super().__init__()
        self.contiguous = contiguous
        self.first, self.last = nn.Linear(4, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x)).transpose(0, 1)
        return self.last(hidden.contiguous() if self.contiguous else hidden)


def test_a_bias_counts_where_torch_adds_it_afterwards() -> None:
    torch.manual_seed(0)
    batch, found = torch.randn(3, 5, 4), []
    whole = _StepsBefore(contiguous=True).eval()
    for contiguous in (True, False):
        model = _StepsBefore(contiguous=contiguous).eval()
        model.load_state_dict(whole.state_dict())
        graph = depgraph.trace(model, batch)
        found.append(Surgeon([batch], lambda output, given: output.square().mean())(graph)["first.weight:0"])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)
