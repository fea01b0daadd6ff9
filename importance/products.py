"""Where weights meet rows of a batch in a backward pass, read off the graph that autograd has made of the forward pass.

So it doesn't matter which module owns a weight or how the product was written. Each product says what came in and, when the
backward pass gets there, the gradient of what it put out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from importance.patches import Window, laid_out

_TURNS = {"TBackward0", "TransposeBackward0", "PermuteBackward0"}
_VIEWS = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"}
_COPIES = {"ToCopyBackward0", "CloneBackward0", "AliasBackward0"}


@dataclass(frozen=True)
class Rows:
    """What met at one product: `inputs` [blocks, rows, columns], `gradients` of its outputs [blocks, rows, outputs]."""

    inputs: Tensor
    gradients: Tensor


@dataclass(frozen=True)
class Product:
    """One use of a weight. `turned`: it is stored [columns, outputs]; `bias` is the parameter that is added, None for none."""

    node: Any
    weight: Tensor
    turned: bool
    bias: Tensor | None
    blocks: int
    reader: Callable[[Any, Tensor], Rows]

    @property
    def matrix(self) -> Tensor:
        """The weight as [blocks, outputs, columns]; a convolution has a block for each of its groups."""
        weight = self.weight.detach().T if self.turned else self.weight.detach()
        return weight.reshape(self.blocks, weight.shape[0] // self.blocks, -1)

    def watch(self, see: Callable[[Product, Rows], None]) -> RemovableHandle:
        """Let `see` have what meets here, when the gradient of what comes out is known.

        What this gives must be removed afterwards: Python can't see that the node, which is torch's, holds what holds it.
        """

        def hook(gradients: tuple[Tensor | None, ...]) -> None:
            if gradients[0] is not None:
                with torch.no_grad():
                    see(self, self.reader(self.node, gradients[0]))

        handle: RemovableHandle = self.node.register_prehook(hook)
        return handle


def products(loss: Tensor) -> Iterator[Product]:
    """All products of a matrix that is a parameter with rows, and convolutions, that `loss` depends on."""
    seen, waiting = {loss.grad_fn}, [loss.grad_fn]
    added: dict[Any, Tensor] = {}
    while waiting:
        node = waiting.pop()
        before = [n for n, _ in getattr(node, "next_functions", ())]
        added.update(_added(node, before))
        found = _product(node, before)
        if found is not None and found.bias is None and node in added:
            found = replace(found, bias=added[node])
        if found is not None:
            yield found
        fresh = [n for n in dict.fromkeys(before) if n is not None and n not in seen]
        seen.update(fresh)
        waiting += fresh


def _added(node: Any, before: list[Any]) -> Iterator[tuple[Any, Tensor]]:
    """The product to which a sum adds a vector that is a parameter: torch takes a bias so where what comes in isn't contiguous."""
    if node.name() != "AddBackward0" or len(before) != 2 or node._saved_alpha != 1:
        return
    for one, other in (before, before[::-1]):
        vector = getattr(one, "variable", None)
        while other is not None and other.name() in _VIEWS:
            other = other.next_functions[0][0]
        if vector is not None and vector.ndim == 1 and other is not None:
            yield other, vector


def _product(node: Any, before: list[Any]) -> Product | None:
    kind = _KINDS.get(node.name())
    if kind is None or len(before) <= kind.weight:
        return None
    weight, turns = _parameter(before[kind.weight])
    bias = _parameter(before[kind.bias])[0] if kind.bias is not None and len(before) > kind.bias else None
    if weight is None or kind.flat and weight.ndim != 2 or getattr(node, "_saved_transposed", False):
        return None
    return Product(
        node=node,
        weight=weight,
        turned=kind.flat and turns % 2 == 0,
        bias=bias if bias is not None and bias.ndim == 1 else None,
        blocks=getattr(node, "_saved_groups", 1),
        reader=kind.reader,
    )


def _parameter(node: Any) -> tuple[Tensor | None, int]:
    """The parameter that a node hands gradients to, and how often it is transposed on the way."""
    turns = 0
    while node is not None and node.name() in _TURNS | _COPIES:
        turns += node.name() in _TURNS
        node = node.next_functions[0][0]
    return getattr(node, "variable", None), turns


def _linear(node: Any, gradient: Tensor) -> Rows:
    inputs = node._saved_mat1 if hasattr(node, "_saved_mat1") else node._saved_self
    return Rows(inputs.detach()[None], gradient[None])


def _convolution(node: Any, gradient: Tensor) -> Rows:
    stride, dilation, padding = (tuple(getattr(node, f"_saved_{n}")) for n in ("stride", "dilation", "padding"))
    window = Window(tuple(node._saved_weight.shape[2:]), stride, dilation, tuple((n, n) for n in padding))
    columns, blocks = laid_out(node._saved_input.detach(), window), node._saved_groups
    return Rows(_blocks(columns, blocks), _blocks(gradient.flatten(2), blocks))


def _blocks(values: Tensor, blocks: int) -> Tensor:
    """[samples, blocks * channels, positions] as [blocks, samples * positions, channels]."""
    return values.unflatten(1, (blocks, -1)).permute(1, 0, 3, 2).flatten(1, 2)


@dataclass(frozen=True)
class _Kind:
    """Which of a node's operands are the weight and the bias, whether the weight is a matrix, and how rows are read."""

    weight: int
    bias: int | None
    flat: bool
    reader: Callable[[Any, Tensor], Rows]


_KINDS = {
    "AddmmBackward0": _Kind(2, 0, True, _linear),
    "MmBackward0": _Kind(1, None, True, _linear),
    "ConvolutionBackward0": _Kind(1, 2, False, _convolution),
}
