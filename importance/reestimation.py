"""Batch norms that see what a pruned model really computes: their running statistics, taken anew (METHODS.md 2.23).

Channels that went change the means and variances of all that follows, which batch norms in eval mode go on subtracting and
dividing by as they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from depgraph.capture.capturing import quiet
from depgraph.errors import CaptureError, DataError, ScoreError, no_batches
from depgraph.onnx_door.examples import given_inputs
from depgraph.onnx_door.norms import BatchNorms, Seen
from depgraph.onnx_door.pieces import RunError
from importance.calling import check_batches, device_of, inputs_of, moved, run_model

LOOK = "look at the weights before it and at the batches"


def reestimate(model: Any, batches: Iterable[Any]) -> tuple[str, ...]:
    """Set the running statistics of all batch norms of `model` to those of `batches`; the names of the modules changed.

    Means are averages over batches of the means of each, variances likewise (unbiased ones), so batches should be alike in
    size. Only batch norms are in training mode meanwhile (dropout isn't), and there are no gradients. A batch norm that
    nothing comes into stays as it was, and a model without any has nothing to change; a model that was cut as a graph has none.
    METHODS.md advises 100 batches or more.

    Raises:
        DataError: there are no batches, or one doesn't fit the model, or has one value for each channel only.
        ScoreError: NaN or infinity comes into a batch norm, which is named.
        The model is as it was then.
    """
    check_batches(batches)
    if isinstance(model, ir.Model):
        return _in_file(model, batches)
    norms = {name: module for name, module in model.named_modules() if _runs(module)}
    if not norms:
        return ()
    device = device_of(model.parameters())
    count = 0
    with quiet(model), _renewed(norms), torch.no_grad():
        for batch in batches:
            args, kwargs = inputs_of(model, moved(batch, device))
            run_model(model, args, kwargs)
            count += 1
        if not count:
            raise no_batches("to re-estimate with")
        for name, norm in norms.items():
            _require_finite(name, norm)
        return tuple(name for name, norm in norms.items() if norm.num_batches_tracked)


@dataclass(frozen=True)
class Reestimation:
    """`reestimate` on these batches, as one of the steps that `importance.Recipe` takes `afterwards`."""

    batches: Iterable[Any]

    def __post_init__(self) -> None:
        check_batches(self.batches)

    def __call__(self, model: Any, /) -> tuple[str, ...]:
        return reestimate(model, self.batches)


def _in_file(model: ir.Model, batches: Iterable[Any]) -> tuple[str, ...]:
    """`reestimate` for a file; the names of the operators changed."""
    norms, count = BatchNorms(model), 0
    if not norms.norms:
        return ()
    sums = [[np.zeros(()), np.zeros(())] for _ in norms.norms]
    for batch in batches:
        try:
            _, kwargs = inputs_of(model, moved(batch, torch.device("cpu")))
            found = norms.run(given_inputs(model, {}, kwargs) or {})
        except (CaptureError, RunError) as error:
            raise DataError(f"a batch doesn't fit the file: {error}") from error
        sums = [[a + s.mean, b + s.variance] for (a, b), s in zip(sums, found, strict=True)]
        count += 1
    if not count:
        raise no_batches("to re-estimate with")
    for node, both in zip(norms.norms, sums, strict=True):
        if not all(np.isfinite(one).all() for one in both):
            raise ScoreError(f"NaN or infinity comes into batch norm {node.name!r}: {LOOK}")
    for node, (mean, variance) in zip(norms.norms, sums, strict=True):
        norms.set(node, Seen(mean / count, variance / count))
    return tuple(node.name or str(node.outputs[0].name) for node in norms.norms)


def _runs(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None and module.num_batches_tracked is not None


@contextmanager
def _renewed(norms: dict[str, Any]) -> Iterator[None]:
    """Batch norms in training mode that average what comes in from now on; those that nothing came into are put back.

    After an error all are.
    """
    before = {name: {n: b.clone() for n, b in norm.named_buffers(recurse=False)} for name, norm in norms.items()}
    momenta = {name: norm.momentum for name, norm in norms.items()}
    try:
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True
        yield
    except BaseException:
        _put_back(norms, before)
        raise
    finally:
        for name, norm in norms.items():
            norm.momentum, norm.training = momenta[name], False
    _put_back({name: norm for name, norm in norms.items() if not norm.num_batches_tracked}, before)


def _put_back(norms: dict[str, Any], before: dict[str, dict[str, torch.Tensor]]) -> None:
    for name, norm in norms.items():
        for buffer, tensor in before[name].items():
            getattr(norm, buffer).copy_(tensor)


def _require_finite(name: str, norm: Any) -> None:
    if not (torch.isfinite(norm.running_mean).all() and torch.isfinite(norm.running_var).all()):
        raise ScoreError(f"NaN or infinity comes into batch norm {name!r}: {LOOK}")
