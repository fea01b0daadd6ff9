"""Operators over space: pooling, resizing, sampling, and pixels that become channels."""

from __future__ import annotations

from depgraph.graph import Value
from depgraph.rules.registry import Op, aten, rule

_RESIZED = aten("""
    max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    max_unpool2d max_unpool3d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d
    upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
""")


@rule(*_RESIZED)
def spatial(op: Op) -> None:
    """Channels and batch stay; the trailing spatial dims are resized."""
    spatial_of(op, [*op.inputs, *op.outputs], next(int(c) for c in op.target if c in "123"))


def spatial_of(op: Op, values: list[Value], rank: int) -> None:
    """The last `rank` dims of each are space."""
    for value in values:
        for d in range(1, len(value.shape) + 1):
            if d <= rank:
                op.fix(value, -d, "it is a spatial dimension")
            else:
                op.relations.align(value.dim(-d), op.output.dim(-d))


@rule("aten.grid_sampler", "aten.grid_sampler_2d", "aten.grid_sampler_3d")
def grid_sample(op: Op) -> None:
    """x [n, c, space], grid [n, space, 2 or 3] -> [n, c, space]."""
    space, result = ("h! w!", "y! x!") if len(op.output.shape) == 4 else ("d! h! w!", "z! y! x!")
    op.relate(f"n c {space}, n {result} p! -> n c {result}", why="it is a spatial dimension")


@rule("aten.pixel_shuffle")
def pixel_shuffle(op: Op) -> None:
    """[..., c·r·r, h, w] -> [..., c, h·r, w·r]."""
    _pixels(op, deep=op.inputs[0], wide=op.output, factor=op["upscale_factor"])


@rule("aten.pixel_unshuffle")
def pixel_unshuffle(op: Op) -> None:
    """[..., c, h·r, w·r] -> [..., c·r·r, h, w]."""
    _pixels(op, deep=op.output, wide=op.inputs[0], factor=op["downscale_factor"])


def _pixels(op: Op, deep: Value, wide: Value, factor: int) -> None:
    relations = op.relations
    square = relations.new_dim(factor * factor)
    relations.fold(deep.dim(-3), [wide.dim(-3), square])
    for d in range(4, len(deep.shape) + 1):
        relations.align(deep.dim(-d), wide.dim(-d))
    for dim in (square, *deep.dims[-2:], *wide.dims[-2:]):
        relations.fix(dim, op.reason("channels become space and the other way round"))


@rule("aten.fractional_max_pool2d", "aten.fractional_max_pool3d")
def fractional_pool(op: Op) -> None:
    """As other pools; where its windows lie is drawn for every channel, [n, c, rank]."""
    spatial_of(op, [op["self"], *op.outputs], int(op.target.split("pool")[1][0]))
    drawn, channels = op["random_samples"], op["self"].dims[: -int(op.target.split("pool")[1][0])]
    op.fix(drawn, -1, "each of its indices is a spatial dimension")
    for k, dim in enumerate(reversed(channels)):
        op.relations.align(dim, drawn.dim(-2 - k))


@rule("aten.affine_grid_generator")
def affine_grid(op: Op) -> None:
    """A map [n, rank, rank + 1] for each sample -> [n, space, rank]."""
    op.relate(f"n a! b! -> n {'y! x!' if len(op.output.shape) == 4 else 'z! y! x!'} p!")


@rule("aten.stft")
def stft(op: Op) -> None:
    """[n, samples] -> [n, frequencies, frames], and real and imaginary parts if it isn't complex."""
    _spectrum(op, signal=op.inputs[0], spectrum=op.output)


@rule("aten.istft")
def istft(op: Op) -> None:
    """[n, frequencies, frames] -> [n, samples]."""
    _spectrum(op, signal=op.output, spectrum=op.inputs[0])


def _spectrum(op: Op, signal: Value, spectrum: Value) -> None:
    if len(signal.shape) == 2:
        op.relations.align(signal.dim(0), spectrum.dim(0))
    batch = len(signal.shape) - 1
    window = [dim for value in op.inputs[1:] for dim in value.dims]
    for dim in (*signal.dims[batch:], *spectrum.dims[batch:], *window):
        op.relations.fix(dim, op.reason("a Fourier transform runs along it"))
