"""SliceGPT as recipes: residual streams cut to their first principal components, with one basis or with products between several."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from importance.recipe import Recipe
from importance.rotation import Rotation, principal

Batches = Iterable[Any]


def slicegpt(batches: Batches, how: Rotation | None = None) -> Recipe:
    """SliceGPT (2.11) with one rotation for a whole residual stream, which is cut to its first principal components.

    The paper has a rotation for every normalisation (`slicegpt_shortcuts`); here the architecture stays what it is. Its widths are
    multiples of 8, rounded down: `round_to=8` does. Its data are 128 x 2048 tokens. Normalised vectors stay as long as in the
    dense model, as the paper's; `Rotation(lengths="kept")` does better. A table that is also the head becomes two weights, which
    costs parameters; with `Rotation(ties="keep")` it doesn't.
    """
    return Recipe("slicegpt", None, batches, units="stream", prepare=partial(principal, batches=batches, how=how))


def slicegpt_shortcuts(batches: Batches, how: Rotation = Rotation(bases="each")) -> Recipe:  # noqa: B008 (frozen)
    """SliceGPT (2.11) as published: a rotation for every normalisation, and products d' x d' where a stream passes from one to
    the next; every stream loses the same share, and its basis is found from what is read once the streams before it are cut.

    The result is a graph (torch.fx.GraphModule). Streams that one rotation can't turn are turned too: norms after the addition or
    at the end of a branch, hidden states that are put out, something done to single channels in between. Deviations: layer norms
    stay, which costs one channel (the paper makes them RMS norms); nothing is mixed at random within what stays.

    At equal width it is ahead of `slicegpt`; but the products are parameters, two of d' x d' a block, and at equal parameters it
    depends (benchmarks/quality.md). `Rotation(bases="each", signals="dense")` finds all bases in one pass, and does worse.
    """
    prepare = partial(principal, batches=batches, how=how)
    return Recipe("slicegpt_shortcuts", None, batches, units="stream", prepare=prepare)


__all__ = ["slicegpt", "slicegpt_shortcuts"]
