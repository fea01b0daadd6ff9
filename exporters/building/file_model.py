"""ONNX files in the place of the model that they were made of, so that the same figure of quality can be measured of both."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from exporters.calls import flatten_call
from exporters.decoder import first_feeds
from exporters.encoder_decoder import DECODER, ENCODER, with_mask
from exporters.feeds import Feeds, dtype_of
from exporters.onnx_check import open_session
from importance.formulas import Formula, formula_of, logits_of, no_loss

_PAST, _PRESENT = "past_key_values.", "present."


class Outputs(dict[str, Tensor]):
    """The outputs of a file by name, also as attributes, and by number as in a tuple."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, key: Any) -> Tensor:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


class FileModel(nn.Module):
    """Runs a file with the arguments of `like`, whose inputs and outputs it has; a single tensor comes back as one.

    Where labels are among the arguments and `like` gives a loss, so does this, by the same formula.
    """

    def __init__(self, path: Path, like: nn.Module, threads: int = 1) -> None:
        super().__init__()
        self._session = open_session(path, threads)
        self._like = [like]  # not a part of this module
        self._formula: Formula | None = None
        self.forward = functools.wraps(like.forward)(lambda *args, **kwargs: self._run(args, kwargs))

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        made = self._made(args, kwargs)
        if list(made) == ["output"]:
            return made["output"]
        given = self._arguments(args, kwargs)
        if isinstance(given.get("labels"), Tensor) and "loss" not in made:
            if self._formula is None:
                self._formula = formula_of(self._like[0], given)
            if self._formula is not no_loss:
                made["loss"] = self._formula(logits_of(made), given["labels"])
        return made

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All that was given, by the names of the model's arguments."""
        bound = inspect.signature(self._like[0].forward).bind_partial(*args).arguments
        return {**bound, **kwargs}

    def _made(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outputs:
        takes = {value.name for value in self._session.get_inputs()}
        taken = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor) or name in takes}
        call = flatten_call(self._like[0], args, taken)
        given = {name: _array(t) for name, t in zip(call.names, call.tensors, strict=True) if name in takes}
        return _outputs(self._session, given)


class DecoderFile(FileModel):
    """A decoder's file, which `to_decoder_onnx` made, run over whole texts: with an empty cache."""

    def _made(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outputs:
        given = self._arguments(args, kwargs)
        ids = given["input_ids"]
        mask = given.get("attention_mask")
        feeds = first_feeds(self._session, (ids, torch.ones_like(ids) if mask is None else mask))
        return _only_logits(_outputs(self._session, feeds))


class EncoderDecoderFiles(FileModel):
    """The two files in a folder that `to_encoder_decoder_onnx` made, run over whole pairs of texts."""

    def __init__(self, folder: Path, like: nn.Module, threads: int = 1) -> None:
        super().__init__(folder / DECODER, like, threads)
        self._encoder = open_session(folder / ENCODER, threads)

    def _made(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outputs:
        _, feeds = self.feeds(self._arguments(args, kwargs))
        return _only_logits(_outputs(self._session, feeds))

    def feeds(self, given: Mapping[str, Any]) -> tuple[Feeds, Feeds]:
        """What each file takes of what the model takes by name."""
        given = with_mask(self._like[0], {name: value for name, value in given.items() if value is not None})
        first = {value.name: _array(given[value.name]) for value in self._encoder.get_inputs()}
        made = _outputs(self._encoder, first)
        tokens = given["decoder_input_ids"]
        found: Feeds = {"input_ids": _array(tokens)}
        if (mask := given.get("attention_mask")) is not None:
            found["encoder_attention_mask"] = _array(mask)
        for value in self._session.get_inputs():
            there = made.get(_PRESENT + value.name.removeprefix(_PAST))
            if there is not None:
                found[value.name] = _array(there)
            elif value.name.startswith(_PAST):
                shape = (len(tokens), value.shape[1], 0, value.shape[3])
                found[value.name] = np.zeros(shape, dtype_of(value.type))
        return first, found


def _outputs(session: Any, feeds: Feeds) -> Outputs:
    takes = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    made = session.run(None, {name: array for name, array in feeds.items() if name in takes})
    return Outputs(zip(names, (torch.from_numpy(np.asarray(array)) for array in made), strict=True))


def _only_logits(made: Outputs) -> Outputs:
    return Outputs(logits=made["logits"])


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
