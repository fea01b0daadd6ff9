"""Operators that act otherwise in training: in a captured program they follow `train()` and `eval()` again.

A capture in eval mode writes "not training" into their arguments. Here each becomes a small module, which knows its mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from depgraph.capture.places import module_path
from depgraph.operators import by_name, named, operator_of


class _BatchNorm(nn.Module):
    def __init__(self, momentum: float, eps: float) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps

    def forward(self, x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any) -> Tensor:
        by_batch = self.training or mean is None
        return F.batch_norm(x, mean, variance, weight, bias, by_batch, self.momentum, self.eps)


class _Recurrent(nn.Module):
    """Recurrent layers: dropout between them, and what a backward pass on a GPU needs, come with training."""

    def __init__(self, operator: Any) -> None:
        super().__init__()
        self.operator = named(operator)

    def forward(self, *given: Any) -> Any:
        operator = operator_of(self.operator)
        by_names = dict(zip((a.name for a in operator._schema.arguments), given, strict=True))
        return operator(*{**by_names, "train": self.training}.values())


Made = tuple[nn.Module, tuple[Any, ...]]
_TABLE: dict[str, Callable[[dict[str, Any]], Made]] = {
    "aten.dropout.default": lambda given: (nn.Dropout(given["p"]), (given["input"],)),
    "aten.alpha_dropout.default": lambda given: (nn.AlphaDropout(given["p"]), (given["input"],)),
    "aten.batch_norm.default": lambda given: (
        _BatchNorm(given["momentum"], given["eps"]),
        tuple(given[name] for name in ("input", "weight", "bias", "running_mean", "running_var")),
    ),
}


def _recurrent(operator: Any) -> Callable[[dict[str, Any]], Made]:
    return lambda given: (_Recurrent(operator), tuple(given.values()))


_TABLE |= {
    f"aten.{name}.{kind}": _recurrent(getattr(getattr(torch.ops.aten, name), kind))
    for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    for kind in ("input", "data")
}


def follow_modes(module: GraphModule, model: nn.Module) -> None:
    """Replace the operators of a program captured in eval mode, and put each into the mode that its module of `model` is in."""
    owners = {path: one.training for path, one in model.named_modules(remove_duplicate=False)}
    made = [
        (_replace(module, node, f"_mode_{number}"), module_path(node))
        for number, node in enumerate(list(module.graph.nodes))
        if str(node.target) in _TABLE
    ]
    for name in ("train", "eval"):
        vars(module).pop(name, None)
    module.train(model.training)
    for one, path in made:
        one.train(owners.get(path, model.training))


def _replace(module: GraphModule, node: Node, name: str) -> nn.Module:
    made, args = _TABLE[str(node.target)](by_name(node))
    module.add_submodule(name, made)
    with module.graph.inserting_before(node):
        fresh = module.graph.call_module(name, args)
    fresh.meta.update(node.meta)
    node.replace_all_uses_with(fresh)
    module.graph.erase_node(node)
    return made
