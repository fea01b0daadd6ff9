"""Small stacks of residual blocks, with a plain way to run them without some of their parts."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph

PARTS = ("attention", "mlp")


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.queries, self.keys = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.values, self.out = nn.Linear(width, width), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        scores = self.queries(x) @ self.keys(x).transpose(1, 2)
        return self.out(scores.softmax(-1) @ self.values(x))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 12), nn.Linear(12, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x)).relu())


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(width), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class Decoder(nn.Module):
    """Token ids [samples, tokens] -> logits [samples, tokens, 11], through layers of an attention and an MLP each."""

    def __init__(self, layers: int, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def decoder(layers: int, seed: int = 0, identity: int | None = None) -> Decoder:
    """A decoder with random weights in float64, one of whose layers may do nothing."""
    torch.manual_seed(seed)
    model = Decoder(layers).double().eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.4
    if identity is not None:
        layer: Any = model.layers[identity]
        layer.attention.out.weight.data.zero_()
        layer.mlp.down.weight.data.zero_()
    return model


def without(model: Decoder, tokens: Tensor, gone: Collection[str]) -> Tensor:
    """The logits without the named layers ("layers.1") and parts of layers ("layers.1.mlp"), in plain code."""
    with torch.no_grad():
        x = model.embedding(tokens)
        for k, layer in enumerate(model.layers):
            for part in PARTS:
                if not {f"layers.{k}", f"layers.{k}.{part}"} & set(gone):
                    x = x + getattr(layer, part)(x)
        return model.head(model.norm(x))


def texts(count: int = 2, samples: int = 2, tokens: int = 5) -> list[Tensor]:
    """Batches of token ids."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 11, (samples, tokens), generator=generator) for _ in range(count)]


def taught(model: Decoder, count: int = 2) -> list[dict[str, Tensor]]:
    """Batches with what the whole model tells, which no other tells better."""
    return [{"tokens": ids, "told": without(model, ids, ()).softmax(-1)} for ids in texts(count)]


def untaught(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy with what the whole model tells."""
    return F.cross_entropy(output.flatten(0, 1), batch["told"].flatten(0, 1))


def traced(model: nn.Module, *inputs: Tensor) -> depgraph.DependencyGraph:
    return depgraph.trace(model, inputs or (texts()[0],))
