"""Convolutions, and the operators that lay windows out (im2col) or put them back (col2im)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from depgraph.rules.registry import Op, rule

SLIDES = "windows slide along it"


@rule("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution", "aten._convolution")
def convolution(op: Op) -> None:
    """x [n, g·i, space], W [g·o, i, kernel], b [g·o] -> [n, g·o, space]."""
    if op.get("transposed"):
        transposed_convolution(op)
        return
    _convolve(op, "{outward} i", op["weight"].shape[2:], work_over="result")


@rule("aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d")
def transposed_convolution(op: Op) -> None:
    """x [n, g·i, space], W [g·i, o, kernel], b [g·o] -> [n, g·o, space]."""
    _convolve(op, "{inward} o", op["weight"].shape[2:], work_over="space")


def _convolve(op: Op, channels: str, kernel_shape: tuple[int, ...], work_over: str) -> None:
    source, weight, bias = op["input"], op["weight"], op.get("bias")
    groups = op["groups"]
    inward, outward = ("i", "o") if groups == 1 else ("(g i)", "(g o)")
    kernel = " ".join(f"k{d}!" for d in range(len(kernel_shape)))
    space, result = (along_space(op, kernel_shape, letter) for letter in "hy")
    batch = "n " if len(source.shape) == len(weight.shape) else ""
    of_weight = channels.format(inward=inward, outward=outward)
    moved = {"space": space, "result": result}[work_over]
    equation = f"{batch}{inward} {space}, {of_weight} {kernel}, {outward} -> {batch}{outward} {result}"
    work = f"{batch}{'g ' if groups > 1 else ''}i o {kernel} {moved}".replace("!", "")
    op.relate(equation, source, weight, bias, work=work, why=SLIDES, g=groups)


def along_space(op: Op, kernel_shape: tuple[int, ...], letter: str) -> str:
    """The dims of space in a term: fixed, but for those that pass from what comes in to what goes out place by place.

    A window of one place that takes every place and pads nothing does so, whatever stands there: tokens may be channels.
    """
    passed = [size == 1 and _takes_every_place(op, d) for d, size in enumerate(kernel_shape)]
    return " ".join(f"s{d}" if same else f"{letter}{d}!" for d, same in enumerate(passed))


def _takes_every_place(op: Op, d: int) -> bool:
    steps, added = op.get("stride"), [op.get("padding", 0), op.get("output_padding", 0)]
    return steps is not None and _at(steps, d) == 1 and all(isinstance(a, str) or _at(a, d) == 0 for a in added)


def _at(numbers: Sequence[int] | int, d: int) -> int:
    """The number for a dim of space, where one may be given for all."""
    return numbers if isinstance(numbers, int) else numbers[d if len(numbers) > 1 else 0]


@rule("aten.im2col")
def im2col(op: Op) -> None:
    """[n, c, h, w] -> [n, c·window, positions]."""
    _windows(op, image=op.inputs[0].dims, columns=op.output.dims)


@rule("aten.col2im")
def col2im(op: Op) -> None:
    """[n, c·window, positions] -> [n, c, h, w]."""
    _windows(op, image=op.output.dims, columns=op.inputs[0].dims)


def _windows(op: Op, image: range, columns: range) -> None:
    relations = op.relations
    window = relations.new_dim(prod(op["kernel_size"]))
    relations.fold(columns[-2], [image[-3], window])
    if len(columns) == 3:
        relations.align(image[0], columns[0])
    for dim in (window, columns[-1], image[-1], image[-2]):
        relations.fix(dim, op.reason(SLIDES))
