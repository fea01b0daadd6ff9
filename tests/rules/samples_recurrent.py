"""Samples of recurrent layers and cells."""

from __future__ import annotations

from tests.rules.sample import Sample, T, sample, t

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_I, _H, _P = 3, 5, 2


def _weights(gates: int, layers: int, directions: int, biases: bool = True, projected: int = 0) -> list[T]:
    """The parameters of all cells, in the order in which torch.nn passes them."""
    state = projected or _H
    found = []
    for layer in range(layers):
        for _ in range(directions):
            found += [t(gates * _H, _I if layer == 0 else directions * state), t(gates * _H, state)]
            found += [t(gates * _H), t(gates * _H)] if biases else []
            found += [t(projected, _H)] if projected else []
    return found


def _tied(weights: list[T], gates: int, layers: int, directions: int, state: int) -> list[str]:
    """The dims of the weights whose indices can't be told apart."""
    rows = [f"params{k}.0:{_H}" for k, w in enumerate(weights) if w.shape[0] == gates * _H and gates > 1]
    later = range(len(weights) // layers, len(weights), len(weights) // (layers * directions))
    wide = [f"params{k}.1:{state}" for k in later if directions > 1]
    return sorted([*rows, *wide], key=lambda name: (int(name.split(".")[0][6:]), name))


def _layers(name: str, layers: int = 1, directions: int = 1, *, biases: bool = True, projected: int = 0,
            first: bool = False) -> Sample:  # fmt: skip
    gates, state = _GATES[name], projected or _H
    weights = _weights(gates, layers, directions, biases, projected)
    source = t(2, 5, _I) if first else t(5, 2, _I)
    hidden = t(layers * directions, 2, state)
    states = [hidden, t(layers * directions, 2, _H)] if name == "lstm" else hidden
    labels = ["hx0", "hx1"] if name == "lstm" else ["hx"]
    many = layers * directions > 1
    step = 1 if first else 0
    outs = [f"out{k}.0" for k in range(1, len(labels) + 1)] if many else []
    fixed = [f"input.{step}", *(f"{label}.0" for label in labels if many), f"out0.{step}", *outs]
    tied = _tied(weights, gates, layers, directions, state) + ([f"out0.2:{state}"] if directions > 1 else [])
    return sample(f"{name}.input", source, states, weights, biases, layers, 0.0, False, directions == 2, first,
                  fixed=" ".join(fixed), tied=" ".join(tied), poison=9.0)  # fmt: skip


def _packed(name: str) -> Sample:
    gates = _GATES[name]
    states = [t(1, 2, _H), t(1, 2, _H)] if name == "lstm" else t(1, 2, _H)
    labels = ["hx0", "hx1"] if name == "lstm" else ["hx"]
    weights = _weights(gates, 1, 1)
    outs = [f"out{k}.1" for k in range(1, len(labels) + 1)]
    fixed = ["data.0", "batch_sizes.0", *(f"{label}.1" for label in labels), "out0.0", *outs]
    return sample(f"{name}.data", t(6, _I), T((3,), "twos"), states, weights, True, 1, 0.0, False, False,
                  fixed=" ".join(fixed), tied=" ".join(_tied(weights, gates, 1, 1, _H)), poison=9.0)  # fmt: skip


def _cell(name: str, *biases: T) -> Sample:
    gates = _GATES[name.removesuffix("_cell")]
    states = [t(2, _H), t(2, _H)] if name == "lstm_cell" else t(2, _H)
    tied = [f"{label}.0:{_H}" for label in ("w_ih", "w_hh", "b_ih", "b_hh")[: 2 + len(biases)] if gates > 1]
    return sample(
        name, t(2, _I), states, t(gates * _H, _I), t(gates * _H, _H), *biases, tied=" ".join(tied), poison=9.0
    )


SAMPLES = [
    *(_layers(name) for name in _GATES),
    *(_layers(name, 2, 2, first=True) for name in ("lstm", "gru", "rnn_tanh")),
    _layers("lstm", 2, 1, biases=False),
    _layers("lstm", 2, 2, projected=_P),
    _layers("gru", 2),
    *(_packed(name) for name in _GATES),
    *(_cell(f"{name}_cell", t(gates * _H), t(gates * _H)) for name, gates in _GATES.items()),
    _cell("lstm_cell"),
]
