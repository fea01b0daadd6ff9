"""LoRAPrune: gradients estimated from adapters, followed while these are trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn

import depgraph
from depgraph.errors import ScoreError
from importance import Adapter, LoRAPrune, adapters_of
from tests.importance.toys import Weights, axis, hand_graph, member
from tests.zoo import MODULES, ZOO

A, B = [[1.0, 2.0]], [[1.0], [0.0]]
DA, DB = [[0.5, 0.0]], [[1.0], [2.0]]


def adapter(weight: Tensor, a: Any = A, b: Any = B, scale: float = 1.0, turned: bool = False) -> Adapter:
    """With the gradients of METHODS.md 2.20."""
    made = Adapter("one", weight, nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b)), scale, turned)
    made.a.grad, made.b.grad = torch.tensor(DA), torch.tensor(DB)
    return made


def test_gradients_are_estimated_from_those_of_the_factors() -> None:
    """METHODS.md 2.20: [[1, 2], [1, 4]]; where a weight is stored the other way round, its transpose."""
    torch.testing.assert_close(adapter(torch.zeros(2, 2)).gradient(), torch.tensor([[1.0, 2.0], [1.0, 4.0]]))
    torch.testing.assert_close(
        adapter(torch.zeros(2, 2), turned=True).gradient(), torch.tensor([[1.0, 1.0], [2.0, 4.0]])
    )
    torch.testing.assert_close(adapter(torch.ones(2, 2), scale=2.0).merged(), torch.tensor([[3.0, 5.0], [1.0, 1.0]]))


@pytest.mark.parametrize(("power", "rows"), [(1, [8, 9]), (2, [2.0**2 + 6.0**2, 1 + 8.0**2])])
def test_scores_are_of_the_merged_weight_and_normalised_per_module(power: int, rows: list[float]) -> None:
    """|G * (W + B A)| with W = [[1, 1], [1, 2]]: rows [2 + 6, 1 + 8], and a second module half as large, alike once normed."""
    model = Weights(w=[[1.0, 1.0], [1.0, 2.0]], v=[[0.0, 0.0], [0.0, 7.0]], alone=[1.0, 2.0])
    graph = hand_graph(
        model,
        axis("out", member("w", 0, [0, 1]), member("v", 0, [0, 1])),
        axis("in", member("w", 1, [0, 0])),
        axis("other", member("alone", 0, [0, 1])),
    )
    with torch.no_grad():
        model.v.copy_(model.w / 2)
    tracker = LoRAPrune(graph, [adapter(model.w), adapter(model.v, A, [[0.5], [0.0]])], power=power)
    tracker.adapters[1].a.grad, tracker.adapters[1].b.grad = torch.tensor(DA) * 2, torch.tensor(DB)
    one = np.array(rows) / np.linalg.norm(rows)
    tracker.update()
    second = tracker.adapters[1]
    mine = (second.gradient() * second.merged()).abs().pow(power).sum(dim=1).detach().numpy()
    found = tracker(graph)
    np.testing.assert_allclose(found["out"], one + mine / np.linalg.norm(mine), rtol=1e-6)
    np.testing.assert_allclose(found["in"], [1])
    assert found["other"].min() > max(found["out"].max(), 1)


def test_scores_are_a_running_mean_over_steps() -> None:
    model = Weights(w=[[1.0, 1.0], [1.0, 2.0]])
    graph = hand_graph(model, axis("out", member("w", 0, [0, 1])))
    tracker = LoRAPrune(graph, [adapter(model.w)])
    tracker.update()
    first = tracker(graph)["out"]
    tracker.adapters[0].b.grad = torch.tensor([[-1.0], [5.0]])
    tracker.update()
    alone = LoRAPrune(graph, tracker.adapters)
    alone.update()
    second = alone(graph)["out"]
    assert not np.allclose(first, second)
    np.testing.assert_allclose(tracker(graph)["out"], (0.09 * first + 0.1 * second) / 0.19)


def test_without_gradients_a_unit_is_worth_nothing() -> None:
    model = Weights(w=[[1.0, 1.0], [0.0, 0.0]])
    graph = hand_graph(model, axis("out", member("w", 0, [0, 1])))
    one = adapter(model.w)
    one.b.grad = torch.tensor([[1.0], [0.0]])
    tracker = LoRAPrune(graph, [one])
    tracker.update()
    np.testing.assert_allclose(tracker(graph)["out"], [1, 0])
    one.a.grad, one.b.grad = torch.zeros(1, 2), torch.zeros(2, 1)
    still = LoRAPrune(graph, [one])
    still.update()
    np.testing.assert_array_equal(still(graph)["out"], [0, 0])


def wrapped(name: str, kinds: Any, **options: Any) -> tuple[nn.Module, Any]:
    example = (MODULES | ZOO)[name]()
    targets = [n for n, m in example.model.named_modules() if isinstance(m, kinds) and getattr(m, "groups", 1) == 1]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False, **options)
    return peft.get_peft_model(example.model, config).eval(), example


def forms() -> dict[str, tuple[Any, dict[str, Any]]]:
    from transformers.pytorch_utils import Conv1D

    return {
        "llama_8_2": ((nn.Linear, nn.Embedding), {}),
        "gpt2": (Conv1D, {"fan_in_fan_out": True}),
        "residual_cnn": (nn.Conv2d, {}),
    }


@pytest.mark.parametrize("name", ["llama_8_2", "gpt2", "residual_cnn"])
def test_adapters_of_peft_are_those_that_it_adds(name: str) -> None:
    kinds, options = forms()[name]
    model, example = wrapped(name, kinds, **options)
    found = adapters_of(model)
    for one in found:
        layer = model.get_submodule(one.name.removesuffix(" (default)"))
        torch.testing.assert_close(one.scale * one.delta(one.b, one.a), layer.get_delta_weight("default").detach())
    graph = depgraph.trace(model, example.args, example.kwargs)
    tracker = LoRAPrune(graph)
    output = model(*example.args, **example.kwargs)
    (output if isinstance(output, Tensor) else output.logits).square().mean().backward()
    tracker.update()
    ranks = {a.name for a in graph.axes if all("lora" in m.target for m in a.members)}
    assert ranks and ranks.isdisjoint(tracker.axes)
    plan = graph.plan(tracker, depgraph.Target(params=0.9), only=tracker.axes)
    report = plan.apply_with_report()
    assert plan.removal and report.check.error < 1e-5


def test_what_is_missing_is_said() -> None:
    model = Weights(w=[[1.0, 1.0], [1.0, 2.0]])
    graph = hand_graph(model, axis("out", member("w", 0, [0, 1])))
    one = adapter(model.w)
    tracker = LoRAPrune(graph, [one])
    with pytest.raises(ScoreError, match="no gradients were taken in yet"):
        tracker(graph)
    tracker.update()
    before = tracker(graph)["out"]
    one.b.grad = torch.full((2, 1), float("nan"))
    with pytest.raises(ScoreError, match="gradients of adapter 'one' are NaN or infinite"):
        tracker.update()
    one.b.grad = None
    with pytest.raises(ScoreError, match="adapter 'one' has no gradients"):
        tracker.update()
    np.testing.assert_array_equal(tracker(graph)["out"], before)
    with pytest.raises(ScoreError, match="isn't the one that was followed"):
        tracker(hand_graph(model, axis("another", member("w", 0, [0, 1]))))
    with pytest.raises(ScoreError, match="no axis of the graph reaches a weight that has an adapter"):
        LoRAPrune(graph, [adapter(torch.zeros(2, 2))])
    with pytest.raises(ScoreError, match="has no LoRA adapter that is active"):
        LoRAPrune(graph)
    with pytest.raises(ScoreError, match="decay must be from 0"):
        LoRAPrune(graph, [one], decay=1)
