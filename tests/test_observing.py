"""Runs that are only looked at: what nothing shown is computed from doesn't run, and what is shown stays the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import depgraph
import importance
from depgraph.observing import Met
from tests.zoo import MODULES, ZOO

WORDS, WIDTH = 50, 8


class Sampler(nn.Module):
    """Writes through a view, draws before and between products, and ends in a product that is large."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH), nn.Linear(WIDTH, WORDS)
        self.register_buffer("scale", torch.arange(1.0, 13.0))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x + torch.randn_like(x))
        hidden.view(hidden.shape).mul_(self.scale)
        narrow = self.down(hidden)
        y = self.head(narrow + torch.randn_like(narrow))
        return y + torch.randn_like(y)


class Calls(TorchDispatchMode):
    """The shapes of what products make."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm", "linear"):
            self.made.append(made.shape[-1])
        return made


def _shown(graph: depgraph.DependencyGraph, how: str) -> list[tuple[str, Tensor, Tensor]]:
    found: list[tuple[str, Tensor, Tensor]] = []

    def show(met: Met) -> None:
        found.append((str(met.meeting), met.operand.clone(), met.other.clone()))

    getattr(graph.observer(), how)((graph.args, graph.kwargs), watch=show)
    return found


@pytest.mark.parametrize(
    "name", ["llama_8_2", "bert_masked_lm", "t5", "swin", "mamba", "whisper", "mobilenet_v2", "mixtral", "sampler"]
)
def test_what_is_shown_is_the_same_without_the_rest(name: str) -> None:
    if name == "sampler":
        graph = depgraph.trace(Sampler().eval(), torch.randn(2, 3, WIDTH))
    else:
        example = {**ZOO, **MODULES}[name]()
        graph = depgraph.trace(example.model, example.args, example.kwargs)
    whole, part = _shown(graph, "run"), _shown(graph, "watch")
    assert [one[0] for one in whole] == [one[0] for one in part] and whole
    for (where, *before), (_, *after) in zip(whole, part, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), where


def test_the_last_product_is_not_computed_for_a_score() -> None:
    model, x = Sampler().eval(), torch.randn(2, 3, WIDTH)
    graph = depgraph.trace(model, x)
    with Calls() as calls:
        scores = importance.Activation([x], "wanda-sp")(graph)
    assert WORDS not in calls.made and calls.made == [12, WIDTH]
    read = graph.observer().own.meetings[-1]
    assert read.weight == "head.weight" and scores, "what comes into it is looked at all the same"


class Masked(nn.Module):
    """Three layers of attention under one mask of truth values."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        spread = mask[:, None, None].expand(-1, 1, x.shape[1], -1)
        for layer in self.layers:
            q, k, v = layer(x)[:, None].chunk(3, -1)
            x = x + nn.functional.scaled_dot_product_attention(q, k, v, spread)[:, 0]
        return self.head(x)


class Chosen(TorchDispatchMode):
    """The shapes of what is chosen by truth values."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "where":
            self.made.append(tuple(made.shape))
        return made


def test_a_mask_that_layers_share_becomes_numbers_once() -> None:
    model, x = Masked().eval(), torch.randn(2, 5, WIDTH)
    graph = depgraph.trace(model, (x, torch.ones(2, 5, dtype=torch.bool)))
    mask = torch.tensor([[True, True, True, False, False], [True, True, True, True, False]])
    with Chosen() as calls:
        ((_, made),) = graph.observer().run(((x, mask), {}))
    assert torch.allclose(made, model(x, mask), atol=1e-6)
    assert calls.made == [(2, 1, 1, 5)]


def test_a_mask_that_is_written_to_becomes_other_numbers() -> None:
    class Narrowing(Masked):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            allowed = mask.clone()[:, None, None]
            for number, layer in enumerate(self.layers):
                q, k, v = layer(x)[:, None].chunk(3, -1)
                x = x + nn.functional.scaled_dot_product_attention(q, k, v, allowed)[:, 0]
                allowed[..., number] = False
            return self.head(x)

    model, given = Narrowing().eval(), (torch.randn(2, 5, WIDTH), torch.ones(2, 5, dtype=torch.bool))
    ((_, made),) = depgraph.trace(model, given).observer().run((given, {}))
    assert torch.allclose(made, model(*given), atol=1e-6)
