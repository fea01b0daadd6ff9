"""The windows of a convolution laid out as columns, in the order of its weight's columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from depgraph.onnx_door.steps import Step
from depgraph.onnx_door.windows import groups_of_file, window_of_file
from depgraph.operators import argument, operator_name

_SPACE = {"conv1d": 1, "conv2d": 2}


@dataclass(frozen=True)
class Window:
    """How a convolution moves over space: for each dim of it size, steps and what is padded before and after."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]


def patches(node: Any, source: Tensor) -> Tensor | None:
    """For a one- or two-dimensional convolution of [n, c, space]: [n, c * window, positions]; None for other operators."""
    window = window_of(node, tuple(source.shape[2:]))
    if window is None:
        return None
    return laid_out(source if source.ndim > len(window.size) + 1 else source.unsqueeze(0), window)


def laid_out(image: Tensor, window: Window) -> Tensor:
    """The windows of [n, c, space], with one to three dims of space: [n, c * window, positions]."""
    image = F.pad(image, [n for pair in reversed(window.padding) for n in pair])
    ones = (1,) * (2 - len(window.size))
    if len(window.size) < 3:
        image = image.unsqueeze(2) if ones else image
        return F.unfold(image, ones + window.size, ones + window.dilation, 0, ones + window.stride)
    moves = zip(image.shape[2:], window.size, window.dilation, window.stride, strict=True)
    places = [(n - (size - 1) * apart - 1) // stride + 1 for n, size, apart, stride in moves]
    steps = image.stride()
    within = [step * apart for step, apart in zip(steps[2:], window.dilation, strict=True)]
    between = [step * stride for step, stride in zip(steps[2:], window.stride, strict=True)]
    windows = image.as_strided((*image.shape[:2], *window.size, *places), (*steps[:2], *within, *between))
    return windows.flatten(2 + len(places)).flatten(1, -2)


def window_of(node: Any, space: tuple[int, ...] = ()) -> Window | None:
    """The window of a convolution with one or two dims of space, given the sizes of these; None for other operators."""
    if isinstance(node, Step):
        found = window_of_file(node, space)
        return None if found is None or len(found["size"]) > 2 else Window(**found)
    dims = _SPACE.get(operator_name(node.target))
    if dims is None or not isinstance(node.args[1], Node):
        return None
    size = tuple(node.args[1].meta["val"].shape[2:])
    stride, dilation = (pair(argument(node, name, 1), dims) for name in ("stride", "dilation"))
    return Window(size, stride, dilation, padding_of(argument(node, "padding", 0), size, dilation))


def padding_of(given: Any, window: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """What a convolution pads before and after along each dim of space, as given in numbers or a word."""
    if given == "valid":
        given = 0
    if not isinstance(given, str):
        return tuple((n, n) for n in pair(given, len(window)))
    more = [(n - 1) * step for n, step in zip(window, dilation, strict=True)]
    return tuple((n // 2, n - n // 2) for n in more)


def groups_of(node: Any) -> int | None:
    """Into how many parts a convolution, transposed or not, parts its channels; None for other operators."""
    if isinstance(node, Step):
        return groups_of_file(node)
    if not operator_name(node.target).startswith("conv"):
        return None
    groups: int = argument(node, "groups", 1)
    return groups


def pair(value: Any, space: int) -> tuple[Any, ...]:
    """A setting for each dim of space, given for each or once for all."""
    given = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return given * space if len(given) == 1 else given
