"""Recurrent operators: whole layers (LSTM, GRU, RNN) and single cells.

A hidden unit is one index of the state, the rows of all gates that make it, and the columns of all weights that read it.
With these columns at zero nothing else sees the unit, so that removing it is exact. The states of all layers and
directions are one tensor: unit i of one goes with unit i of every other.
"""

from __future__ import annotations

from dataclasses import dataclass

from depgraph.graph import Least, Value, Work
from depgraph.rules.registry import Op, rule

_GATES = {"lstm": 4, "gru": 3, "rnn": 1}


@dataclass(frozen=True)
class _Cells:
    """The dims that all cells of one operator share.

    `unit` is a unit of the gates, `state` one of what goes on to the next step (another dim only where it is projected),
    `steps` are the dims over which the products are repeated.
    """

    op: Op
    gate: int
    unit: int
    state: int
    steps: tuple[int, ...]

    def weight(self, weight: Value) -> None:
        """A weight [gates · units, what it reads], or [state, units] for a projection; its columns are summed."""
        self.op.contract(weight, 1, product=weight.first)
        self.op.relations.work.append(Work(self.op.name, (*self.steps, *weight.dims)))

    def rows(self, stacked: Value) -> None:
        """The rows of a weight, or a bias, [gates · units]."""
        self.op.relations.fold(stacked.dim(0), [self.gate, self.unit])


def _cells(op: Op, units: int, state: int, steps: tuple[int, ...]) -> _Cells:
    """The shared dims; `units` and `state` are dims to take them from."""
    relations = op.relations
    gate = relations.new_dim(_GATES[op.target.split(".")[1].split("_")[0]])
    relations.fix(gate, op.reason("each gate has a task of its own"))
    return _Cells(op, gate, units, state, steps)


@rule(*(f"aten.{name}.{kind}" for name in ("lstm", "gru", "rnn_tanh", "rnn_relu") for kind in ("input", "data")))
def recurrent_layers(op: Op) -> None:
    """x [steps, n, i] (or packed), states [layers · directions, n, units], weights of every layer and direction in turn."""
    source, hidden = op.get("input") or op["data"], _states(op)
    output, *last = op.outputs
    cells = _cells(op, hidden[-1].dim(-1), hidden[0].dim(-1), tuple(source.dims[:-1]))
    projected = hidden[0].shape[-1] != hidden[-1].shape[-1]
    if projected:
        reason = op.reason("torch takes states and units of one number for a layer that projects nothing")
        op.relations.least.append(Least(cells.unit, hidden[0].shape[-1] + 1, reason))
    else:
        op.relations.align(cells.unit, cells.state)
    for before, after in zip(hidden, last, strict=True):
        op.align_elementwise([before, after])
        op.relations.align(before.dim(1), hidden[0].dim(1))
        op.fix(before, 0, "each of its indices is a layer")
    directions = op.relations.new_dim(2 if op["bidirectional"] else 1)
    op.relations.fix(directions, op.reason("each direction has weights of its own"))
    _steps(op, source, hidden[0], output)
    op.relations.fold(output.dim(-1), [directions, cells.state])
    for k, weights in enumerate(_per_cell(op, projected)):
        first = k < (2 if op["bidirectional"] else 1)
        if first:
            op.contract(source, -1, product=weights[0].first)
        _cell(cells, weights, reads=[source.dim(-1)] if first else [directions, cells.state])


def _states(op: Op) -> list[Value]:
    """The initial hidden state and, for an LSTM, the initial cell state."""
    given = op.get("hx")
    return list(given) if isinstance(given, list) else [given]


def _steps(op: Op, source: Value, hidden: Value, output: Value) -> None:
    """Steps are counted; samples are alike."""
    if op.get("batch_sizes") is not None:
        for value in (op["batch_sizes"], source, output, hidden):
            op.fix(value, -2 if len(value.shape) > 1 else 0, "it packs sequences of several lengths")
        return
    step, sample = (1, 0) if op["batch_first"] else (0, 1)
    op.relations.align(source.dim(sample), output.dim(sample))
    op.relations.align(source.dim(sample), hidden.dim(1))
    for value in (source, output):
        op.fix(value, step, "steps are counted along it")


def _per_cell(op: Op, projected: bool) -> list[list[Value]]:
    """The parameters of each cell: w_ih, w_hh, then b_ih and b_hh if there are any, then w_hr if the state is projected."""
    each = 2 + 2 * op["has_biases"] + projected
    flat = op["params"]
    return [flat[k : k + each] for k in range(0, len(flat), each)]


def _cell(cells: _Cells, weights: list[Value], reads: list[int]) -> None:
    into, back, *others = weights
    relations = cells.op.relations
    relations.fold(into.dim(1), reads)
    relations.align(back.dim(1), cells.state)
    for weight in (into, back):
        cells.weight(weight)
    for value in (into, back, *(v for v in others if len(v.shape) == 1)):
        cells.rows(value)
    for projection in (v for v in others if len(v.shape) == 2):
        relations.align(projection.dim(0), cells.state)
        relations.align(projection.dim(1), cells.unit)
        cells.weight(projection)


@rule("aten.lstm_cell", "aten.gru_cell", "aten.rnn_tanh_cell", "aten.rnn_relu_cell")
def recurrent_cell(op: Op) -> None:
    """x [n, i], states [n, units]: one step."""
    source, states = op["input"], _states(op)
    for value in (*states[1:], *op.outputs):
        op.align_elementwise([states[0], value])
    op.relations.align(source.dim(0), states[0].dim(0))
    cells = _cells(op, states[0].dim(-1), states[0].dim(-1), tuple(source.dims[:-1]))
    biases = [op[name] for name in ("b_ih", "b_hh") if op.get(name) is not None]
    _cell(cells, [op["w_ih"], op["w_hh"], *biases], reads=[source.dim(-1)])
