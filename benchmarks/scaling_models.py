"""Families of models that grow by one number: each joins its layers in another way, at widths that make weights cheap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.models import Case, deep

WIDTH = 16


@dataclass(frozen=True)
class Family:
    """`build` makes the model of a size; `sizes` ascend, and `by` says what they count."""

    build: Callable[[int], Case]
    sizes: tuple[int, ...]
    by: str


def _case(model: nn.Module, *shape: int) -> Case:
    """The model with random statistics in its norms, on one random tensor."""
    random = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2, generator=random)
            module.running_var.uniform_(0.5, 2.0, generator=random)
    return Case(model.eval(), (torch.randn(*shape, generator=random),), "synthetic")


def _conv(inputs: int, outputs: int, kernel: int = 1) -> nn.Sequential:
    """Convolution, norm, activation."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def _head(inputs: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


class DenseBlock(nn.Module):
    """Each layer reads the concatenation of the block's input and all layers before it."""

    def __init__(self, inputs: int, layers: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(inputs + k * growth),
                nn.ReLU(),
                nn.Conv2d(inputs + k * growth, 4 * growth, 1, bias=False),
                _conv(4 * growth, growth, 3)[:1],
            )
            for k in range(layers)
        )
        for layer in self.layers:
            layer.insert(3, nn.BatchNorm2d(4 * growth))
            layer.insert(4, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for layer in self.layers:
            seen.append(layer(torch.cat(seen, 1)))
        return torch.cat(seen, 1)


def dense(blocks: tuple[int, ...], growth: int) -> Case:
    """DenseNet with blocks of so many layers; (6, 12, 64, 48) with growth 32 is DenseNet-264."""
    width = 2 * growth
    stages: list[nn.Module] = [_conv(3, width, 3)]
    for k, layers in enumerate(blocks):
        stages.append(DenseBlock(width, layers, growth))
        width += layers * growth
        if k < len(blocks) - 1:
            stages += [_conv(width, width // 2), nn.AvgPool2d(2)]
            width //= 2
    return _case(nn.Sequential(*stages, _head(width)), 1, 3, 32, 32)


def dense_net(depth: int) -> Case:
    """DenseNet of about `depth` layers in the proportions of DenseNet-264, growth 8."""
    return dense(tuple(max(round(part * depth / 264), 1) for part in (6, 12, 64, 48)), 8)


class ShuffleUnit(nn.Module):
    """Half of the channels pass by; all are then shuffled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        depthwise = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.branch = nn.Sequential(_conv(half, half), depthwise, nn.BatchNorm2d(half), _conv(half, half))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        n, _, h, w = x.shape
        joined = torch.cat([left, self.branch(right)], 1)
        return joined.view(n, 2, -1, h, w).transpose(1, 2).reshape(n, -1, h, w)


def shuffle_net(units: int) -> Case:
    """A stem, a chain of shuffle units, a head."""
    width = 4 * WIDTH
    chain = (ShuffleUnit(width) for _ in range(units))
    return _case(nn.Sequential(_conv(3, width, 3), *chain, _head(width)), 1, 3, 8, 8)


class UNet(nn.Module):
    """As in diffusion models: of every block on the way down, one on the way up reads the result."""

    def __init__(self, levels: int, blocks: int) -> None:
        super().__init__()
        self.stem = _conv(3, WIDTH, 3)
        self.down = nn.ModuleList(nn.ModuleList(_conv(WIDTH, WIDTH, 3) for _ in range(blocks)) for _ in range(levels))
        self.up = nn.ModuleList(nn.ModuleList(_conv(2 * WIDTH, WIDTH, 3) for _ in range(blocks)) for _ in range(levels))
        self.head = nn.Conv2d(WIDTH, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.stem(x), []
        for level in self.down:
            for block in level:
                x = block(x)
                skips.append(x)
            x = nn.functional.max_pool2d(x, 2)
        for level in self.up:
            x = nn.functional.interpolate(x, scale_factor=2.0)
            for block in level:
                x = block(torch.cat([x, skips.pop()], 1))
        return self.head(x)


def u_net(skips: int) -> Case:
    """A U-Net of four levels."""
    return _case(UNet(4, skips // 4), 1, 3, 16, 16)


class Hydra(nn.Module):
    """Many branches, one concatenation."""

    def __init__(self, branches: int) -> None:
        super().__init__()
        self.stem = _conv(3, WIDTH, 3)
        self.branches = nn.ModuleList(_conv(WIDTH, WIDTH) for _ in range(branches))
        self.last = nn.Sequential(_conv(branches * WIDTH, WIDTH), _head(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.last(torch.cat([branch(x) for branch in self.branches], 1))


def hydra(branches: int) -> Case:
    """A hydra on small images."""
    return _case(Hydra(branches), 1, 3, 8, 8)


class Views(nn.Module):
    """A long way of views between two layers: heads of changing number are split off, turned and joined again."""

    def __init__(self, views: int) -> None:
        super().__init__()
        self.views = views
        self.first, self.last = nn.Linear(8, 4 * WIDTH), nn.Linear(4 * WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        n, s, c = x.shape
        for k in range(self.views):
            heads = 2 ** (1 + k % 3)
            x = x.view(n, s, heads, c // heads).transpose(1, 2).transpose(1, 2).reshape(n, s, c)
        return self.last(x)


def views(count: int) -> Case:
    """A chain of views on four tokens."""
    return _case(Views(count), 2, 4, 8)


class Experts(nn.Module):
    """A mixture of experts whose weights are stacked; two are chosen for each token."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, WIDTH, 2 * WIDTH) / 4)
        self.down = nn.Parameter(torch.randn(experts, 2 * WIDTH, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        chosen, which = self.router(normed).softmax(-1).topk(2, dim=-1)
        inner = torch.einsum("td,tkdh->tkh", normed, self.up[which]).relu()
        return x + (torch.einsum("tkh,tkhd->tkd", inner, self.down[which]) * chosen.unsqueeze(-1)).sum(1)


def expert_layers(layers: int) -> Case:
    """So many layers of eight stacked experts."""
    chain = (Experts(8) for _ in range(layers))
    return _case(nn.Sequential(nn.Linear(8, WIDTH), *chain, nn.Linear(WIDTH, 8)), 4, 8)


def experts(count: int) -> Case:
    """Two layers of so many stacked experts: the operators stay as many."""
    return _case(nn.Sequential(nn.Linear(8, WIDTH), Experts(count), Experts(count), nn.Linear(WIDTH, 8)), 4, 8)


class Recalling(nn.Module):
    """A stream that one shared block is applied to again and again; every state of it is an output too."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.first, self.last = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8)
        self.block = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        states = [self.first(x)]
        for _ in range(self.steps):
            states.append(states[-1] + self.block(states[-1]))
        return self.last(states[-1]), *states


def recalling(steps: int) -> Case:
    """The stream on four tokens."""
    return _case(Recalling(steps), 4, 8)


class Summing(nn.Module):
    """Each layer reads the mean of all layers before it."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        seen = [self.first(x)]
        for layer in self.layers:
            seen.append(layer(torch.stack(seen).mean(0)).relu())
        return self.last(torch.stack(seen).mean(0))


def summing(layers: int) -> Case:
    """The layers on four tokens."""
    return _case(Summing(layers), 4, 8)


class Again(nn.Module):
    """One block with attention, applied again and again, between a narrower table and the words, as in ALBERT."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        self.first, self.head = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, 10)
        self.block = nn.TransformerEncoderLayer(2 * WIDTH, 4, 4 * WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(self.times):
            x = self.block(x)
        return self.head(x)


def again(times: int) -> Case:
    """A block applied so many times."""
    return _case(Again(times), 2, 8, WIDTH)


class Residual(nn.Module):
    """A stream to which a narrow network adds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.added = (
            nn.LayerNorm(WIDTH),
            nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, WIDTH)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.added(self.norm(x))


def residual(blocks: int) -> Case:
    """So many residual blocks: a graph of many axes."""
    return _case(nn.Sequential(*(Residual() for _ in range(blocks)), nn.Linear(WIDTH, 10)), 2, WIDTH)


FAMILIES: dict[str, Family] = {
    "decoder": Family(deep, (5, 10, 20, 40, 80), "layers"),
    "dense": Family(dense_net, (33, 66, 132, 264), "layers"),
    "dense-264": Family(lambda growth: dense((6, 12, 64, 48), growth), (4, 8, 16, 32), "growth"),
    "shuffle": Family(shuffle_net, (8, 16, 32, 64, 128), "units"),
    "unet": Family(u_net, (8, 16, 32, 64, 128), "skips"),
    "hydra": Family(hydra, (16, 32, 64, 128, 256), "branches"),
    "views": Family(views, (16, 32, 64, 128, 256), "views"),
    "moe": Family(expert_layers, (4, 8, 16, 32, 64), "layers"),
    "experts": Family(experts, (16, 32, 64, 128, 256, 512), "experts"),
    "recalling": Family(recalling, (16, 32, 64, 128, 256), "steps"),
    "again": Family(again, (8, 16, 32, 64, 128), "times"),
    "residual": Family(residual, (150, 300, 600, 1200, 2400), "blocks"),
    "summing": Family(summing, (8, 16, 32, 64, 128), "layers"),
}
