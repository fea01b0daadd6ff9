"""Hand-written convolutional modules: every way in which channels meet, part and move about."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn(inputs: int, outputs: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class ResidualBlock(nn.Module):
    """1x1, a grouped 3x3 (4 groups), a depthwise 3x3, 1x1, and the way round."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.reduce = conv_bn(width, inner, 1)
        self.grouped = conv_bn(inner, inner, 3, groups=4)
        self.depthwise = conv_bn(inner, inner, 3, groups=inner)
        self.restore = nn.Conv2d(inner, width, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.restore(self.depthwise(self.grouped(self.reduce(x))))))


class ResidualCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 24)
        self.first = ResidualBlock(24, 20)
        self.second = ResidualBlock(24, 32)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.second(self.first(self.stem(x)))).flatten(1))


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.conv(F.relu(self.norm(torch.cat(features, 1))))


class DenseNet(nn.Module):
    """Every layer reads the concatenation of all that came before it."""

    def __init__(self, stem: int = 14, growth: int = 10, layers: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, stem, 3, padding=1)
        self.layers = nn.ModuleList(DenseLayer(stem + i * growth, growth) for i in range(layers))
        width = stem + layers * growth
        self.transition = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 18, 1), nn.AvgPool2d(2))
        self.head = nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(features))
        return self.head(self.transition(torch.cat(features, 1)).mean((2, 3)))


class UNet(nn.Module):
    """Two levels down and up again; ``up`` makes 24 channels at twice the resolution out of 40."""

    def __init__(self, up: nn.Module) -> None:
        super().__init__()
        self.fine = conv_bn(3, 16)
        self.coarse = conv_bn(16, 28)
        self.bottom = conv_bn(28, 40)
        self.up = up
        self.merge_coarse = conv_bn(28 + 24, 20)
        self.merge_fine = conv_bn(20 + 16, 12)
        self.head = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        coarse = self.coarse(F.max_pool2d(fine, 2))
        bottom = self.bottom(F.max_pool2d(coarse, 2))
        merged = self.merge_coarse(torch.cat([self.up(bottom), coarse], 1))
        merged = F.interpolate(merged, size=fine.shape[-2:], mode="bilinear", align_corners=False)
        return self.head(self.merge_fine(torch.cat([fine, merged], 1)))


def unet_transposed() -> nn.Module:
    return UNet(nn.ConvTranspose2d(40, 24, 2, stride=2))


def unet_interpolated() -> nn.Module:
    return UNet(nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(40, 24, 3, padding=1)))


class ShuffleUnit(nn.Module):
    """ShuffleNet v2: half goes through, half goes by, then the halves are interleaved."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            conv_bn(half, half, 1),
            nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            conv_bn(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        by, through = x.chunk(2, dim=1)
        out = torch.cat((by, self.branch(through)), 1)
        batch, channels, height, width = out.shape
        return out.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous().view(out.shape)


class ShuffleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 24)
        self.units = nn.Sequential(ShuffleUnit(24), ShuffleUnit(24))
        self.last = conv_bn(24, 36, 1)
        self.head = nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.units(self.stem(x))).mean([2, 3]))


class SqueezeExcitation(nn.Module):
    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(width, squeezed, 1)
        self.up = nn.Conv2d(squeezed, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.silu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class GroupNormBlock(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.silu(self.norm(x)))


class SeparableConv1d(nn.Module):
    """Depthwise separable 1-D convolutions with strides."""

    def __init__(self) -> None:
        super().__init__()
        widths = [20, 28, 36]
        self.stem = nn.Conv1d(6, widths[0], 5, padding=2)
        self.depthwise = nn.ModuleList(nn.Conv1d(w, w, 3, stride=2, padding=1, groups=w) for w in widths[:-1])
        self.pointwise = nn.ModuleList(nn.Conv1d(a, b, 1) for a, b in zip(widths, widths[1:], strict=False))
        self.norms = nn.ModuleList(nn.BatchNorm1d(w) for w in widths[1:])
        self.head = nn.Linear(widths[-1], 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x))
        for depthwise, pointwise, norm in zip(self.depthwise, self.pointwise, self.norms, strict=True):
            x = F.gelu(norm(pointwise(depthwise(x))))
        return self.head(x.amax(dim=-1))


class PixelShuffler(nn.Module):
    """Super-resolution by two: each channel of 12 becomes a 2 x 2 patch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 20, 5, padding=2), nn.Tanh())
        self.expand = nn.Conv2d(20, 12 * 2**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.head = nn.Conv2d(12, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.shuffle(self.expand(self.stem(x)))))


def squeeze_excitation() -> nn.Module:
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(conv_bn(3, 24), SqueezeExcitation(24, 10), conv_bn(24, 32), pool, nn.Linear(32, 5))


def group_norm_cnn() -> nn.Module:
    blocks = [GroupNormBlock(30, 5), nn.Conv2d(30, 24, 1), GroupNormBlock(24, 4)]
    return nn.Sequential(nn.Conv2d(3, 30, 3, padding=1), *blocks, nn.GroupNorm(4, 24), nn.Conv2d(24, 5, 1))


def prelu_net() -> nn.Module:
    layers = [nn.Conv2d(3, 20, 3), nn.PReLU(20), nn.Conv2d(20, 28, 3), nn.BatchNorm2d(28), nn.PReLU(28)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(28 * 4, 5))
