"""Branches and blocks: found in any model's graph, left out of the captured program, refused with a reason."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import depgraph
from depgraph.cutting.bypassing import bypassed
from depgraph.errors import PlanError

from .zoo import MODULES, ZOO, Example, randomise

ATTENTION_AND_MLP = {"attention": 2, "mlp": 2}
ENCODER_DECODER = {"attention": 6, "mlp": 4}

# What is in each model: its branches by kind, and its blocks. Two layers each, or two and two of encoder and decoder.
FOUND: dict[str, tuple[dict[str, int], int]] = {
    "resnet_basic": ({"convolution": 2}, 2),  # the first block of each stage has a projection
    "resnet_bottleneck": ({"convolution": 2}, 2),
    "regnet": ({"convolution": 2}, 2),
    "mobilenet_v2": ({"convolution": 10}, 10),
    "convnext": ({"convolution": 4}, 4),
    "vit": (ATTENTION_AND_MLP, 2),
    "swin": ({"attention": 4, "mlp": 4}, 4),
    "segformer": ({"attention": 4, "convolution": 4}, 4),  # its MLPs have a depthwise convolution
    "dinov2": (ATTENTION_AND_MLP, 2),  # with layer scale
    "clip": ({"attention": 4, "mlp": 4}, 4),
    "bert_masked_lm": (ATTENTION_AND_MLP, 2),
    "distilbert": (ATTENTION_AND_MLP, 2),
    "deberta_v2": (ATTENTION_AND_MLP, 2),
    "t5": (ENCODER_DECODER, 4),
    "bart": (ENCODER_DECODER, 4),
    "whisper": (ENCODER_DECODER, 4),
    "gpt2": (ATTENTION_AND_MLP, 2),
    "opt": (ATTENTION_AND_MLP, 2),
    "gptj": (ATTENTION_AND_MLP, 2),
    "gpt_neox": (ATTENTION_AND_MLP, 2),
    "bloom": (ATTENTION_AND_MLP, 2),
    "falcon_multi_query": (ATTENTION_AND_MLP, 2),
    "falcon_grouped_query": (ATTENTION_AND_MLP, 2),
    "llama_8_4": (ATTENTION_AND_MLP, 2),
    "qwen3": (ATTENTION_AND_MLP, 2),
    "gemma2": (ATTENTION_AND_MLP, 2),  # norms before and after each branch
    "phi": (ATTENTION_AND_MLP, 2),
    "olmo2": (ATTENTION_AND_MLP, 2),  # norms after each branch
    "mamba": ({"other": 2}, 2),
    "mixtral": (ATTENTION_AND_MLP, 2),
    "gpt_oss": (ATTENTION_AND_MLP, 2),
    "deepseek_v3": ({"attention": 2, "mlp": 3}, 2),  # routed and shared experts are two branches of one stream
    "residual_cnn": ({"convolution": 2}, 0),
    "dense_net": ({}, 0),
    "unet_transposed": ({}, 0),
    "channel_shuffle": ({}, 0),
    "squeeze_excitation": ({}, 0),
    "transformer_encoder": (ATTENTION_AND_MLP, 2),
    "transformer_layer_norm_first": ({"attention": 1, "mlp": 1}, 0),
    "lstm_both_ways": ({}, 0),
}


@cache
def traced(name: str) -> tuple[Example, depgraph.DependencyGraph]:
    example = {**ZOO, **MODULES}[name]()
    return example, depgraph.trace(example.model, example.args, example.kwargs)


def outputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return [t for t in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, Tensor)]


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference, as a share of the largest number in the same output."""
    pairs = list(zip(found, wanted, strict=True))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs if b.is_floating_point())


