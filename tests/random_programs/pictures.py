"""Steps over [2, channels, height, width]."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.random_programs.program import WIDE, Draw, Program, even, picture


@picture
def convolution(net: Program, h: Tensor, draw: Draw) -> Tensor:
    window = draw.among(1, 3, by=1)
    made, bias = draw.among(8, 12, 16, 24), draw.among(True, False, by=2)
    return net.layer(draw.place, lambda: nn.Conv2d(h.shape[1], made, window, padding=window // 2, bias=bias))(h)


@picture
def grouped_convolution(net: Program, h: Tensor, draw: Draw) -> Tensor:
    width = h.shape[1]
    groups = draw.among(2, 4, width)
    if not net.holds(draw, width % groups == 0 and width < WIDE):
        return h
    made = draw.among(width, 2 * width, by=1) if groups == width else draw.among(8, 16, by=1)
    return net.layer(draw.place, lambda: nn.Conv2d(width, made, 3, padding=1, groups=groups))(h)


@picture
def rectified(net: Program, h: Tensor, draw: Draw) -> Tensor:
    width = h.shape[1]
    return draw.among(F.relu, F.hardswish, F.elu, torch.tanh, net.layer(draw.place, lambda: nn.PReLU(width)))(h)


@picture
def norm(net: Program, h: Tensor, draw: Draw) -> Tensor:
    width = h.shape[1]
    if draw.among(True, False, False, False):
        return net.layer(draw.place, lambda: nn.LayerNorm(width))(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    groups = draw.among(2, 4, by=1) if net.holds(draw, width % 4 == 0) else 1
    kinds = nn.BatchNorm2d(width), nn.GroupNorm(groups, width), nn.InstanceNorm2d(width, affine=True)
    return net.layer(draw.place, lambda: draw.among(*kinds, by=2))(h)


@picture
def resized(net: Program, h: Tensor, draw: Draw) -> Tensor:
    small = net.holds(draw, h.shape[2] < 8)
    larger = draw.among(
        lambda: F.interpolate(h, scale_factor=2), lambda: F.interpolate(h, scale_factor=2, mode="bilinear")
    )
    smaller = draw.among(lambda: F.avg_pool2d(h, 2), lambda: F.max_pool2d(h, 3, 2, 1))
    return larger() if small else smaller()


@picture
def shuffled(net: Program, h: Tensor, draw: Draw) -> Tensor:
    parts = draw.among(2, 4)
    if not net.holds(draw, even(h.shape[1], parts)):
        return h
    n, width, *space = h.shape
    by_hand = h.view(n, parts, width // parts, *space).transpose(1, 2).reshape(n, width, *space)
    return by_hand if draw.among(True, False, by=1) else F.channel_shuffle(h, parts)


@picture
def squeezed(net: Program, h: Tensor, draw: Draw) -> Tensor:
    """Squeeze and excitation; scales and shifts that a map computes; a gate over places."""
    width, seen = h.shape[1], h.mean((2, 3))
    if draw.among(True, False):
        gate = net.layer(
            draw.place, lambda: nn.Sequential(nn.Linear(width, 6), nn.ReLU(), nn.Linear(6, width), nn.Sigmoid())
        )
        return h * gate(seen)[..., None, None]
    if draw.among(True, False, by=1):
        scale, shift = net.layer(draw.place, lambda: nn.Linear(width, 2 * width))(seen)[..., None, None].chunk(2, 1)
        return h * (1 + scale) + shift
    both = torch.cat([h.mean(1, keepdim=True), h.amax(1, keepdim=True)], 1)
    return h * torch.sigmoid(net.layer(draw.place, lambda: nn.Conv2d(2, 1, 3, padding=1))(both))


@picture
def dense(net: Program, h: Tensor, draw: Draw) -> Tensor:
    if not net.holds(draw, h.shape[1] < 20):
        return h
    for k in range(2):
        h = torch.cat([h, F.relu(net.layer((draw.place, k), lambda h=h: nn.Conv2d(h.shape[1], 4, 3, padding=1))(h))], 1)  # type: ignore[misc]
    return h


@picture
def halves(net: Program, h: Tensor, draw: Draw) -> Tensor:
    if not net.holds(draw, even(h.shape[1], 2)):
        return h
    first, second = h.chunk(2, 1)
    second = net.layer(draw.place, lambda: nn.Conv2d(h.shape[1] // 2, h.shape[1] // 2, 3, padding=1))(second)
    return draw.among(
        lambda: torch.cat([first, second], 1), lambda: torch.cat([second, first], 1), lambda: first * second.sigmoid()
    )()


@picture
def bottleneck(net: Program, h: Tensor, draw: Draw) -> Tensor:
    width, inner = h.shape[1], draw.among(10, 2 * h.shape[1])

    def layers() -> nn.Module:
        before, deep = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        return nn.Sequential(before, nn.BatchNorm2d(inner), nn.ReLU6(), deep, nn.ReLU6(), nn.Conv2d(inner, width, 1))

    return h + net.layer(draw.place, layers)(h)


@picture
def transposed(net: Program, h: Tensor, draw: Draw) -> Tensor:
    if not net.holds(draw, h.shape[2] < 8 and h.shape[1] % 2 == 0):
        return h
    return net.layer(
        draw.place, lambda: nn.ConvTranspose2d(h.shape[1], draw.among(8, 12), 2, 2, groups=draw.among(1, 2, by=1))
    )(h)


@picture
def space_and_channels(net: Program, h: Tensor, draw: Draw) -> Tensor:
    if net.holds(draw, h.shape[1] % 4 == 0 and h.shape[1] > 12 and h.shape[2] < 8):
        return F.pixel_shuffle(h, 2)
    return F.pixel_unshuffle(h, 2) if h.shape[1] <= 12 and h.shape[2] % 2 == 0 else h


@picture
def attended(net: Program, h: Tensor, draw: Draw) -> Tensor:
    (n, width, y, x), packed = h.shape, net.layer(draw.place, lambda: nn.Conv2d(h.shape[1], 24, 1))(h)
    split = draw.among(
        lambda: packed.reshape(n, 3, 2, 4, y * x).unbind(1),
        lambda: [t.reshape(n, 2, 4, y * x) for t in packed.chunk(3, 1)],
    )
    query, key, value = split()
    made = (value @ (query.mT @ key / 2).softmax(-1).mT).reshape(n, 8, y, x)
    return h + net.layer((draw.place, "out"), lambda: nn.Conv2d(8, width, 1))(made)


@picture
def moved(net: Program, h: Tensor, draw: Draw) -> Tensor:
    if not net.holds(draw, even(h.shape[1], 4)):
        return h.flip(1)
    first, second, third, last = h.chunk(4, 1)
    return torch.cat([first.roll(1, 2), second.roll(-1, 2), third.roll(1, 3), last], 1)


@picture
def windows(net: Program, h: Tensor, draw: Draw) -> Tensor:
    n, width, y, x = h.shape
    if net.holds(draw, width <= 8):
        return F.unfold(h, 3, padding=1).view(n, width * 9, y, x)
    return F.pad(h, (1, 1, 1, 1), mode=draw.among("reflect", "replicate", "circular"))[:, :, 1:-1, 1:-1]


@picture
def scales(net: Program, h: Tensor, draw: Draw) -> Tensor:
    """Of parts of the channels, one after the other."""
    if not net.holds(draw, even(h.shape[1], 4)):
        return h
    width, parts = h.shape[1] // 4, torch.split(h, h.shape[1] // 4, 1)
    made = [parts[0]]
    for k, part in enumerate(parts[1:]):
        made.append(
            net.layer((draw.place, k), lambda: nn.Conv2d(width, width, 3, padding=1))(part + made[-1] if k else part)
        )
    return torch.cat(made, 1)


@picture
def selected(net: Program, h: Tensor, draw: Draw) -> Tensor:
    """One of two ways for each channel, by what all see."""
    width, place = h.shape[1], draw.place
    both = torch.stack([net.layer((place, k), lambda: nn.Conv2d(width, width, 3, padding=1))(h) for k in range(2)], 1)
    seen = F.relu(net.layer((place, "in"), lambda: nn.Linear(width, 5))(both.sum(1).mean((2, 3))))
    shares = torch.stack(
        [net.layer((place, "out", k), lambda: nn.Linear(5, width))(seen) for k in range(2)], 1
    ).softmax(1)
    return (both * shares[..., None, None]).sum(1)


@picture
def by_places(net: Program, h: Tensor, draw: Draw) -> Tensor:
    """A map over places; a table for each; all of a picture as one vector."""
    n, width, y, x = h.shape
    if draw.among(True, False):
        return (h.flatten(2) + net.layer(draw.place, lambda: nn.Linear(y * x, y * x))(h.flatten(2))).unflatten(
            2, (y, x)
        )
    if net.holds(draw, width * y * x > 700):
        return h + net.tensor(draw.place, width, y, x)
    return net.layer(draw.place, lambda: nn.Linear(width * y * x, 12 * y * x))(h.flatten(1)).view(n, 12, y, x)
