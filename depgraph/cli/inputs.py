"""Example inputs for a transformers model from its config alone: text, images, spectra or sound."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from depgraph.capture.capturing import quiet
from depgraph.capture.keeping import unwritten
from depgraph.errors import ModelError, one_line

BATCH, TOKENS, SIDE, SAMPLES = 2, 16, 224, 16000
HINT = "write a function that returns the model and its inputs, and give file.py:function"


@dataclass(frozen=True)
class _Maker:
    """Makes inputs of one model."""

    model: nn.Module
    folder: Path
    random: torch.Generator

    @property
    def config(self) -> Any:
        return self.model.config

    def text(self) -> Tensor:
        config = self.config.get_text_config()
        length = min(TOKENS, getattr(config, "max_position_embeddings", None) or TOKENS)
        low = min(3, config.vocab_size - 1)
        return torch.randint(low, config.vocab_size, (BATCH, length), generator=self.random)

    def pixels(self) -> Tensor:
        config = getattr(self.config, "vision_config", None) or self.config
        size = getattr(config, "image_size", None) or self._processor_size()
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return self._floats(BATCH, getattr(config, "num_channels", 3), int(height), int(width))

    def features(self) -> Tensor:
        """Spectra [batch, bands, frames]; encoders for speech halve the frames."""
        return self._floats(BATCH, self.config.num_mel_bins, 2 * self.config.max_source_positions)

    def sound(self) -> Tensor:
        """A waveform [batch, samples], or a spectrum [batch, frames, bands] where the config has its size."""
        bands, frames = getattr(self.config, "num_mel_bins", None), getattr(self.config, "max_length", None)
        return self._floats(BATCH, frames, bands) if bands and frames else self._floats(BATCH, SAMPLES)

    def _floats(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def _processor_size(self) -> Any:
        """The size of images in preprocessor_config.json, else the usual one."""
        try:
            size = json.loads((self.folder / "preprocessor_config.json").read_text())["size"]
        except (OSError, ValueError, KeyError, TypeError):
            return SIDE
        if isinstance(size, dict):
            side = size.get("shortest_edge", SIDE)
            return size.get("height", side), size.get("width", side)
        return size


_MAKERS: dict[str, Callable[[_Maker], Tensor]] = {
    "input_ids": _Maker.text,
    "pixel_values": _Maker.pixels,
    "input_features": _Maker.features,
    "input_values": _Maker.sound,
}


def make_inputs(model: nn.Module, folder: Path, seed: int) -> dict[str, Tensor]:
    """Keyword arguments on which the model runs (not tried on meta): its main input, and others it can't do without.

    Raises ModelError when none of those that can be made up are enough.
    """
    main = getattr(model, "main_input_name", "")
    takes = inspect.signature(model.forward).parameters
    if main not in _MAKERS or main not in takes:
        raise ModelError(
            f"no example inputs can be made up for a {type(model).__name__}, whose main input is {main!r}: {HINT}"
        )
    maker = _Maker(model, folder, torch.Generator().manual_seed(seed))
    names = [main, *(name for name in _MAKERS if name in takes and name != main)]
    failure = ""
    for chosen in ([main], names):
        try:
            inputs = _placed({name: _MAKERS[name](maker) for name in chosen}, model)
            if getattr(maker.config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
                inputs["decoder_input_ids"] = maker.text().to(inputs[main].device)
            _run(model, inputs)
        except Exception as error:
            failure = failure or one_line(error)
            continue
        return inputs
    raise ModelError(f"{type(model).__name__} doesn't run on made-up inputs ({', '.join(names)}; {failure}): {HINT}")


def _run(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Try inputs on a model, unless they are on meta."""
    if all(tensor.device.type != "meta" for tensor in inputs.values()):
        with quiet(model), torch.no_grad(), unwritten(model):
            model(**inputs)


def _placed(inputs: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """On the model's device, floating-point ones in its dtype."""
    first = next(iter(model.parameters()))
    return {
        name: tensor.to(first.device, first.dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in inputs.items()
    }