def without(model: nn.Module, parameters: tuple[str, ...]) -> nn.Module:
    """A copy in which the named parameters are zero."""
    zeroed = copy.deepcopy(model)
    held = dict(zeroed.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name in parameters:
            held[name].zero_()
    return zeroed


@pytest.mark.parametrize("name", FOUND)
def test_finds_the_branches_and_blocks_of(name: str) -> None:
    _, graph = traced(name)
    kinds, blocks = FOUND[name]
    assert Counter(branch.kind for branch in graph.branches) == kinds
    assert len(graph.blocks) == blocks
    names = [part.name for part in (*graph.branches, *graph.blocks)]
    assert len(set(names)) == len(names)
    assert [branch.order for branch in graph.branches] == list(range(len(graph.branches)))


@pytest.mark.parametrize("name", [name for name, (kinds, _) in FOUND.items() if kinds])
def test_a_branch_that_is_left_out_gives_what_zero_weights_give(name: str) -> None:
    """Just its own nodes go, and the rest computes what the model computes when all that the branch holds is zero."""
    example, graph = traced(name)
    args, kwargs = example.args, example.kwargs
    original = outputs(example.model, args, kwargs)
    assert distance(bypassed(graph, ()).run(args, kwargs), original) < 1e-5
    for branch in (graph.branches[0], graph.branches[-1]):
        program = bypassed(graph, [branch.name])
        assert program.gone == {*branch.nodes, branch.add}
        found = program.run(args, kwargs)
        assert distance(found, outputs(without(example.model, branch.parameters), args, kwargs)) < 1e-5
        assert distance(found, original) > 1e-4


@pytest.mark.parametrize("name", [name for name, (_, blocks) in FOUND.items() if blocks])
def test_all_branches_and_blocks_can_go_at_once(name: str) -> None:
    example, graph = traced(name)
    program = bypassed(graph, [part.name for part in (*graph.branches, *graph.blocks)])
    wanted = outputs(example.model, example.args, example.kwargs)
    found = program.run(example.args, example.kwargs)
    assert [t.shape for t in found] == [t.shape for t in wanted]
    assert program.gone >= {n for branch in graph.branches for n in branch.nodes}
    assert program.gone >= {n for block in graph.blocks for n in block.nodes}


def test_a_block_that_is_left_out_is_a_layer_less() -> None:
    example, graph = traced("llama_8_4")
    block = graph.blocks[1]
    assert (block.name, block.container, block.index) == ("model.layers.1", "model.layers", 1)
    assert block.branches == ("model.layers.1.self_attn", "model.layers.1.mlp")
    shorter = copy.deepcopy(example.model)
    del shorter.model.layers[1]
    shorter.config.num_hidden_layers = 1
    found = bypassed(graph, ["model.layers.1"]).run(example.args, example.kwargs)
    assert distance(found, outputs(shorter, example.args, example.kwargs)) < 1e-5
    layer = sum(p.numel() for p in example.model.model.layers[1].parameters())
    assert block.params == layer == graph.cost().params - sum(p.numel() for p in shorter.parameters())


def test_a_branch_says_what_it_costs() -> None:
    example, graph = traced("llama_8_4")
    attention, mlp = graph.branches[:2]
    layer = example.model.model.layers[0]
    assert attention.params == sum(p.numel() for m in (layer.self_attn, layer.input_layernorm) for p in m.parameters())
    assert mlp.macs == 3 * 7 * 3 * 56 * 80  # tokens, and three products
    assert attention.source == "embedding" and mlp.source == attention.add


class Mixer(nn.Module):
    """Two MLP-Mixer layers by hand, each over tokens and then over channels."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList([nn.LayerNorm(10), nn.LayerNorm(10)])
            self.tokens = nn.Sequential(nn.Linear(7, 16), nn.GELU(), nn.Linear(16, 7))
            self.channels = nn.Sequential(nn.Linear(10, 24), nn.GELU(), nn.Linear(24, 10))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
            return x + self.channels(self.norms[1](x))

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.Layer(), self.Layer()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_mixer_has_two_branches_a_layer() -> None:
    graph = depgraph.trace(Mixer().eval(), (torch.randn(2, 7, 10),))
    assert [(branch.name, branch.kind) for branch in graph.branches] == [
        (f"layers.{k}.{part}", "mlp") for k in range(2) for part in ("tokens", "channels")
    ]
    assert [block.name for block in graph.blocks] == ["layers.0", "layers.1"]
    assert "layers.0.norms.0.weight" in graph.branches[0].parameters


class Joined(nn.Module):
    """A stream of ten numbers and a branch of two layers, joined as `join` says."""

    def __init__(self, join: Callable[[nn.Module, Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.first = nn.Linear(10, 10)
        self.up, self.down = nn.Linear(10, 24), nn.Linear(24, 10)
        self.shortcut = nn.Linear(10, 10)
        self.scale = nn.Parameter(torch.ones(10))
        self.last = nn.Linear(10, 3)
        self.join = join

    def forward(self, x: Tensor) -> Any:
        stream = self.first(x)
        inner = self.up(stream).relu()
        joined = self.join(self, stream, inner, self.down(inner))
        return (self.last(joined[0]), *joined[1:]) if isinstance(joined, tuple) else self.last(joined)


def joined(join: Callable[[Any, Tensor, Tensor, Tensor], Any]) -> tuple[Joined, depgraph.DependencyGraph, Tensor]:
    model, x = Joined(join).eval(), torch.randn(4, 10)
    randomise(model, 0)
    return model, depgraph.trace(model, (x,)), x


@pytest.mark.parametrize(
    "join",
    [
        lambda m, s, inner, f: s + f,
        lambda m, s, inner, f: f + s,
        lambda m, s, inner, f: s - f,
        lambda m, s, inner, f: torch.add(s, f, alpha=0.5),
        lambda m, s, inner, f: f.add_(s),
        lambda m, s, inner, f: s.add_(f),
        lambda m, s, inner, f: f.mul_(m.scale).add_(s).relu_(),
        lambda m, s, inner, f: s + m.scale * f,
        lambda m, s, inner, f: torch.addcmul(s, m.scale, f),
        lambda m, s, inner, f: torch.addmm(s, inner, m.down.weight.T),
        lambda m, s, inner, f: (s + f).relu_(),
        lambda m, s, inner, f: (s + f, s),
        lambda m, s, inner, f: ((s + f).relu_(), s),
        lambda m, s, inner, f: nn.functional.layer_norm(s + f, (10,)),
        lambda m, s, inner, f: s.view(2, 2, 10).add(f.view(2, 2, 10)).view(4, 10),
    ],
)
def test_a_residual_however_it_is_written_is_one_branch(join: Callable[[Any, Tensor, Tensor, Tensor], Any]) -> None:
    model, graph, x = joined(join)
    (branch,) = graph.branches
    assert not graph.branches_refused
    assert {"up.weight", "up.bias", "down.weight"} <= set(branch.parameters)
    assert "first.weight" not in branch.parameters
    wanted = outputs(without(model, branch.parameters), (x,), {})
    assert distance(bypassed(graph, [branch.name]).run((x,), {}), wanted) < 1e-6


@pytest.mark.parametrize(
    ("join", "why"),
    [
        (lambda m, s, inner, f: m.shortcut(s) + f, "its shortcut isn't plain: it goes through linear"),
        (lambda m, s, inner, f: 2 * s + f, "its stream is multiplied before it is added, at mul"),
        (lambda m, s, inner, f: torch.add(f, s, alpha=2), "the stream is multiplied where it is added, at add"),
        (lambda m, s, inner, f: s + f * inner.mean() + m.shortcut(inner[:, :10]), "relu, inside it, is also read by"),
        (lambda m, s, inner, f: (s + f, inner), "relu, inside it, is also an output of the model"),
        (lambda m, s, inner, f: s.tanh() + f, "its shortcut isn't plain: it goes through tanh"),
        (lambda m, s, inner, f: s[:1] + f, "its shortcut isn't plain: it goes through slice"),
    ],
)
def test_what_cannot_go_says_why(join: Callable[[Any, Tensor, Tensor, Tensor], Any], why: str) -> None:
    _, graph, _ = joined(join)
    assert not graph.branches
    assert any(why in reason for reason in graph.branches_refused.values()), graph.branches_refused


@pytest.mark.parametrize(
    "join",
    [
        lambda m, s, inner, f: f,
        lambda m, s, inner, f: torch.cat([s, f], 1)[:, :10],
        lambda m, s, inner, f: s * f,
        lambda m, s, inner, f: f + 0.04 * f**3,
        lambda m, s, inner, f: f * s.cos() + f.flip(1) * s.sin(),
    ],
)
def test_what_is_no_residual_is_neither_found_nor_refused(join: Callable[[Any, Tensor, Tensor, Tensor], Any]) -> None:
    _, graph, _ = joined(join)
    assert not graph.branches and not graph.blocks
    assert not graph.branches_refused


class Pairs(nn.Module):
    """Pairs of an attention and an MLP, whose additions stand in the model around them; all read one mask, one reads the next."""

    def __init__(self, shared: bool = False, maps: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [nn.MultiheadAttention(12, 3, batch_first=True), nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 12))]
            )
            for _ in range(2)
        )
        self.shared, self.maps = shared, maps

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        maps: list[Tensor] = []
        for attention, mlp in self.layers:  # type: ignore[misc]
            mixed, weights = attention(x, x, x, attn_mask=mask, need_weights=self.shared or self.maps)
            if self.shared and maps:
                mixed = mixed * maps[0].sum()
            maps.append(weights)
            x = x + mixed
            x = x + mlp(x)
        return (x, *maps) if self.maps else (x,)


def pairs(**options: bool) -> tuple[Pairs, depgraph.DependencyGraph, tuple[Tensor, Tensor]]:
    model, inputs = Pairs(**options).eval(), (torch.randn(2, 5, 12), torch.randn(6, 5, 5))
    randomise(model, 0)
    return model, depgraph.trace(model, inputs), inputs


def test_additions_may_stand_outside_of_the_block_that_they_belong_to() -> None:
    model, graph, inputs = pairs()
    assert [branch.name for branch in graph.branches] == ["layers.0.0", "layers.0.1", "layers.1.0", "layers.1.1"]
    assert [branch.kind for branch in graph.branches] == ["attention", "mlp"] * 2
    assert [block.name for block in graph.blocks] == ["layers.0", "layers.1"]
    found = bypassed(graph, ["layers.0"]).run(inputs, {})
    del model.layers[0]
    assert distance(found, outputs(model, inputs, {})) < 1e-5


def test_attention_maps_that_are_outputs_or_read_by_the_next_layer_keep_their_attention() -> None:
    _, graph, _ = pairs(maps=True)
    assert [branch.kind for branch in graph.branches] == ["mlp", "mlp"] and not graph.blocks
    assert "also an output of the model" in graph.branches_refused["layers.0.0"]
    _, graph, _ = pairs(shared=True)
    assert [branch.name for branch in graph.branches] == ["layers.0.1", "layers.1.0", "layers.1.1"]
    assert "is also read by" in graph.branches_refused["layers.0.0"]
    assert [block.name for block in graph.blocks] == ["layers.1"]
    assert graph.branches_refused["layers.0"].startswith("layers.0.0 can't go: softmax, inside it, is also read by")


class InPlace(nn.Module):
    """Two residual blocks of convolutions whose norms, additions and activations write in place, as most ResNets do."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            out = self.relu(self.norm(self.conv(x)))
            out += x
            return self.relu(out)  # type: ignore[no-any-return]

    def __init__(self) -> None:
        super().__init__()
        self.first, self.stage = nn.Conv2d(3, 6, 1), nn.Sequential(self.Block(), self.Block())

    def forward(self, x: Tensor) -> list[Tensor]:
        early = self.first(x)
        return [early, self.stage(early)]


def test_what_is_written_in_place_goes_with_its_block() -> None:
    model, x = InPlace().eval(), torch.randn(1, 3, 5, 5)
    randomise(model, 0)
    graph = depgraph.trace(model, (x,))
    assert [block.name for block in graph.blocks] == ["stage.0", "stage.1"]
    assert all(len(block.nodes) == 5 for block in graph.blocks)  # a convolution, a norm, two activations, an addition
    for k, block in enumerate(graph.blocks):
        shorter = copy.deepcopy(model)
        del shorter.stage[k]
        assert distance(bypassed(graph, [block.name]).run((x,), {}), outputs(shorter, (x,), {})) < 1e-6
    for branch in graph.branches:
        found = bypassed(graph, [branch.name]).run((x,), {})
        assert distance(found, outputs(without(model, branch.parameters), (x,), {})) < 1e-6


def test_names_that_are_no_branch_are_refused_with_the_reason() -> None:
    _, graph = traced("resnet_basic")
    with pytest.raises(PlanError, match="its shortcut isn't plain"):
        bypassed(graph, ["resnet.encoder.stages.0.layers.0"])
    with pytest.raises(PlanError, match="no such branch or block"):
        bypassed(graph, ["layers.7"])
