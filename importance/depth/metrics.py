"""What a model without some of its parts is measured by: its loss, or how far its output is from the whole model's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from depgraph.errors import ScoreError
from importance.calling import named_inputs
from importance.choices import pick
from importance.losses import HINT, Loss, own_loss

_LARGEST = 700.0  # whose exp is still a number


class Measured(NamedTuple):
    """A sum over a batch, and of how many; a value is the quotient of both, summed over all batches."""

    total: float
    of: int


class Metric(Protocol):
    """The lower, the better; `nonnegative` says that no batch's total is below 0, so that sums only grow.

    A set without which it is NaN or infinite is never the best.
    """

    @property
    def nonnegative(self) -> bool: ...

    def __call__(self, model: nn.Module, output: Any, batch: Any, dense: Any) -> Measured:
        """Measure an output of `model` on a batch, beside that of the whole model."""
        ...


@dataclass(frozen=True)
class LossMetric:
    """The loss: `loss(output, batch)`, or with None the model's own or next-token cross-entropy; a batch weighs as many samples.

    A loss of the caller's may be negative: pass `nonnegative=False` then, and no candidate is stopped early.

    Raises ScoreError, when called: there is no loss, or it is no scalar.
    """

    loss: Loss | None = None
    nonnegative: bool = True

    def __call__(self, model: nn.Module, output: Any, batch: Any, dense: Any) -> Measured:
        found: Any = own_loss(output, named_inputs(model, batch)) if self.loss is None else self.loss(output, batch)
        found = torch.as_tensor(found)
        if found.numel() != 1:
            raise ScoreError(f"the loss must be a scalar, it has shape {list(found.shape)}: {HINT}")
        count = _samples(output)
        return Measured(float(found) * count, count)


def _norm(whole: Tensor, cut: Tensor) -> Measured:
    found = (whole - cut).flatten(1).norm(dim=1) if whole.ndim > 1 else (whole - cut).abs()
    return Measured(float(found.sum()), found.numel())


def _angular(whole: Tensor, cut: Tensor) -> Measured:
    found = torch.arccos(F.cosine_similarity(whole, cut, dim=-1).clamp(0, 1))
    found = found.masked_fill((whole == cut).all(dim=-1), 0)
    return Measured(float(found.sum()), found.numel())


def _kl(whole: Tensor, cut: Tensor) -> Measured:
    p, q = whole.log_softmax(-1), cut.log_softmax(-1)
    return Measured(float(_divergence(p, q).clamp_min(0).sum()), whole.numel())


def _js(whole: Tensor, cut: Tensor) -> Measured:
    p, q = whole.log_softmax(-1), cut.log_softmax(-1)
    found = ((p.exp() * _over_middle(p, q)).sum(-1) + (q.exp() * _over_middle(q, p)).sum(-1)) / 2
    return Measured(float(found.clamp_min(0).sum()), whole.numel())


def _js_reversed(whole: Tensor, cut: Tensor) -> Measured:
    p, q = whole.log_softmax(-1), cut.log_softmax(-1)
    middle = (p.exp() + q.exp()) / 2
    found = -(middle * (_over_middle(p, q) + _over_middle(q, p))).sum(-1) / 2
    return Measured(float(found.clamp_min(0).sum()), whole.numel())


def _over_middle(p: Tensor, q: Tensor) -> Tensor:
    """log(P / ((P + Q) / 2)) of log-probabilities: 0 where they are the same."""
    return -torch.log1p(torch.expm1((q - p).clamp_max(_LARGEST)) / 2)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities, over the last dim."""
    return (p.exp() * (p - q)).sum(-1)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Measured]] = {
    "norm": _norm,
    "angular": _angular,
    "kl": _kl,
    "js": _js,
    "js-reversed": _js_reversed,
}


@dataclass(frozen=True)
class Distance:
    """FinerCut's distances of the first floating output (the logits [..., classes]) from the whole model's (METHODS.md 2.26).

    "norm": mean over samples of the norm of the difference; "angular": mean over tokens of arccos of the cosine, cut to
    [0, 1], no 1/pi; "kl", "js": divergences of the softmax over the last dim, as a mean over all numbers of the logits; "js" is
    the symmetric one, "js-reversed" what the published code computes, KL in the other direction. All in float64.

    Raises ScoreError for an unknown name; when called, where the output has no fractions.
    """

    name: str = "js"
    nonnegative: bool = True

    def __post_init__(self) -> None:
        pick(DISTANCES, self.name, "distance of outputs")

    def __call__(self, model: nn.Module, output: Any, batch: Any, dense: Any) -> Measured:
        return DISTANCES[self.name](main_output(dense).double(), main_output(output).double())


def main_output(output: Any) -> Tensor:
    """The first tensor of fractions, with a dim, in what a model returns; raises ScoreError where there is none."""
    leaves = (leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
    found = next((leaf for leaf in leaves if leaf.is_floating_point() and leaf.ndim), None)
    if found is None:
        raise ScoreError("the model returns no tensor of fractions to compare: give a metric of your own")
    return found


def _samples(output: Any) -> int:
    sizes = [len(leaf) for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.ndim]
    return sizes[0] if sizes else 1
