"""Every error the library raises on purpose: one sentence that says what, where, and what to do."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from depgraph.unmet import Unmet


class DepgraphError(Exception):
    """Base of all errors raised on purpose by `depgraph`, `importance` and `exporters`."""


class CaptureError(DepgraphError):
    """The model could not be turned into a graph (inputs that don't fit, data-dependent control flow)."""


class UnsupportedOperator(DepgraphError):
    """An operator has no rule and the caller asked for `strict=True`."""


class RuleError(DepgraphError):
    """A rule for an operator can't be read, or doesn't fit the tensors that the operator is called with."""


class OpaqueValue(CaptureError):
    """An input or an output holds tensors where they can't be seen, or none at all."""


class UnsupportedParameter(DepgraphError):
    """A parameter is quantised, sparse or distributed and can't be sliced."""


class NothingToPrune(DepgraphError):
    """The graph has no axis that could lose a group."""


class TargetError(DepgraphError):
    """A target is out of range, or lies below what the floors allow: then the least that can be reached is `above` times its limit.

    `unmet` has the least by measure, None where the target was out of range."""

    def __init__(self, message: str = "", above: float = math.inf, unmet: Unmet | None = None) -> None:
        super().__init__(message)
        self.above = above
        self.unmet = unmet


class ScoreError(DepgraphError):
    """An estimator is unknown, or gave scores of the wrong length, NaN or infinite."""


class PlanError(DepgraphError):
    """A plan does not fit the graph it is applied to."""


class CutError(DepgraphError):
    """The module's own Python can't express the plan; the message names file and line."""


class RotationError(DepgraphError):
    """A residual stream can't be rotated: something acts on its channels one by one, or a weight stands for two things."""


class CheckError(DepgraphError):
    """The pruned model does not compute what the zeroed original computes."""


class CheckpointError(DepgraphError):
    """A folder can't be written to or read from."""


class ExportError(DepgraphError):
    """An exported file differs from the model, or could not be written."""


class ProfileError(DepgraphError):
    """A device profile can't be read or made, or is of another model, machine or version than it is used for."""


class DataError(DepgraphError):
    """A data file is unreadable or empty."""


class ModelError(DepgraphError):
    """What names a model names none that can be loaded, or none whose example inputs can be made."""


class SweepError(DepgraphError):
    """A sweep can't begin or go on: its settings have changed, its file can't be read, or one of its processes died."""


_LONGEST = 300


def first_line(error: BaseException) -> str:
    """The first line of an error's message without a full stop, short enough for a sentence; its type where it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = lines[0].strip().rstrip(".")
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."


def one_line(error: BaseException) -> str:
    """An error's type, and the first line of its message if it has any."""
    return f"{type(error).__name__}: {first_line(error)}" if str(error).strip() else type(error).__name__


def no_batches(purpose: str) -> DataError:
    """What to raise where there are none to do something with, such as "to score with"."""
    return DataError(f"there are no batches {purpose} (a generator gives its batches only once: pass a list)")


def unfit_batch(model: object, error: BaseException, hint: str = "") -> DataError:
    """What to raise where a model fails on a batch."""
    return DataError(f"a batch doesn't fit {type(model).__name__}, which failed with {one_line(error)}{hint}")
