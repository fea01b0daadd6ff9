"""How good a model is, by what came with it: accuracy, perplexity on the end of a text, or the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from depgraph.capture.capturing import quiet
from depgraph.cli.data import TextData, perplexity
from depgraph.cli.models import Loaded
from depgraph.errors import DataError

if TYPE_CHECKING:
    from importance.sweeping import Figure


@dataclass(frozen=True)
class Measure:
    """A figure of quality, and how it is found: in eval mode, without gradients."""

    figure: Figure
    of: Callable[[nn.Module], float]


def measure_of(loaded: Loaded, found: TextData) -> Measure:
    """What can be measured of a model: the first of accuracy, perplexity, and the loss on batches held out or else given.

    Of one without data it is how far the output on the example moves.
    """
    from importance.sweeping import Figure

    if loaded.accuracy is not None and loaded.held_out is not None:
        figure = Figure("accuracy", "held-out batches", True, *_guessed(loaded))
        return Measure(figure, partial(_accuracy, loaded=loaded))
    if found.held_out:
        figure = Figure("perplexity", f"{found.held_out_tokens:,} held-out tokens", guessing=_answers(loaded, dims=3))
        return Measure(figure, lambda model: perplexity(model, found.held_out, loaded.model))
    if loaded.held_out is not None:
        return Measure(Figure("loss", "held-out batches"), partial(_loss, batches=loaded.held_out, loaded=loaded))
    batches = loaded.batches if loaded.batches is not None else found.calibration or None
    if batches is None:
        return shift_of(loaded)
    return Measure(Figure("loss", "the batches that scores are from"), partial(_loss, batches=batches, loaded=loaded))


def _guessed(loaded: Loaded) -> tuple[float | None, float]:
    """The accuracy of choosing at random, None where the number of classes isn't known, and two standard errors of it."""
    from importance.samples import largest_size

    classes, held_out = _answers(loaded, dims=2), loaded.held_out
    if classes is None or not isinstance(held_out, (list, tuple)):
        return None, 0.0
    chance, count = 1 / classes, sum(largest_size(batch) for batch in held_out)
    return chance, 2 * math.sqrt(chance * (1 - chance) / max(count, 1))


def _answers(loaded: Loaded, dims: int) -> int | None:
    """Among how many the model chooses: the width of its first output, where that has so many dims and two elements or more."""
    with quiet(loaded.model), torch.no_grad():
        made = _floats(loaded.model(*loaded.args, **loaded.kwargs))
    first = next((output for output in made if output.ndim), None)
    return first.shape[-1] if first is not None and first.ndim == dims and first.shape[-1] > 1 else None


def shift_of(loaded: Loaded) -> Measure:
    """How far the output on the example moves: what can be said of a model that comes without data."""
    from importance.sweeping import NO_DATA, shift_figure

    with quiet(loaded.model), torch.no_grad():
        dense = _floats(loaded.model(*loaded.args, **loaded.kwargs))

    def shift(model: nn.Module) -> float:
        with quiet(model), torch.no_grad():
            made = _floats(model(*loaded.args, **loaded.kwargs))
        pairs = [(a, b) for a, b in zip(made, dense, strict=True) if a.shape == b.shape]  # by-products may be narrower
        if not pairs:
            raise DataError(
                "no output has kept its width, so that none can be compared: trace with fixed=['output 0'], or give data"
            )
        apart = sum(float((a - b).square().sum()) for a, b in pairs)
        return math.sqrt(apart / max(sum(float(b.square().sum()) for _, b in pairs), 1e-30))

    return Measure(shift_figure(NO_DATA), shift)


def _floats(output: Any) -> list[torch.Tensor]:
    """The outputs that are floats, in the order that an ONNX file of the model has them in."""
    from exporters.calls import named_outputs

    return [tensor.float() for tensor in named_outputs(output)[0].values() if tensor.is_floating_point()]


def _loss(model: nn.Module, batches: Any, loaded: Loaded) -> float:
    """The mean loss over samples."""
    from importance.calling import loss_of_form

    return _mean(model, batches, lambda batch: loss_of_form(loaded.model, model, batch, loaded.loss))


def _accuracy(model: nn.Module, loaded: Loaded) -> float:
    from importance.calling import inputs_of, run_model

    accuracy = loaded.accuracy
    assert accuracy is not None
    return _mean(model, loaded.held_out, lambda batch: accuracy(run_model(model, *inputs_of(model, batch)), batch))


def _mean(model: nn.Module, batches: Any, figure: Callable[[Any], Any]) -> float:
    """The mean of a figure of batches, each counted by its samples."""
    from importance.rivals import mean_of

    found = mean_of(model, batches, figure)
    if found is None:
        raise DataError(
            "there are no batches to measure quality on (a generator gives its batches only once: give a list)"
        )
    return found
