"""Steps over [2, 4, width]."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.random_programs.program import WIDE, Draw, Program, even, sequence


@sequence
def linear(net: Program, h: Tensor, draw: Draw) -> Tensor:
    return net.layer(
        draw.place, lambda: nn.Linear(h.shape[-1], draw.among(8, 12, 24), bias=draw.among(True, False, by=1))
    )(h)


@sequence
def activation(net: Program, h: Tensor, draw: Draw) -> Tensor:
    return draw.among(torch.relu, torch.tanh, F.gelu, torch.sigmoid, F.silu, torch.cos)(h)


@sequence
def by_heads(net: Program, h: Tensor, draw: Draw) -> Tensor:
    heads = draw.among(2, 4)
    if not net.holds(draw, even(h.shape[-1], heads)):
        return h
    parts = h.view(*h.shape[:-1], heads, -1) if draw.among(True, False, by=1) else h.unflatten(-1, (heads, -1))
    return net.layer(draw.place, lambda: nn.Linear(parts.shape[-1], 6))(parts).flatten(-2)


@sequence
def interleaved(net: Program, h: Tensor, draw: Draw) -> Tensor:
    parts = draw.among(2, 4)
    if not net.holds(draw, even(h.shape[-1], parts)):
        return h
    return h.unflatten(-1, (parts, -1)).transpose(-1, -2).flatten(-2)


@sequence
def gated(net: Program, h: Tensor, draw: Draw) -> Tensor:
    parts = draw.among(2, 4)
    if not net.holds(draw, even(h.shape[-1], parts)):
        return h
    first, second, *rest = h.chunk(parts, -1)
    made = first * torch.sigmoid(second)
    return torch.cat([made, rest[0] + rest[1]], -1) if rest else made


@sequence
def joined(net: Program, h: Tensor, draw: Draw) -> Tensor:
    if not net.holds(draw, h.shape[-1] < WIDE):
        return h
    beside = draw.among(
        torch.relu, lambda h: h.flip(-1), lambda h: net.layer(draw.place, lambda: nn.Linear(h.shape[-1], 8))(h)
    )
    return torch.cat([h, beside(h)], -1)


@sequence
def repeated(net: Program, h: Tensor, draw: Draw) -> Tensor:
    if not net.holds(draw, h.shape[-1] < WIDE):
        return h
    return draw.among(
        lambda: h.repeat(1, 1, 2), lambda: h.repeat_interleave(2, -1), lambda: torch.stack([h, -h], -2).flatten(-2)
    )()


@sequence
def turned(net: Program, h: Tensor, draw: Draw) -> Tensor:
    return draw.among(lambda: h.roll(2, -1), lambda: h.flip(-1), lambda: h.roll(1, 1), lambda: h.flip(1))()


@sequence
def padded_or_sliced(net: Program, h: Tensor, draw: Draw) -> Tensor:
    if not net.holds(draw, 6 < h.shape[-1] < WIDE):
        return h
    padded = F.pad(h, (1, 2))
    return draw.among(
        lambda: padded, lambda: padded[..., 1:-2], lambda: h[..., 2:], lambda: h[..., ::2], lambda: h[..., :-1]
    )()


@sequence
def chosen(net: Program, h: Tensor, draw: Draw) -> Tensor:
    """Channels by a list of indices that a buffer holds."""
    name = f"order_{draw.place}"
    if not hasattr(net, name):
        order = random.Random(draw.place).sample(range(h.shape[-1]), max(4, draw.among(h.shape[-1], h.shape[-1] // 2)))
        net.register_buffer(name, torch.tensor(order))
    order = getattr(net, name)
    return h[..., order] if draw.among(True, False, by=1) else h.index_select(-1, order)


@sequence
def written(net: Program, h: Tensor, draw: Draw) -> Tensor:
    """Into every second place, or into the first half, of something new."""
    made = torch.zeros_like(h)
    if draw.among(True, False):
        made[..., ::2] = h[..., ::2]
        made[..., 1::2] += h[..., 1::2].tanh()
    else:
        made[..., : h.shape[-1] // 2] = h[..., h.shape[-1] - h.shape[-1] // 2 :]
    return made


@sequence
def normalised(net: Program, h: Tensor, draw: Draw) -> Tensor:
    width = h.shape[-1]
    return net.layer(draw.place, lambda: draw.among(nn.LayerNorm, nn.RMSNorm)(width))(h)


@sequence
def normalised_by_group(net: Program, h: Tensor, draw: Draw) -> Tensor:
    width = h.shape[-1]
    if not net.holds(draw, even(width, 4)):
        return h
    norm = net.layer(draw.place, lambda: draw.among(nn.GroupNorm(4, width), nn.BatchNorm1d(width)))
    return norm(h.transpose(1, 2)).transpose(1, 2)


@sequence
def convolved(net: Program, h: Tensor, draw: Draw) -> Tensor:
    width = h.shape[-1]
    groups = draw.among(1, 2, width) if net.holds(draw, even(width, 2)) else 1
    made = width if groups == width else draw.among(8, 12, by=1)
    return net.layer(draw.place, lambda: nn.Conv1d(width, made, 3, padding=1, groups=groups))(
        h.transpose(1, 2)
    ).transpose(1, 2)


@sequence
def every_pair(net: Program, h: Tensor, draw: Draw) -> Tensor:
    if not net.holds(draw, h.shape[-1] < WIDE):
        return h
    other = net.layer(draw.place, lambda: nn.Linear(h.shape[-1], 3))(h)
    pairs = h.unsqueeze(-1) * other.unsqueeze(-2)
    return (pairs if draw.among(True, False) else pairs.transpose(-1, -2)).flatten(-2)


@sequence
def summed(net: Program, h: Tensor, draw: Draw) -> Tensor:
    width = h.shape[-1]
    if net.holds(draw, even(width, 2)) and draw.among(True, False):
        return torch.einsum(
            "btgc,gcd->btgd", h.unflatten(-1, (2, -1)), net.tensor(draw.place, 2, width // 2, 5)
        ).flatten(-2)
    return torch.einsum("btc,cd->btd", h, net.tensor(draw.place, width, 10))


@sequence
def attention(net: Program, h: Tensor, draw: Draw) -> Tensor:
    packed = net.layer(draw.place, lambda: nn.Linear(h.shape[-1], 24))(h)
    parts = draw.among(
        lambda: packed.chunk(3, -1),
        lambda: packed.unflatten(-1, (3, -1)).unbind(-2),
        lambda: packed.unflatten(-1, (-1, 3)).unbind(-1),
    )()
    query, key, value = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in parts)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)


@sequence
def uneven_parts(net: Program, h: Tensor, draw: Draw) -> Tensor:
    if not net.holds(draw, h.shape[-1] > 8):
        return h
    first, second, third = h.split([2, 3, h.shape[-1] - 5], -1)
    parts = draw.among((third, first.tanh(), second), (second, third * 2, first), (third,))
    return torch.cat(parts, -1)


@sequence
def unbound(net: Program, h: Tensor, draw: Draw) -> Tensor:
    if not net.holds(draw, even(h.shape[-1], 3)):
        return h
    first, second, third = h.unflatten(-1, (3, -1)).unbind(-2)
    return torch.stack([first + second, third], draw.among(-1, -2)).flatten(-2)


@sequence
def scaled(net: Program, h: Tensor, draw: Draw) -> Tensor:
    width = h.shape[-1]
    if draw.among(True, False):
        return h / width**0.5
    return draw.among(torch.add, torch.mul, by=1)(
        h, net.tensor(draw.place, *draw.among((width,), (4, width), (1, 1, width), by=2))
    )


@sequence
def mixed(net: Program, h: Tensor, draw: Draw) -> Tensor:
    """Over channels, or steps."""
    return draw.among(
        lambda: h - h.mean(-1, keepdim=True),
        lambda: h.softmax(-1),
        lambda: h * (h >= h.topk(2, -1).values[..., -1:]),
        lambda: h.cumsum(1),
    )()


@sequence
def residual(net: Program, h: Tensor, draw: Draw) -> Tensor:
    width = h.shape[-1]
    return h + net.layer(draw.place, lambda: nn.Sequential(nn.Linear(width, 10), nn.ReLU(), nn.Linear(10, width)))(h)


@sequence
def across_steps(net: Program, h: Tensor, draw: Draw) -> Tensor:
    return net.layer(draw.place, lambda: nn.Linear(4, 4))(h.transpose(1, 2)).transpose(1, 2)


@sequence
def added_up(net: Program, h: Tensor, draw: Draw) -> Tensor:
    """Channels onto others, by indices that the forward computes."""
    if not net.holds(draw, even(h.shape[-1], 2)):
        return h
    half = h.shape[-1] // 2
    return h.new_zeros(*h.shape[:-1], half).index_add(-1, torch.arange(h.shape[-1]) % half, h)
