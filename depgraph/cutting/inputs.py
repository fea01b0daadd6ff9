"""Example inputs as plain data: enough to make others like them, without their values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from depgraph.errors import CheckpointError

Spec = dict[str, Any]


def describe_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Spec:
    """JSON-able shapes, dtypes and (of integers) ranges of example inputs.

    What isn't a tensor, a number, a string, None or a list, tuple or dict of these gives ``{"unknown": its type}``.
    """
    try:
        return {"args": [_described(a) for a in args], "kwargs": {name: _described(a) for name, a in kwargs.items()}}
    except TypeError as error:
        return {"unknown": str(error)}


def _described(item: Any) -> Any:
    if isinstance(item, torch.Tensor):
        return _tensor(item)
    if item is None or type(item) in (bool, int, float, str):
        return item
    if type(item) in (list, tuple):
        return {type(item).__name__: [_described(i) for i in item]}
    if type(item) is dict and all(isinstance(key, str) for key in item):
        return {"dict": {key: _described(value) for key, value in item.items()}}
    raise TypeError(type(item).__name__)


def _tensor(tensor: torch.Tensor) -> Spec:
    spec: Spec = {"tensor": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
    countable = not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_meta)
    if countable and tensor.dtype != torch.bool and tensor.numel():
        spec["range"] = [int(tensor.min()), int(tensor.max())]
    return spec


def make_inputs(
    spec: Spec, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of the described shapes with random values: normal floats, integers within the recorded range.

    Raises CheckpointError when the originals couldn't be described.
    """
    if "unknown" in spec:
        raise CheckpointError(
            f"the example inputs weren't recorded: they hold a {spec['unknown']}, not only tensors and numbers"
        )
    generator = torch.Generator().manual_seed(seed)
    args = tuple(_made(item, generator, device) for item in spec["args"])
    return args, {name: _made(item, generator, device) for name, item in spec["kwargs"].items()}


def _made(item: Any, generator: torch.Generator, device: torch.device | str) -> Any:
    if not isinstance(item, dict):
        return item
    if "tensor" in item:
        return _random(item, generator).to(device)
    if "dict" in item:
        return {key: _made(value, generator, device) for key, value in item["dict"].items()}
    kind, items = next(iter(item.items()))
    made = [_made(i, generator, device) for i in items]
    return tuple(made) if kind == "tuple" else made


def _random(spec: Spec, generator: torch.Generator) -> torch.Tensor:
    dtype, shape = getattr(torch, spec["dtype"]), spec["tensor"]
    if dtype == torch.bool:
        return torch.ones(shape, dtype=dtype)
    if not (dtype.is_floating_point or dtype.is_complex):
        low, high = spec.get("range", (0, 0))
        return torch.randint(low, high + 1, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)
