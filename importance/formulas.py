"""A model's own loss, computed from the logits of another: of the usual formulas, that which gives the model's number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from depgraph.errors import ScoreError
from importance.losses import IGNORED, next_token

Formula = Callable[[Tensor, Tensor], Tensor]
_NEAR = 1e-3  # of the loss


def _classes(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, -2).float(), labels.flatten().long(), ignore_index=IGNORED)


def _pixels(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), labels.long(), ignore_index=IGNORED)


def _numbers(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.mse_loss(logits.float().reshape(labels.shape), labels.float())


def _yes_or_no(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits.float().reshape(labels.shape), labels.float())


def no_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """What stands for the formula of a model that gives none."""
    raise ScoreError("the model gives no loss")


FORMULAS: tuple[Formula, ...] = (_classes, next_token, _numbers, _yes_or_no, _pixels)


def formula_of(model: nn.Module, given: Mapping[str, Any]) -> Formula:
    """The formula by which `model` computes its loss from its logits and the labels among what it is given by name.

    Raises ScoreError where it is none of the usual ones.
    """
    with torch.no_grad():
        output = model(**given)
    own, logits, labels = loss_in(output), logits_of(output), given["labels"]
    if own is None:
        return no_loss
    for formula in FORMULAS:
        try:
            found = formula(logits, labels)
        except (RuntimeError, ValueError, IndexError, ScoreError):  # it is for other shapes
            continue
        if abs(float(found) - float(own)) <= _NEAR * abs(float(own)):
            return formula
    raise ScoreError(
        f"the loss of {type(model).__name__} isn't computed from its logits and labels by a formula that is known: give a loss"
    )


def loss_in(output: Any) -> Tensor | None:
    """The loss that a model gave with its output, None where it didn't."""
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return found if isinstance(found, Tensor) else None


def logits_of(output: Any) -> Tensor:
    """The logits of an output, else the first tensor that isn't the loss."""
    found = getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    values = output.values() if isinstance(output, Mapping) else output
    return next(value for value in values if isinstance(value, Tensor) and value.ndim)
