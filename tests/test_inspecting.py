"""What `inspect` says of an axis follows from the operators that use it, whatever the modules are called."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import depgraph
from depgraph.describing import describe
from depgraph.inspecting import HEADINGS, Inspection, merged, share_range, starred
from depgraph.layers import Anatomy
from depgraph.widths import Cost

from .test_experts import WIDTH, Counting, Stacked
from .zoo import MODULES, ZOO


def inspected(name: str) -> Inspection:
    example = {**ZOO, **MODULES}[name]()
    return Inspection(depgraph.trace(example.model, example.args, example.kwargs))


KINDS = {
    "llama_8_4": {
        (56, "residual stream"),
        (4, "KV heads"),
        (2, "query heads per KV head"),
        (6, "rotary pairs of queries and keys"),
        (12, "head width of the values"),
        (80, "neurons"),
    },
    "llama_8_1": {
        (56, "residual stream"),
        (8, "query heads that share one KV head"),
        (6, "rotary pairs of queries and keys"),
        (12, "head width of the values"),
        (80, "neurons"),
    },
    "phi3": {
        (96, "residual stream"),
        (4, "KV heads"),
        (2, "query heads per KV head"),
        (6, "rotary pairs of queries and keys"),
        (12, "head width of the values"),
        (80, "neurons"),
    },
    "gpt2": {
        (96, "residual stream"),
        (8, "attention heads"),
        (12, "head width of queries and keys"),
        (12, "head width of the values"),
        (80, "neurons"),
    },
    "swin": {
        (48, "residual stream"),
        (96, "residual stream"),
        (4, "attention heads"),
        (8, "attention heads"),
        (12, "head width of queries and keys"),
        (12, "head width of the values"),
        (84, "neurons"),
        (168, "neurons"),
    },
    "residual_cnn": {
        (24, "residual stream"),
        (4, "groups of the grouped convolution"),
        (5, "input channels of every group"),
        (5, "output channels of every group"),
        (8, "input channels of every group"),
        (8, "output channels of every group"),
    },
    "dense_net": {(14, "channels"), (10, "channels"), (18, "channels")},
    "mlp": {(44, "neurons"), (28, "neurons")},
    "gpt_oss": {
        (56, "residual stream"),
        (4, "KV heads"),
        (2, "query heads per KV head"),
        (6, "rotary pairs of queries and keys"),
        (12, "head width of the values"),
        (6, "experts"),
        (80, "neurons"),
    },
    "lstm_both_ways": {(20, "neurons"), (24, "hidden units")},
    "lstm_projected": {
        (20, "neurons"),
        (24, "units of the memory, before their projection,"),
        (12, "projected states"),
    },
    "lstm_cell": {(20, "neurons"), (24, "hidden units")},
}


@pytest.mark.parametrize("name", KINDS)
def test_axes_are_called_by_what_operators_do_with_them(name: str) -> None:
    found = inspected(name)
    assert {(found.graph[axis].size, said.role) for axis, said in found.descriptions.items()} == KINDS[name]


class Block(nn.Module):
    """An attention written out and a gated feed-forward, with names that say nothing."""

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(width, width) for _ in range(4))
        self.e, self.f, self.g = nn.Linear(width, 40), nn.Linear(width, 40), nn.Linear(40, width)
        self.heads = heads

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(layer(x)) for layer in (self.a, self.b, self.c))
        y = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        x = x + self.d(y.transpose(1, 2).flatten(2))
        return x + self.g(torch.sigmoid(self.e(x)) * self.f(x))


@pytest.fixture(scope="module")
def nameless() -> depgraph.DependencyGraph:
    return depgraph.trace(nn.Sequential(nn.Linear(10, 24), Block(), Block(), nn.Linear(24, 5)), torch.randn(2, 7, 10))


def test_words_say_where_and_how(nameless: depgraph.DependencyGraph) -> None:
    assert [str(said) for said in describe(Anatomy(nameless)).values()][:5] == [
        "residual stream, hidden width from 0 on, shared by 16 layers",
        "attention heads of 1",
        "head width of queries and keys in 1",
        "head width of the values in 1",
        "neurons of 1, made by 2 layers",
    ]


def test_repeated_layers_are_one_family(nameless: depgraph.DependencyGraph) -> None:
    families = Inspection(nameless).families
    assert [(family.what, len(family.axes), family.size) for family in families[1:]] == [
        ("attention heads of {1-2}", 2, 4),
        ("head width of queries and keys in {1-2}", 2, 6),
        ("head width of the values in {1-2}", 2, 6),
        ("neurons of {1-2}, made by 2 layers", 2, 40),
    ]
    assert sum(len(family.axes) for family in families) == len(nameless.axes)


def test_layers_come_in_order_of_execution_with_their_widths() -> None:
    found = inspected("tied_weights")
    layers = [(y.name, found.anatomy.size(y.out or 0), found.anatomy.size(y.into or 0)) for y in found.anatomy.layers]
    assert [name for name, _, _ in layers] == ["embed", "encode", "output"]
    (_, width, words), (_, inner, _), _ = layers
    assert (width, words, inner) == (36, found.graph.tensors()["embed.weight"].shape[0], 52)


def test_what_stays_is_said_in_plain_words(nameless: depgraph.DependencyGraph) -> None:
    assert [(fixed.heading, fixed.dims) for fixed in Inspection(nameless).fixed] == [
        ("inputs: what the model is fed has this size", ("0.weight[1]",)),
        (
            "outputs: who calls the model counts on their size (lift with free=['output 0'])",
            ("3.weight[0]", "3.bias[0]"),
        ),
    ]


class Chosen(nn.Module):
    """Multiplies by the second least entries of a parameter, wherever they stand."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.table, self.last = nn.Linear(6, 8), nn.Parameter(torch.randn(9, 8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) * self.table.kthvalue(2, dim=0).values)


