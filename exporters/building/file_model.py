"""An ONNX file in the place of the model that it was made of, so that the same figure of quality can be measured of both."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from exporters.calls import flatten_call
from exporters.onnx_check import open_session


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
    """Runs a file with the arguments of `like`, whose inputs and outputs it has; a single tensor comes back as one."""

    def __init__(self, path: Path, like: nn.Module, threads: int = 1) -> None:
        super().__init__()
        self._session = open_session(path, threads)
        self._like = [like]  # not a part of this module
        self._takes = {value.name: value.type for value in self._session.get_inputs()}
        self._gives = [value.name for value in self._session.get_outputs()]
        self.forward = functools.wraps(like.forward)(self._run)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        taken = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor) or name in self._takes}
        call = flatten_call(self._like[0], args, taken)
        given = {name: _array(t) for name, t in zip(call.names, call.tensors, strict=True) if name in self._takes}
        made = [torch.from_numpy(np.asarray(array)) for array in self._session.run(None, given)]
        return made[0] if self._gives == ["output"] else Outputs(zip(self._gives, made, strict=True))


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
