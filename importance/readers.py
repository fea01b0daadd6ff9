"""The consumers that a plan narrows: which of their columns go, and what of them may be changed to make up for that."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from depgraph.graph import Value
from depgraph.onnx_door.graph import OnnxGraph
from depgraph.operators import argument, operator_name
from depgraph.plan import Plan
from depgraph.widths import Kept
from importance.consumers import Consumer
from importance.patches import window_of
from importance.statistics import Statistics
from importance.taps import taps_of

_CONVOLUTIONS = [f"{kind}{n}d" for kind in ("conv", "conv_transpose") for n in (1, 2, 3)]
_BIASES = {"linear": "bias", "addmm": "self", **dict.fromkeys(_CONVOLUTIONS, "bias")}


@dataclass(frozen=True)
class Reader:
    """A consumer that loses channels.

    `tensor` is its parameter in the dense model, `value` that parameter in the graph, `kept` what the plan leaves, `gone` the
    columns that go. `taps` says of the rows that each output has how often they take part, see `taps_of`. `bias` names the
    parameter that is added to what it puts out (empty for none), `takes_bias` whether there can be one. `refused` says why its
    weights must stay as they are; empty where they may change.
    """

    consumer: Consumer
    tensor: Tensor
    value: Value
    kept: Kept
    gone: np.ndarray
    window: int
    taps: np.ndarray
    bias: str
    takes_bias: bool
    refused: str = ""

    @property
    def columns(self) -> int:
        """How many columns the consumer's statistics have."""
        return self.consumer.size * self.window

    @property
    def gives_all(self) -> bool:
        """Does nearly every place that is put out get what each row adds, so that a bias can make up for a constant?"""
        return bool(self.taps.min() > 0.5)

    def over_taps(self, rows: Tensor) -> Tensor:
        """What rows add to their outputs, [outputs], as a mean over places, from what they add where they take part."""
        return rows.reshape(-1, len(self.taps)) @ torch.from_numpy(self.taps).to(rows)

    def rows_kept(self, matrix: Tensor) -> Tensor:
        """The rows of a matrix whose outputs stay."""
        if self.outputs_kept is None:
            return matrix
        return matrix.unflatten(0, (-1, len(self.taps)))[torch.from_numpy(self.outputs_kept)].flatten(0, 1)

    @cached_property
    def outputs_kept(self) -> np.ndarray | None:
        """Which of the consumer's outputs stay; None for all."""
        return self.kept.of(self.value, 1 if self.consumer.weight_dim == 0 else 0)

    @property
    def outputs(self) -> int:
        """How many of the consumer's outputs stay."""
        whole: int = self.tensor.shape[1 if self.consumer.weight_dim == 0 else 0]
        return whole if self.outputs_kept is None else len(self.outputs_kept)


def readers_of(found: Statistics, plan: Plan) -> Iterator[Reader]:
    """Every consumer with statistics that the plan takes channels from, in the order in which the model computes."""
    here = [c for c in found.consumers if c.key in found.found]
    return (reader for reader in readers_among(here, plan) if len(reader.gone))


def readers_among(consumers: Iterable[Consumer], plan: Plan) -> Iterator[Reader]:
    """Those of `consumers` that multiply with a parameter, in their order, and what the plan makes of them."""
    graph, kept = plan.graph, plan.kept()
    program, tensors = graph.capture.program, graph.tensors()
    nodes = {node.name: node for node in graph.nodes}
    holding: dict[str, list[Any]] = defaultdict(list)
    for node in graph.nodes:
        if node.name in program.values:
            holding[program.values[node.name].name].append(node)
    by_target = {program.ties.get(v.target, v.target): v for v in program.values.values() if v.kind == "parameter"}
    for consumer in consumers:
        if not consumer.weight:
            continue
        meeting, weight = consumer.meetings[0], tensors[consumer.weight]
        stays = kept.of(program.values[meeting.operand], meeting.dim)
        gone = np.setdiff1d(np.arange(consumer.size), np.arange(consumer.size) if stays is None else stays)
        window = 1 if meeting.second else _window(nodes[meeting.op], weight)
        shape, kernel = program.values[meeting.operand].shape, tuple(weight.shape[2:]) if window == 1 else ()
        bias, takes = (
            graph.bias_of(meeting.op) if isinstance(graph, OnnxGraph) else _bias(nodes[meeting.op], program.values)
        )
        yield Reader(
            consumer=consumer,
            tensor=weight,
            value=by_target[consumer.weight],
            kept=kept,
            gone=(gone[:, None] * window + np.arange(window)[None]).reshape(-1),
            window=window,
            taps=taps_of(nodes[meeting.op], shape, kernel),
            bias=bias,
            takes_bias=takes and not (consumer.groups > 1 and meeting.weight_dim == 0),
            refused=_elsewhere(consumer, holding[by_target[consumer.weight].name]),
        )


def unseen(plan: Plan) -> Iterator[str]:
    """Of every parameter that loses columns of which nobody sees what comes in (recurrent ones, within their operator): why it is left."""
    program, kept = plan.graph.capture.program, plan.kept()
    products = Counter((c.op, c.product) for c in program.relations.contractions)
    names: dict[str, None] = {}
    for c in program.relations.contractions:
        value = program.values[c.operand]
        if products[c.op, c.product] == 1 and value.kind == "parameter" and kept.of(value, c.dim) is not None:
            names[program.ties.get(value.target, value.target)] = None
    why = "what comes into it is within an operator that loops, such as a recurrent one"
    return (f"{name}: {why}" for name in names)


def _window(node: Any, weight: Tensor) -> int:
    """How many columns a channel has where the statistics see a convolution's windows (`patches`)."""
    return int(weight[0, 0].numel()) if window_of(node) is not None else 1


def bias_at(node: Node, values: dict[str, Value]) -> str:
    """The parameter that an operator, and nothing else, adds to its outputs; empty for none."""
    return _bias(node, values)[0]


def _bias(node: Node, values: dict[str, Value]) -> tuple[str, bool]:
    """The parameter that an operator adds to its outputs, and whether it can add any."""
    name = _BIASES.get(operator_name(node.target))
    if name is None:
        return "", False
    given = argument(node, name)
    value = values.get(given.name) if isinstance(given, Node) else None
    if value is None:
        return "", given is None
    alone = value.kind == "parameter" and isinstance(given, Node) and len(given.users) == 1
    return (value.target, True) if alone else ("", False)


def _elsewhere(consumer: Consumer, holding: list[Node]) -> str:
    """Why a consumer's weight, which these nodes hold, can't be changed: something else reads it; empty where nothing does."""
    ops = {meeting.op for meeting in consumer.meetings}
    seen = [*holding]
    for node in seen:
        for user in node.users:
            if user.name in ops:
                continue
            if user.op == "call_function" and all(p in seen for p in user.all_input_nodes):
                seen.append(user)
                continue
            return f"{consumer.weight}: {user.name} reads it too"
    return ""
