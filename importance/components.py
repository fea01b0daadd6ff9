"""Principal components of what is read from a stream, and the orthogonal bases that they make, where a mean is subtracted too.

A normalisation that subtracts the mean of its channels (layer norm) commutes only with bases in which all channels weigh the same.
There, the first `width` channels span the first `width - 1` principal components of what has mean zero, and the last channels the
others, in two blocks that each have mean zero: cutting the second block is then as good as cutting components, for that one width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from importance.problems import damped


def components(gram: Tensor, damping: float, *, centred: bool) -> tuple[Tensor, Tensor]:
    """Eigenvectors of a matrix [channels, channels] as columns, and eigenvalues, descending.

    `damping`: added to the diagonal, as a share of its mean. `centred`: the direction in which all channels weigh the same comes last.
    """
    spread = damped(gram, damping)
    if not centred:
        values, vectors = torch.linalg.eigh(spread)
        return vectors.flip(1), values.flip(0)
    inner = _waves(len(gram))
    values, vectors = torch.linalg.eigh(inner.T @ spread @ inner)
    equal = torch.full((len(gram), 1), len(gram) ** -0.5, dtype=torch.float64)
    least = torch.minimum(values[:1], torch.zeros(1, dtype=torch.float64)) if len(values) else torch.zeros(1)
    return torch.cat([inner @ vectors.flip(1), equal], dim=1), torch.cat([values.flip(0), least.double()])


def basis(directions: Tensor, width: int | None, *, centred: bool) -> Tensor:
    """The orthogonal matrix Q [channels, channels] that puts principal `directions` (columns, the first first) on channels.

    `centred`: the last direction is that in which all channels weigh the same, and stays so; see the module's text.
    """
    size = len(directions)
    if not centred:
        return directions
    return directions @ _frame(size, size if width is None else width).T


def _frame(size: int, width: int) -> Tensor:
    """Columns [size, size]: `width - 1` within the first channels, the rest within the others, all but the last of mean zero."""
    last = torch.full((size, 1), size**-0.5, dtype=torch.float64)
    if width >= size or width < 1:
        return torch.cat([_waves(size), last], dim=1)
    rest = size - width
    heights = torch.tensor([math.sqrt(rest / width / size), -math.sqrt(width / rest / size)], dtype=torch.float64)
    between = heights.repeat_interleave(torch.tensor([width, rest]))[:, None]
    blocks = torch.block_diag(_waves(width), _waves(rest))
    return torch.cat([blocks, between, last], dim=1)


def _waves(size: int) -> Tensor:
    """An orthonormal basis [size, size - 1] of what has mean zero: cosines."""
    at = (torch.arange(size, dtype=torch.float64)[:, None] + 0.5) * math.pi / size
    return math.sqrt(2 / size) * torch.cos(at * torch.arange(1, size, dtype=torch.float64)[None])
