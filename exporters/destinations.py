"""Where a model can go beside ONNX: for each format its name, what to call it, and the function that writes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from exporters.executorch_export import to_executorch
from exporters.gguf_export import to_gguf
from exporters.openvino_export import to_openvino
from exporters.verifying import FileReport


@dataclass(frozen=True)
class Cargo:
    """What is to be written: a model, example inputs, and its tokenizer or the folder of it, if it has one."""

    model: nn.Module
    args: Any
    kwargs: Mapping[str, Any] | None = None
    tokenizer: Any = None


@dataclass(frozen=True)
class Destination:
    """A format: the suffix of its file, the extra to install (`depgraph[...]`) and its package, what writes it.

    `write` takes the file's path too, and raises ExportError.
    """

    suffix: str
    extra: str
    module: str
    write: Callable[[Cargo, Path], FileReport]


def _openvino(cargo: Cargo, path: Path) -> FileReport:
    return to_openvino(cargo.model, cargo.args, path, cargo.kwargs)


def _executorch(cargo: Cargo, path: Path) -> FileReport:
    return to_executorch(cargo.model, cargo.args, path, cargo.kwargs)


def _gguf(cargo: Cargo, path: Path) -> FileReport:
    return to_gguf(cargo.model, cargo.args, path, cargo.kwargs, tokenizer=cargo.tokenizer)


DESTINATIONS: Mapping[str, Destination] = {
    "openvino": Destination(".xml", "openvino", "openvino", _openvino),
    "executorch": Destination(".pte", "executorch", "executorch", _executorch),
    "gguf": Destination(".gguf", "gguf", "gguf", _gguf),
}
"""The formats by name."""
