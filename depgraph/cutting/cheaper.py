"""Operators that cost less, and give the same, where what they are given was given to another one before."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import torch
from torch.fx import Node
from torch.utils.weak import WeakTensorKeyDictionary

_Masks = MutableMapping[torch.Tensor, dict[torch.dtype, tuple[int, torch.Tensor]]]
_ADDED: _Masks = WeakTensorKeyDictionary()


def cheaper(nodes: Iterable[Node]) -> dict[Node, Callable[..., Any]]:
    """What is called in the place of operators, by their nodes; the hash of an operator costs more than many calls."""
    return {node: _CHEAPER[node.target] for node in nodes if node.op == "call_function" and node.target in _CHEAPER}


def _attention(query: torch.Tensor, key: Any, value: Any, attn_mask: Any = None, *rest: Any, **options: Any) -> Any:
    """A Boolean mask, which all layers share as a rule, is made numbers once, not in each."""
    if isinstance(attn_mask, torch.Tensor) and attn_mask.dtype is torch.bool and not attn_mask.is_inference():
        attn_mask = _added(attn_mask, query.dtype)
    return torch.ops.aten.scaled_dot_product_attention.default(query, key, value, attn_mask, *rest, **options)


def _added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is to be added to scores: 0 where a mask is true, else minus infinity; what is expanded stays so."""
    known = _ADDED.setdefault(mask, {})
    version, made = known.get(dtype, (-1, mask))
    if version != mask._version:
        own = mask[tuple(slice(0, 1) if not step else slice(None) for step in mask.stride())]
        made = torch.where(own, 0.0, -math.inf).to(dtype).expand(mask.shape)
        known[dtype] = mask._version, made
    return made


_CHEAPER: dict[Any, Callable[..., Any]] = {torch.ops.aten.scaled_dot_product_attention.default: _attention}
