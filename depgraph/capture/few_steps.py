"""What recurrent layers make of tensors without data: torch goes through their sequence step by step, and two steps tell the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_FEW = 2


def of_few_steps(func: Any, args: list[Any], run: Callable[[list[Any]], Any]) -> Any:
    """What `run(args)` gives, which calls `func` with meta tensors, found from the first steps where it goes through a sequence."""
    step = _step_dim(func, args)
    if step is None or not isinstance(args[0].shape[step], int) or args[0].shape[step] <= _FEW:
        return run(args)
    sequence = args[0]
    made, *states = run([_of_length(sequence, step, _FEW), *args[1:]])
    if made.stride(step) < max(made.stride()):  # the strides of others would depend on the number of steps
        return run(args)
    return (_of_length(made, step, sequence.shape[step]), *states)


def _step_dim(func: Any, args: list[Any]) -> int | None:
    """The dim of the first argument along which a recurrent layer steps; None for other operators."""
    schema = getattr(func, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    if "batch_first" not in names or len(args) != len(names) or not isinstance(args[0], Tensor):
        return None
    return 1 if args[names.index("batch_first")] else 0


def _of_length(tensor: Tensor, dim: int, length: int) -> Tensor:
    """A tensor without data like another, of another length along one dim."""
    shape = [length if d == dim else size for d, size in enumerate(tensor.shape)]
    return torch.empty_strided(shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