def test_what_the_data_decide_is_said_so() -> None:
    fixed = {
        dim: each.heading for each in Inspection(depgraph.trace(Chosen(), torch.randn(2, 6))).fixed for dim in each.dims
    }
    assert fixed["table[0]"].startswith("decided by the data")


def test_experts_stay_as_many_as_are_chosen() -> None:
    found = Inspection(depgraph.trace(Stacked(), torch.randn(9, WIDTH)))
    (name,) = (name for name, said in found.descriptions.items() if str(said) == "experts, 2 chosen at a time")
    assert found.savings[name].all.params == 4 * found.savings[name].one.params


def test_what_is_chosen_by_number_is_said_so() -> None:
    fixed = Inspection(depgraph.trace(Counting(), torch.randn(9, WIDTH))).fixed
    (dims,) = (each.dims for each in fixed if each.heading.startswith("chosen by number"))
    assert set(dims) == {"router.weight[0]", "router.bias[0]", "up[0]", "down[0]", "bias[0]"}


def test_only_names_that_trace_takes_are_offered_as_lifts() -> None:
    found = inspected("bert_masked_lm")
    (tables,) = (each for each in found.fixed if each.heading.startswith("tables looked up by number"))
    assert "free=" not in tables.heading and tables.count == 4
    offered = set(re.findall(r"free=\['(.*?)'\]", found.graph.show() + found.graph.html()))
    assert offered <= set(found.graph.capture.program.outputs)


def test_weights_of_a_recurrent_layer_are_layers_with_their_own_share_of_macs() -> None:
    found = inspected("lstm_projected")
    steps = prod(MODULES["lstm_projected"]().args[0].shape[:2])
    rows = {y.name: (y.out, y.into, y.params, y.macs) for y in found.anatomy.layers if y.recurs}
    assert list(rows) == ["layer.weight_ih_l0", "layer.weight_hh_l0", "layer.weight_hr_l0"]
    sizes = [(found.anatomy.size(out or 0), found.anatomy.size(into or 0)) for out, into, _, _ in rows.values()]
    assert sizes == [(96, 20), (96, 12), (12, 24)]
    assert all(macs == steps * params for _, _, params, macs in rows.values())


def test_headings_are_of_reasons_that_rules_give() -> None:
    package = Path(depgraph.__file__).parent
    code = "".join(file.read_text(encoding="utf-8") for file in package.rglob("*.py") if file.stem != "inspecting")
    assert [why for why in HEADINGS if f'"{why}"' not in code] == []


def test_one_group_and_all_groups_are_priced(nameless: depgraph.DependencyGraph) -> None:
    found = Inspection(nameless)
    axis = next(axis for axis in nameless.axes if axis.size == 40)
    one, everything = found.savings[axis.name].one, found.savings[axis.name].all
    assert one.params == 24 + 1 + 24 + 1 + 24
    assert everything.params == 39 * one.params


def test_numbers_of_modules_are_folded_and_those_of_layers_are_not() -> None:
    assert starred("stage1.0.conv1") == "stage*.*.conv1"
    assert starred("0") == "*"
    assert merged(["stage1.0.conv1", "stage1.1.conv1", "stage2.0.conv1"]) == "stage{1-2}.{0-1}.conv1"
    assert merged(["a", "b"]) == "a, b"


def test_shares_that_differ_are_a_range() -> None:
    dense = Cost(1000, 1000, 1000)
    assert share_range(dense, [Cost(20, 50, 0), Cost(45, 50, 0)]) == "2.0-4.5% / 5.0%"
