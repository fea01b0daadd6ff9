"""The windows of a convolution laid out as columns, in the order of its weight's columns."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from depgraph.cutting.sides import operator_name

_SPACE = {"conv1d": 1, "conv2d": 2}


def patches(node: Node, source: Tensor) -> Tensor | None:
    """For a one- or two-dimensional convolution of [n, c, space]: [n, c * window, positions]; None for other operators."""
    space = _SPACE.get(operator_name(node.target))
    if space is None or not isinstance(node.args[1], Node):
        return None
    window = tuple(node.args[1].meta["val"].shape[2:])
    given = {name: _pair(_argument(node, name, default), space) for name, default in _DEFAULTS.items()}
    if not isinstance(given["padding"][0], int):
        return None
    lone = source.ndim == space + 1
    image = source.unsqueeze(0) if lone else source
    if space == 1:
        image, window = image.unsqueeze(2), (1, *window)
        given = {name: (0 if name == "padding" else 1, *value) for name, value in given.items()}
    found = F.unfold(image, window, given["dilation"], given["padding"], given["stride"])
    return found


_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1}


def _argument(node: Node, name: str, default: Any) -> Any:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    position = names.index(name)
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _pair(value: Any, space: int) -> tuple[Any, ...]:
    given = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return given * space if len(given) == 1 else given
