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
    rank = next(int(c) for c in op.target if c in "123")
    for value in [*op.inputs, *op.outputs]:
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
