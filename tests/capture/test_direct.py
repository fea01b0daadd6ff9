"""Capture without torch.export gives what torch.export gives, on every model of the zoo; what it can't, is left to that."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from depgraph.capture.capturing import quiet
from depgraph.capture.exported import CapturedProgram, DirectProgram
from depgraph.capture.recording import Recording, record, record_exported
from tests.zoo import MODULES, ZOO

EXAMPLES = {**ZOO, **MODULES}
ADDED = ("aten._assert_tensor_metadata", "aten.lift_fresh_copy", "aten.detach", "aten.contiguous", "aten.alias")
"""Operators that one door notes and the other may not; they change no element."""

BY_EXPORT = {
    "falcon_multi_query": "indexes with lists",
    "falcon_grouped_query": "indexes with lists",
}


def operators(program: CapturedProgram) -> list[tuple[str, str, str]]:
    """Target, arguments and result of every operator, with nodes known by the order in which they were made."""
    names: dict[torch.fx.Node, str] = {}

    def shown(node: torch.fx.Node) -> str:
        if str(node.target).startswith(ADDED) and node.all_input_nodes:
            return shown(node.all_input_nodes[0])
        return names.setdefault(node, f"%{len(names)}")

    found = []
    for node in program.graph.nodes:
        if node.op == "call_function" and not str(node.target).startswith(ADDED):
            arguments = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: shown(n))
            found.append((str(node.target), str(arguments), str(shapes(node.meta.get("val")))))
    return found


def shapes(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [shapes(one) for one in value]
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else None


def sites(recording: Recording) -> list[tuple[Any, ...]]:
    """All numbers in the order of the graph, with their expressions; the two doors may name nodes differently."""
    return [(s.path, s.value, re.sub(r"node='\w+'", "node", str(s.expr)), place(s.where)) for s in recording.sites]


def place(where: str) -> str:
    """A line of a model's code; empty where there is none, so that whoever called stands there."""
    return "" if where.startswith(("<string>", "tests/capture/")) else where


def both(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[CapturedProgram, Recording]]:
    with torch.no_grad(), quiet(model):
        return [record(model, args, kwargs), record_exported(model, args, kwargs)]


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_is_the_graph_of_torch_export(name: str) -> None:
    example = EXAMPLES[name]()
    (direct, seen), (exported, expected) = both(example.model, example.args, example.kwargs)
    assert isinstance(direct, DirectProgram) == (name not in BY_EXPORT)
    assert operators(direct) == operators(exported)
    assert sites(seen) == sites(expected)
    assert [(c.function, place(c.where)) for c in seen.calls] == [(c.function, place(c.where)) for c in expected.calls]
    assert len(seen.comparisons) == len(expected.comparisons)
    assert [str(leak.expr) for leak in seen.leaks] == [str(leak.expr) for leak in expected.leaks]
    for ours, theirs in zip(direct.graph_signature.input_specs, exported.graph_signature.input_specs, strict=True):
        assert (ours.kind, ours.target, ours.persistent) == (theirs.kind, theirs.target, theirs.persistent)


class Run(nn.Module):
    """Runs any function of itself and a tensor."""

    def __init__(self, run: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.run = [run]
        self.linear = nn.Linear(6, 6)
        self.register_buffer("steps", torch.zeros(()))
        self.table = torch.arange(6)

    def forward(self, x: Tensor) -> Any:
        return self.run[0](self, x)


def replaced(m: Any, x: Tensor) -> Tensor:
    m.steps = m.steps + 1
    return m.linear(x)


def under_autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.linear(x)


def made_like_a_tensor(m: Any, x: Tensor) -> Tensor:
    z = m.linear(x).clone()
    z[0:1] = 0
    return z.to(m.steps)


@pytest.mark.parametrize("run", [replaced, under_autocast, made_like_a_tensor, lambda m, x: m.linear(x)[:, [0, 2]]])
def test_what_only_torch_export_captures_is_left_to_it(run: Any) -> None:
    (program, recording), _ = both(Run(run).eval(), (torch.randn(3, 6),), {})
    assert isinstance(program, torch.export.ExportedProgram)
    assert not recording.note


def on_its_device(m: Any, x: Tensor) -> Tensor:
    assert x.device.type == "cpu" == m.linear.weight.device.type
    assert x.is_cpu
    assert not x.is_cuda
    assert not x.is_meta
    return m.linear(x) + torch.arange(6, device=x.device)


def with_known_values(m: Any, x: Tensor) -> Tensor:
    return m.linear(x)[:, : int(torch.tensor(6) - 2)]


@pytest.mark.parametrize(
    "run",
    [
        on_its_device,
        with_known_values,
        lambda m, x: m.linear(x)[:, m.table],
        lambda m, x: m.linear(x).add_(1).relu_(),
        lambda m, x: {"a": m.linear(x), "b": [x, None, 3]},
        lambda m, x: torch.zeros(3, 6).copy_(m.linear(x)),
        lambda m, x: m.linear(x).split([2, 4], 1)[1],
    ],
)
def test_code_that_looks_at_devices_and_constants_is_captured_directly(run: Any) -> None:
    (direct, seen), (exported, expected) = both(Run(run).eval(), (torch.randn(3, 6),), {})
    assert isinstance(direct, DirectProgram)
    assert operators(direct) == operators(exported)
    assert sites(seen) == sites(expected)


def test_a_forward_that_fails_leaves_no_mode_behind() -> None:
    def fail(m: Any, x: Tensor) -> Tensor:
        raise ValueError(f"no {m.linear(x).shape}")

    with torch.no_grad(), pytest.raises(ValueError, match="no "):
        record(Run(fail).eval(), (torch.randn(3, 6),))
    assert torch.ones(2).device.type == "cpu"
    assert torch.add(torch.ones(2), 1).tolist() == [2, 2]
    assert not torch.compiler.is_exporting()


def test_numbers_that_follow_from_constants_are_known() -> None:
    model = Run(lambda m, x: m.linear(x)[:, : int(torch.tensor([1, 3]).cumsum(0)[1])]).eval()
    with torch.no_grad():
        program, _ = record(model, (torch.randn(3, 6),))
    *_, last, _ = program.graph.nodes
    assert tuple(last.meta["val"].shape) == (3, 4)
