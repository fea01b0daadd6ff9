"""The layer problem of optimal brain surgery costs the same, in whichever way its matrix is had."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import depgraph
import importance
from depgraph.errors import ScoreError
from importance import FisherBrain, OptimalBrain, fisher_brain, inverses
from importance.accumulators import GramSums
from importance.gains import Few, Matrix
from importance.inverses import inverse_for
from importance.problems import FewRows, Idle, Problem, inverse_of
from importance.rows import Rows

COLUMNS, OUTPUTS, DAMPING = 24, 3, 0.01
LABELS = np.array([0, 0, 1, 1, 1, 2, 2, -1, 3, 3, 4, 4, 4, 5, 5, 6, 6, 6, 7, 0, -1, 2, 8, 9])
ORDER = [[3], [0, 5], [8, 1], [2], [4, 6]]


def _rows(count: int, idle: tuple[int, ...] = ()) -> Tensor:
    rows = torch.randn(count, COLUMNS, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    rows[:, list(idle)] = 0
    return rows


def _weight() -> Tensor:
    return torch.randn(OUTPUTS, COLUMNS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _sums(rows: Tensor, batches: int = 1) -> GramSums:
    sums = GramSums()
    for part in rows.chunk(batches):
        sums.add(Rows(part[None]))
    return sums


def _problems(sums: GramSums, damping: float = DAMPING) -> list:
    return [*inverse_for(sums, 0, COLUMNS, damping, "a layer").problems(_weight(), LABELS)]


def _history(problems: list) -> list[dict[int, float]]:
    """The losses of all groups that are left, before each step of a removal."""
    left, found = set(range(10)), []
    for going in ORDER:
        losses = dict.fromkeys(left, 0.0)
        for problem in problems:
            for group, loss in problem.losses(left).items():
                losses[group] += loss
            problem.remove(going)
        found.append(losses)
        left -= set(going)
    return found


def _by_hand(rows: Tensor) -> list[dict[int, float]]:
    """The same from the definition: least squares anew at every step, with H of what is left."""
    weight, gram = _weight(), rows.T @ rows / len(rows)
    second = gram + DAMPING * gram.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    left, stays, found = set(range(10)), np.ones(COLUMNS, dtype=bool), []
    for going in ORDER:
        losses = {}
        for group in left:
            here = np.flatnonzero(stays)
            inverse = torch.linalg.inv(second[here][:, here])
            gone = np.flatnonzero(LABELS[here] == group)
            part = weight[:, here[gone]]
            losses[group] = float((part @ torch.linalg.inv(inverse[gone][:, gone]) * part).sum())
        found.append(losses)
        kept, gone = np.flatnonzero(stays & ~np.isin(LABELS, going)), np.flatnonzero(stays & np.isin(LABELS, going))
        weight[:, kept] += weight[:, gone] @ second[gone][:, kept] @ torch.linalg.inv(second[kept][:, kept])
        stays[gone] = False
        left -= set(going)
    return found


@pytest.mark.parametrize(
    ("rows", "idle", "kinds"),
    [
        (60, (), [Problem]),
        (5, (), [FewRows]),
        (60, (2, 3, 4, 9, 22), [Idle, Problem]),
        (4, (0, 7, 23), [Idle, FewRows]),
        (6, (0, 7, 23), [Idle, Problem]),
    ],
)
def test_losses_of_a_removal_in_steps_are_those_of_the_definition(rows: int, idle: tuple, kinds: list) -> None:
    came = _rows(rows, idle)
    problems = _problems(_sums(came))
    assert [type(problem) for problem in problems] == kinds
    for found, expected in zip(_history(problems), _by_hand(came), strict=True):
        assert found == {group: pytest.approx(loss) for group, loss in expected.items()}


def test_columns_into_which_nothing_comes_cost_damping_alone() -> None:
    (problem,) = _problems(_sums(_rows(9, tuple(range(COLUMNS)))))
    assert problem.losses([3, 7]) == {3: pytest.approx(_sum([8, 9])), 7: pytest.approx(_sum([18]))}


def _sum(columns: list[int]) -> float:
    return float(_weight()[:, columns].square().sum())


def test_without_damping_columns_that_depend_on_one_another_are_refused() -> None:
    for rows in (_rows(5), _rows(60, (4,))):
        with pytest.raises(ScoreError, match="X'X of a layer is singular"):
            _problems(_sums(rows), 0.0)


@pytest.mark.parametrize(("count", "batches"), [(6, 3), (7, 1), (20, 10), (20, 2), (300, 100)])
def test_sums_don_t_depend_on_how_rows_come(count: int, batches: int) -> None:
    rows = _rows(count)
    sums = _sums(rows, batches)
    assert sums.rows == count and torch.allclose(sums.gram, rows.T @ rows)
    assert torch.allclose(sums.between(3, 9), (rows.T @ rows)[3:9, 3:9])
    assert torch.allclose(sums.total, rows.sum(0)) and torch.allclose(sums.diagonal, rows.square().sum(0))
    held = sums.few(2, 5)
    assert (held is not None) == (count * 4 <= COLUMNS)
    assert held is None or torch.equal(held, rows[:, 2:5])


@pytest.mark.parametrize(
    ("count", "idle", "damping"),
    [
        (60, (), 0.0),
        (60, (), DAMPING),
        (60, (1, 5), DAMPING),
        (4, (), DAMPING),
        (4, (1, 5), DAMPING),
    ],
)
def test_what_stays_predicts_what_goes(count: int, idle: tuple[int, ...], damping: float) -> None:
    rows, kept, gone = _rows(count, idle), torch.arange(0, 20), torch.arange(20, COLUMNS)
    gone = torch.cat([gone, torch.tensor([5])]) if idle else gone
    kept = kept[~torch.isin(kept, gone)]
    moments = rows.T @ rows
    second = moments[kept][:, kept] + damping * moments.diagonal()[kept].mean() * torch.eye(len(kept))
    expected = torch.linalg.solve(second, moments[kept][:, gone])
    for spread in (Matrix(moments), Few(rows)):
        assert torch.allclose(spread.gain(kept, gone, damping), expected)


class Dense(nn.Module):
    """Every layer reads what all before it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4 + 3 * k, 3, 1) for k in range(5))
        self.head = nn.Linear(19, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x).relu()], dim=1)
        return self.head(x.mean(dim=(2, 3)))


@pytest.mark.parametrize("way", ["activations", "gradients"])
def test_what_comes_into_a_layer_is_inverted_once_for_all_axes_that_meet_in_it(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Dense().eval()
    batches = [torch.randn(8, 4, 5, 5) for _ in range(2)]
    graph = depgraph.trace(model, batches[0])
    calls = []

    def counted(gram: Tensor, where: object) -> Tensor:
        calls.append(where)
        return inverse_of(gram, where)

    monkeypatch.setattr(inverses, "inverse_of", counted)
    monkeypatch.setattr(fisher_brain, "inverse_of", counted)
    scorer = OptimalBrain(batches, rounds=2) if way == "activations" else FisherBrain(batches, lambda out, _: out.sum())
    together = scorer(graph)
    assert sum(axis.prunable.any() for axis in graph.axes) == 5
    assert len(calls) == 5  # the first layer reads inputs alone
    if isinstance(scorer, OptimalBrain):
        found = importance.collect(graph, batches, scorer.needs)
        for axis in graph.axes:
            assert together[axis.name] == pytest.approx(scorer.of_axis(axis, found))
