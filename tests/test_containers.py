"""Inputs and outputs inside objects that torch doesn't look into."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import depgraph
import exporters
import importance
from depgraph.errors import CaptureError
from tests.test_end_to_end import zeroed


@dataclass
class Pair:
    logits: Tensor
    scale: Any
    name: str = "pair"


@dataclass(frozen=True, slots=True)
class Slotted:
    logits: Tensor
    scale: Tensor


class Attributes(dict):  # type: ignore[type-arg]
    """A dict whose items are attributes too, of which every research library has its own."""

    __getattr__ = dict.__getitem__


class Sequence(list):  # type: ignore[type-arg]
    pass


class Nested:
    def __init__(self, logits: Tensor, scale: Tensor) -> None:
        self.pair, self.count = {"inner": [Pair(logits, scale)]}, 3


class Back:
    """Knows what it is part of."""

    def __init__(self, logits: Tensor, scale: Tensor) -> None:
        self.part = SimpleNamespace(logits=logits, whole=self)


MADE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dataclass": Pair,
    "slots": Slotted,
    "namespace": lambda logits, scale: SimpleNamespace(logits=logits, scale=scale),
    "subclass of dict": lambda logits, scale: Attributes(logits=logits, scale=scale),
    "subclass of list": lambda logits, scale: Sequence([logits, scale]),
    "UserDict": lambda logits, scale: UserDict(logits=logits, scale=scale),
    "nested": Nested,
    "in a tuple": lambda logits, scale: (scale, Slotted(logits, scale)),
    "distribution": lambda logits, scale: torch.distributions.Normal(logits, scale.exp(), validate_args=False),
}


class Classifier(nn.Module):
    def __init__(self, give: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.head, self.other, self.give = nn.Linear(8, 16), nn.Linear(16, 6), nn.Linear(16, 6), give

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.body(x))
        return self.give(self.head(x), self.other(x))


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in an object, found without torch's help."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, torch.distributions.Normal):
        return [value.loc, value.scale]
    if isinstance(value, (list, tuple)):
        return [t for one in value for t in _tensors(one)]
    if isinstance(value, dict):
        return [t for one in value.values() for t in _tensors(one)]
    if isinstance(value, Slotted):
        return [value.logits, value.scale]
    return [t for one in getattr(value, "__dict__", {}).values() for t in _tensors(one)]


@pytest.mark.parametrize("form", ["module", "graph"])
@pytest.mark.parametrize("name", MADE)
def test_outputs_in_objects_keep_their_size_and_are_compared(name: str, form: str) -> None:
    torch.manual_seed(0)
    model, x = Classifier(MADE[name]).eval(), torch.randn(4, 8)
    graph = depgraph.trace(model, (x,))
    assert [axis.size for axis in graph.axes] == [16]
    plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.5))
    report = plan.apply_with_report(form=form)
    assert report.check is not None and not report.check.vacuous
    got, expected = report.model(x), zeroed(model, plan)(x)
    assert type(got) is type(expected) and len(_tensors(got)) >= 2
    torch.testing.assert_close(_tensors(got), _tensors(expected), rtol=1e-4, atol=1e-5)


class Weighted(nn.Module):
    """Reads its input from an object."""

    def __init__(self, read: Callable[[Any], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.body, self.head, self.read = nn.Linear(8, 16), nn.Linear(16, 6), read

    def forward(self, batch: Any) -> Tensor:
        x, scale = self.read(batch)
        return self.head(torch.relu(self.body(x))) * scale


@pytest.mark.parametrize("form", ["module", "graph"])
@pytest.mark.parametrize("name", ["dataclass", "slots", "namespace", "subclass of dict", "UserDict"])
def test_inputs_in_objects_are_inputs(name: str, form: str) -> None:
    torch.manual_seed(0)
    items = name in ("subclass of dict", "UserDict")

    def read(batch: Any) -> tuple[Tensor, Tensor]:
        return (batch["logits"], batch["scale"]) if items else (batch.logits, batch.scale)

    model = Weighted(read).eval()
    plan = depgraph.trace(model, (MADE[name](torch.randn(4, 8), torch.randn(1)),)).plan(
        importance.Magnitude(), depgraph.Target(params=0.5)
    )
    pruned, expected = plan.apply(form=form), zeroed(model, plan)
    other = MADE[name](torch.randn(4, 8), torch.randn(1))
    torch.testing.assert_close(pruned(other), expected(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("give", "says"),
    [
        (lambda a, b: iter([a, b]), "an output of Classifier is a list_iterator, which can be read only once"),
        (lambda a, b: {a, b}, "holds tensors in a set"),
        (Back, "part of itself"),
        (lambda a, b: None, "gives no tensor"),
    ],
)
def test_what_cannot_be_looked_into_is_refused(give: Any, says: str) -> None:
    with pytest.raises(CaptureError, match=says):
        depgraph.trace(Classifier(give).eval(), (torch.randn(4, 8),))


def test_an_iterator_as_an_input_is_refused() -> None:
    with pytest.raises(CaptureError, match="an example input is a list_iterator"):
        depgraph.trace(Weighted(tuple).eval(), (iter([torch.randn(4, 8), torch.randn(1)]),))


def test_outputs_in_an_object_are_outputs_of_the_onnx_file(tmp_path: Any) -> None:
    model, x = Classifier(Pair).eval(), torch.randn(4, 8)
    pruned = depgraph.trace(model, (x,)).plan(importance.Magnitude(), depgraph.Target(params=0.5)).apply()
    exporters.to_onnx(pruned, (x,), tmp_path / "model.onnx")
    import onnx

    assert len(onnx.load(tmp_path / "model.onnx").graph.output) == 2
