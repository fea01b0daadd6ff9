"""Hand-written modules on sequences and vectors: attention in its many spellings, gates, ties and bare parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AttentionBlock(nn.Module):
    """``nn.MultiheadAttention`` as self-attention in a pre-norm residual block, then an MLP."""

    def __init__(self, width: int = 80, heads: int = 8, inner: int = 52) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return self.head(x + self.mlp(x))


class Embedded(nn.Module):
    """A body between an input projection and a head, so that its width is free to change."""

    def __init__(self, body: nn.Module, width: int, inputs: int = 14) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, width)
        self.body = body
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x)))


def multihead_attention() -> nn.Module:
    block = AttentionBlock()
    return nn.Sequential(nn.Linear(14, 80), block)


def transformer_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(80, 8, dim_feedforward=52, batch_first=True)
    return Embedded(nn.TransformerEncoder(layer, num_layers=2), 80)


def transformer_layer_norm_first() -> nn.Module:
    layer = nn.TransformerEncoderLayer(80, 8, dim_feedforward=52, activation="gelu", batch_first=True, norm_first=True)
    return Embedded(layer, 80)


class FusedAttention(nn.Module):
    """One projection for queries, keys and values, taken apart with ``unbind``."""

    def __init__(self, width: int = 56, heads: int = 8, head_dim: int = 12) -> None:
        super().__init__()
        self.num_heads = heads
        self.head_dim = head_dim
        self.qkv = nn.Linear(width, 3 * heads * head_dim)
        self.proj = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(out.transpose(1, 2).reshape(batch, tokens, -1))


class EinsumAttention(nn.Module):
    """Attention whose scores and mixture are written with ``torch.einsum``."""

    def __init__(self, width: int = 56, heads: int = 8, head_dim: int = 12) -> None:
        super().__init__()
        self.num_heads = heads
        self.q, self.k, self.v = (nn.Linear(width, heads * head_dim, bias=bias) for bias in (True, False, True))
        self.proj = nn.Linear(heads * head_dim, width)
        self.scale = head_dim**-0.5

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.num_heads, -1)) for p in (self.q, self.k, self.v))
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * self.scale).softmax(-1)
        return x + self.proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


class HandRMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class GroupedQueryAttention(nn.Module):
    """Eight query heads on four KV heads, repeated with ``expand`` and ``reshape``."""

    def __init__(self, width: int = 56, heads: int = 8, kv_heads: int = 4, head_dim: int = 12) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.norm = HandRMSNorm(width)
        self.q = nn.Linear(width, heads * head_dim, bias=False)
        self.k = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.v = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, width, bias=False)

    def repeat(self, x: Tensor) -> Tensor:
        batch, heads, tokens, dim = x.shape
        times = self.heads // self.kv_heads
        return x[:, :, None].expand(batch, heads, times, tokens, dim).reshape(batch, heads * times, tokens, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        h = self.norm(x)
        q = self.q(h).view(batch, tokens, self.heads, self.head_dim).transpose(1, 2)
        k = self.repeat(self.k(h).view(batch, tokens, self.kv_heads, self.head_dim).transpose(1, 2))
        v = self.repeat(self.v(h).view(batch, tokens, self.kv_heads, self.head_dim).transpose(1, 2))
        weights = torch.softmax(q @ k.transpose(-1, -2) * self.head_dim**-0.5, dim=-1)
        return x + self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, self.heads * self.head_dim))


class GatedChunk(nn.Module):
    """A GLU whose halves come from ``chunk``."""

    def __init__(self, width: int = 20, inner: int = 44) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * inner)
        self.down = nn.Linear(inner, 5)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class SplitSizes(nn.Module):
    """One projection split into parts of unequal sizes, which go different ways."""

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.sizes = [24, 16, 12]
        self.fused = nn.Linear(width, sum(self.sizes))
        self.left = nn.Linear(24, 5)
        self.right = nn.Linear(16 + 12, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = torch.split(self.fused(x), self.sizes, dim=-1)
        return self.left(torch.tanh(a)) + self.right(torch.cat([F.gelu(c), b], -1))


class BareParameters(nn.Module):
    """A class token, a position table and a learned scale that no submodule owns."""

    def __init__(self, width: int = 36, tokens: int = 7) -> None:
        super().__init__()
        self.embed = nn.Linear(14, width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, tokens + 1, width))
        self.scale = nn.Parameter(torch.full((width,), 1e-6))
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        x = x + self.scale * torch.tanh(self.mix(x))
        return self.head(x[:, 0] + x.mean(1))


class PatchEmbedding(nn.Module):
    """An image as a sequence of patches: convolution, ``flatten``, ``transpose``, norm."""

    def __init__(self, width: int = 36) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, 4, stride=4)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 52), nn.GELU(), nn.Linear(52, width))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x).flatten(2).transpose(1, 2)
        return self.head((x + self.mlp(self.norm(x))).mean(dim=1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(14, 44), nn.ReLU(), nn.Linear(44, 28), nn.LayerNorm(28), nn.GELU(), nn.Linear(28, 5))


class LiteralSizes(nn.Module):
    """Its forward contains a size as a number: 32 is taken for 4 x 8, whatever the layers say."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(14, 32)
        self.second = nn.Linear(32, 20)
        self.last = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x)).view(x.shape[0], 4, 8)
        return self.last(torch.tanh(self.second(h.transpose(1, 2).reshape(x.shape[0], 32))))


class UsedTwice(nn.Module):
    """One submodule called twice, once on its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(14, 36)
        self.shared = nn.Sequential(nn.LayerNorm(36), nn.Linear(36, 52), nn.GELU(), nn.Linear(52, 36))
        self.head = nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.shared(x)
        return self.head(x + self.shared(x))


class TiedWeights(nn.Module):
    """An embedding that is the output layer, and an autoencoder that uses one matrix both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(101, 36)
        self.encode = nn.Linear(36, 52)
        self.shift = nn.Parameter(torch.zeros(36))
        self.output = nn.Linear(36, 101, bias=False)
        self.output.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + F.linear(torch.tanh(self.encode(x)), self.encode.weight.t(), self.shift)
        return self.output(x)


class TwoInputs(nn.Module):
    """A vector and a sequence come in; a dict with two entries comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.Linear(10, 36)
        self.sequence = nn.Linear(14, 36)
        self.join = nn.Linear(2 * 36, 28)
        self.scores = nn.Linear(28, 5)
        self.value = nn.Linear(36, 1)

    def forward(self, vector: Tensor, *, sequence: Tensor) -> dict[str, Tensor]:
        v = torch.relu(self.vector(vector))
        s = torch.tanh(self.sequence(sequence))
        joined = torch.cat([v[:, None].expand_as(s), s], dim=-1)
        return {"scores": self.scores(F.gelu(self.join(joined))), "value": self.value(v * s.mean(1))}
