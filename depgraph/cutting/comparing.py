"""How far two computations of the same outputs are apart."""

from __future__ import annotations

import math

import torch

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
Tensors = list[torch.Tensor]
_LARGE = 1e5


def difference(got: Tensors, expected: Tensors) -> float:
    """The largest difference over all floating outputs, as a share of the largest output; infinite for other shapes.

    Where no output is floating, the share of the numbers that differ.
    """
    if len(got) != len(expected) or any(a.shape != b.shape for a, b in zip(got, expected, strict=True)):
        return float("inf")
    if not any(b.numel() and is_continuous(b) for b in expected):
        return _unequal(got, expected)
    scale = apart = filled = 0.0
    for a, b in zip(got, expected, strict=True):
        if not is_continuous(a) or not a.numel():
            continue
        a, b = _comparable(a), _comparable(b)
        largest, size = _largest(a - b), _largest(b)
        if not math.isfinite(largest + size):
            largest, size = _where_finite(a, b)
        if size > _LARGE:
            a, b, masked = _unmasked(a, b)
            largest, size = _where_finite(a, b)
            filled = max(filled, masked)
        apart, scale = max(apart, largest), max(scale, size)
    return max(apart / scale if scale else apart, filled)


def any_finite(tensor: torch.Tensor) -> bool:
    """Is one number of a tensor neither NaN nor infinite? If their sum is, they all are."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).any())


def _largest(tensor: torch.Tensor) -> float:
    """The largest magnitude; NaN where there is one."""
    if tensor.is_complex():
        return float(tensor.abs().max())
    least, most = torch.aminmax(tensor)
    return max(-float(least), float(most))


def is_continuous(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _unequal(got: Tensors, expected: Tensors) -> float:
    """The share of all numbers that differ."""
    count = sum(b.numel() for b in expected)
    return sum(int((a.cpu() != b.cpu()).sum()) for a, b in zip(got, expected, strict=True)) / max(1, count)


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, in single precision or better."""
    least = torch.complex64 if tensor.is_complex() else torch.float32
    return tensor.detach().cpu().to(torch.promote_types(tensor.dtype, least))


def _unmasked(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Both without the numbers that mask something (far larger than the others), and by which share these differ.

    Most may mask, as where each position has a part of a vocabulary of its own: the others are looked for among the smallest.
    """
    finite = b[torch.isfinite(b) & (b != 0)].abs()
    some = finite[:: max(1, finite.numel() // 10_000)]
    usual = float(some.kthvalue(1 + some.numel() // 50)[0])
    masked = torch.isfinite(b) & (b.abs() > _LARGE * usual)
    apart = ((a - b).abs() / b.abs())[masked]
    return a[~masked], b[~masked], float(apart.max()) if apart.numel() else 0.0


def _where_finite(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """Largest difference and size where both are finite; infinite unless they agree on what isn't."""
    finite = torch.isfinite(a) & torch.isfinite(b)
    if not bool((finite | (a == b) | (a.isnan() & b.isnan())).all()):
        return float("inf"), 0.0
    if not bool(finite.any()):
        return 0.0, 0.0
    return float((a - b)[finite].abs().max()), float(b[finite].abs().max())
