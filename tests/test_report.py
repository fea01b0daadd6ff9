"""Axes and plans as text: golden dumps of a dozen networks, and what the text says in cases they don't have.

After a change that is meant, write the dumps anew with `DEPGRAPH_GOLDEN=write pytest tests/test_report.py` and read
the difference in git.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import depgraph
from depgraph.graph import Reason
from depgraph.report import axis_text, fold, folded, ranges, span, uncovered, widths

from .zoo import MODULES, ZOO

GOLDEN = Path(__file__).parent / "golden"
WRITE = os.environ.get("DEPGRAPH_GOLDEN") == "write"
NETWORKS = (
    "residual_cnn",
    "dense_net",
    "unet_transposed",
    "channel_shuffle",
    "squeeze_excitation",
    "multihead_attention",
    "grouped_query_by_hand",
    "split_sizes",
    "tied_weights",
    "two_inputs",
    "llama_8_4",
    "gpt2",
)


def traced(name: str) -> depgraph.DependencyGraph:
    example = {**ZOO, **MODULES}[name]()
    return depgraph.trace(example.model, example.args, example.kwargs)


def without_lines(text: str) -> str:
    """The text without the numbers of source lines, which say nothing about the axes."""
    return re.sub(r"(\w+\.py):\d+", r"\1", text) + "\n"


@pytest.mark.parametrize("name", NETWORKS)
def test_axes_are_those_of_the_golden_dump(name: str) -> None:
    text, file = without_lines(traced(name).show()), GOLDEN / f"{name}.txt"
    if WRITE:
        GOLDEN.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8"), (
        f"the axes of {name} differ from {file.name}; if that is meant: DEPGRAPH_GOLDEN=write pytest {__file__}"
    )


def test_every_dump_is_of_a_network() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(NETWORKS)


@torch.library.custom_op("depgraph_test_report::mystery", mutates_args=())
def mystery(x: Tensor) -> Tensor:
    return x.flip(-1)


@mystery.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Unknown(nn.Module):
    """Has an operator that no rule knows, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(mystery(self.first(x)))


class Halves(nn.Module):
    """The first half of the features goes on to a layer, the second is an output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.first(x).split(4, dim=-1)
        return self.second(first), second


def test_operators_without_a_rule_are_listed_with_their_place() -> None:
    text = depgraph.trace(Unknown(), torch.randn(2, 6)).show()
    assert "operators without a rule\n  depgraph_test_report.mystery.default  1 x  tests/test_report.py:" in text
    assert "no rule knows what this operator does with it" in text


def test_uncovered_dims_have_a_reason() -> None:
    graph = traced("split_sizes")
    found = {(left.target, left.dim): left.reason for left in uncovered(graph)}
    assert found["fused.weight", 1] == "dimension 2 of the model's input 'x'"
    assert found["left.weight", 0].endswith("lift with free=['output 0']")
    assert all(found.values())


def test_indices_that_the_axes_of_a_dim_leave_out_are_listed() -> None:
    graph = depgraph.trace(Halves(), torch.randn(2, 6))
    (left,) = (left for left in uncovered(graph) if left.target == "first.bias")
    assert (left.dim, left.size, left.indices) == (0, 8, 4)
    assert left.reason.startswith("dimension 1 of the model's output 1")
    assert ["first.bias[0]", "4", "of", "8"] in [line.split() for line in graph.show().splitlines()]


def test_a_plan_prints_costs_and_widths() -> None:
    graph = traced("split_sizes")
    plan = graph.cut_plan({"left.weight:1": range(6)})
    lines = str(plan).splitlines()
    assert lines[0] == "plan for SplitSizes: 1 of 3 axes lose groups"
    assert lines[1].split()[:4] == ["parameters", f"{graph.dense_cost.params:,}", "->", f"{plan.cost().params:,}"]
    assert lines[-1].split() == ["left.weight:1", "24", "->", "18", "75.0%"]


def test_widths_of_equal_axes_share_a_line() -> None:
    graph = traced("llama_8_4")
    names = [axis.name for axis in graph.axes if "gate_proj" in axis.name]
    (line,) = widths(graph.cut_plan({names[0]: range(8), names[1]: range(20)}))
    assert (line.names, line.axes, line.before, line.left) == (
        "model.layers.{0-1}.mlp.gate_proj.weight:0",
        2,
        80,
        "60-72",
    )
    assert line.share == pytest.approx(132 / 160)


def test_names_fold_over_each_number_where_all_else_is_the_same() -> None:
    names = [f"stages.{i}.layers.{k}.fc1.weight" for i in range(2) for k in range(3)]
    assert folded(names) == ["stages.{0-1}.layers.{0-2}.fc1.weight"]
    assert folded(["0.weight", "2.weight", "fc1.weight", "fc2.weight"]) == ["{0, 2}.weight", "fc1.weight", "fc2.weight"]
    assert fold([("a.0.b", 1), ("a.1.b", 2), ("a.2.b", 1)]) == [("a.{0, 2}.b", 1), ("a.1.b", 2)]


def test_numbers_as_ranges_and_spans() -> None:
    assert ranges([7, 0, 1, 2]) == "0-2, 7"
    assert span([3, 3]) == "3"
    assert span([5, 2, 3]) == "2-5"


def test_fixed_groups_are_listed_with_their_reason() -> None:
    graph = depgraph.trace(Halves(), torch.randn(2, 6))
    (axis,) = graph.axes
    fixed = replace(axis, reasons={2: Reason("it is wanted"), 3: Reason("it is wanted"), 0: Reason("so", "output 7")})
    lines = axis_text(graph, fixed).splitlines()
    assert lines[1] == "  groups   4, 1 may go"
    assert lines[-3:] == ["  fixed", "    groups 2-3: it is wanted", "    groups 0: so; lift with free=['output 7']"]
