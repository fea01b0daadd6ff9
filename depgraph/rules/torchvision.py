"""The operators of torchvision, by name: the package needn't be installed."""

from __future__ import annotations

from depgraph.rules.aten_conv import SLIDES
from depgraph.rules.registry import Op, rule

rule("torchvision.roi_align", equation="i! c h! w!, r! b! -> r! c y! x!")
rule("torchvision.roi_pool", equation="i! c h! w!, r! b! -> r! c y! x!, r! c y! x!")
rule("torchvision.nms", equation="k! b!, k! -> n!")


@rule("torchvision.ps_roi_align", "torchvision.ps_roi_pool")
def by_position(op: Op) -> None:
    """x [i, c·y·x, h, w], boxes [r, 5] -> [r, c, y, x], each place out of channels of its own, and their numbers."""
    op.relate("i! (c y x) h! w!, r! b! -> r! c y! x!, r! c y! x!")
    if 1 not in op.unread:
        op.fix(op.inputs[0], 1, "its channels are numbered, and the numbers are read")


@rule("torchvision.deform_conv2d")
def deformed_convolution(op: Op) -> None:
    """x [n, g·i, space], W [g·o, i, kernel], offsets, mask, b [g·o] -> [n, g·o, space]; groups of offsets stay."""
    source, weight, bias, groups = op["input"], op["weight"], op["bias"], op["groups"]
    inward, outward = ("i", "o") if groups == 1 else ("(g i)", "(g o)")
    moves = f"n j! y! x!, {'n m! y! x!' if op['use_mask'] else 'n u!'}"
    equation = f"n {inward} h! w!, {outward} i k! l!, {moves}, {outward} -> n {outward} y! x!"
    work = f"n {'g ' if groups > 1 else ''}i o k l y x"
    op.relate(equation, source, weight, op["offset"], op["mask"], bias, work=work, why=SLIDES, g=groups)
    if op["offset_groups"] > 1:
        runs = op.relations.new_dim(op["offset_groups"])
        op.relations.fix(runs, op.reason("each of its groups has offsets of its own"))
        op.relations.fold(source.dim(1), [runs, op.relations.new_dim(source.shape[1] // op["offset_groups"])])
