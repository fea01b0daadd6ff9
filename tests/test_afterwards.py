"""What people do with a pruned module: train, compile, copy, save weights, put adapters on it, prune it again."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
import importance

IDS = torch.arange(20).reshape(2, 10)


def llama() -> tuple[nn.Module, Tensor]:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval(), IDS


def cnn() -> tuple[nn.Module, Tensor]:
    layers = [
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, groups=2),
        nn.AdaptiveAvgPool2d(1),
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 5)).eval(), torch.randn(2, 3, 9, 9)


def pruned(make: Callable[[], tuple[nn.Module, Tensor]], share: float = 0.7) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, inputs = make()
    return depgraph.trace(model, inputs).plan(importance.Magnitude(), depgraph.Target(params=share)).apply(), inputs


def first(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]  # type: ignore[index, return-value]


@pytest.mark.parametrize("make", [llama, cnn])
def test_it_trains_compiles_copies_and_gives_its_weights_away(make: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    model, inputs = pruned(make)
    expected = first(model(inputs)).detach()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(first(twin(inputs)), expected)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(first(compiled(inputs)), expected, atol=1e-5)
    half = copy.deepcopy(model).to(torch.bfloat16)
    given = inputs if inputs.dtype == torch.long else inputs.to(torch.bfloat16)
    assert first(half(given)).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [llama, cnn])
def test_the_loss_falls(make: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    model, inputs = pruned(make)
    model.train()
    optimiser, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for _ in range(12):
        logits = first(model(inputs)).flatten(0, -2)
        loss = F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[-1])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_adapters_go_on_top_and_come_off_again() -> None:
    model, ids = pruned(llama)
    expected = model(ids).logits.detach()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    assert torch.allclose(adapted(ids).logits, expected, atol=1e-5)
    adapted.train()
    adapted(input_ids=ids, labels=ids).loss.backward()
    moved = [p for n, p in adapted.named_parameters() if "lora_B" in n]
    assert moved and all(p.grad is not None and p.grad.any() for p in moved)
    merged = adapted.eval().merge_and_unload()
    assert type(merged) is type(model)
    assert torch.allclose(merged(ids).logits, expected, atol=1e-5)


def test_a_model_with_adapters_is_pruned_with_them() -> None:
    model, ids = llama()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    graph = depgraph.trace(adapted, kwargs={"input_ids": ids})
    report = graph.plan(importance.Magnitude(), depgraph.Target(params=0.7)).apply_with_report()
    assert report.form == "module"
    assert report.check.error <= report.check.tolerance < report.check.sensitivity
    trainable = [p for p in report.model.parameters() if p.requires_grad]
    assert len(trainable) == len([p for p in adapted.parameters() if p.requires_grad])


def test_what_was_cut_is_cut_again() -> None:
    model, ids = pruned(llama, 0.8)
    again = depgraph.trace(model, ids).plan(importance.Magnitude(), depgraph.Target(params=0.7)).apply_with_report()
    assert again.check.error <= again.check.tolerance < again.check.sensitivity
    generated = again.model.generate(ids, max_new_tokens=4, do_sample=False)
    uncached = again.model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(generated, uncached)


class Unrolled(nn.Module):
    """Takes three steps and no others in a graph, has a buffer that isn't saved and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cell, self.second = nn.Linear(6, 16), nn.GRUCell(16, 16), nn.Linear(6, 16)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.rand(16), persistent=False)
        self.rnn, self.head = nn.GRU(16, 12, batch_first=True), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        state = torch.zeros(len(x), 16)
        states = []
        for step in range(x.shape[1]):
            state = self.cell(self.first(x[:, step]) + self.second(x[:, step]), state)
            states.append(state * self.scale)
        return {"scores": self.head(self.rnn(torch.stack(states, 1))[0])}


def _pickled(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


@pytest.mark.parametrize("again", [copy.deepcopy, _pickled])
def test_a_copy_of_a_graph_form_is_one_too(again: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    inputs = torch.randn(2, 3, 6)
    plan = depgraph.trace(Unrolled(), inputs).plan(importance.Magnitude(), depgraph.Target(params=0.7), form="graph")
    model = plan.apply(form="graph")
    seen: list[Any] = []
    model.register_forward_hook(lambda *given: seen.append(given)) if again is copy.deepcopy else None
    twin = again(again(model))
    assert torch.equal(twin(inputs)["scores"], model(inputs)["scores"])
    assert len(seen) == (2 if again is copy.deepcopy else 0)
    assert list(twin.state_dict()) == list(model.state_dict()) and "scale" not in twin.state_dict()
    assert twin.first.weight is twin.second.weight is not model.first.weight
    assert [node.name for node in twin.graph.nodes] == [node.name for node in model.graph.nodes]  # type: ignore[operator, union-attr]
    for one in (model, twin):
        with pytest.raises(depgraph.errors.CaptureError, match="takes only size 3 of dimension 1 of 'x', not 2"):
            one(inputs[:, :2])
    with torch.no_grad():
        twin.train()(inputs)["scores"].sum()
    depgraph.save(twin, tmp_path / "twin")
    loaded = depgraph.load(tmp_path / "twin", model=Unrolled)
    assert torch.equal(loaded(inputs)["scores"], model(inputs)["scores"])
    shorter = depgraph.trace(twin, inputs).plan(importance.Magnitude(), depgraph.Target(params=0.8)).apply_with_report()
    assert shorter.check.error <= shorter.check.tolerance < shorter.check.sensitivity
