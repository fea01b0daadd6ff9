"""Writing an ONNX model: under another name first, its data beside it where it is large, then renamed."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from depgraph import interruption
from depgraph.errors import CheckpointError
from depgraph.onnx_door.loading import UNDECLARED
from depgraph.onnx_door.running import weight_bytes
from depgraph.onnx_door.streaming import stream

OUTSIDE = "depgraph.outside"
"""Where a cut model notes that the original's weights lay beside it."""
_LARGEST_INLINE = 1_000_000_000
"""Bytes of weights that go into the file itself, which is put together in memory; protobuf ends at 2 GiB."""


def write(model: ir.Model, path: str | os.PathLike[str]) -> list[Path]:
    """Write a model to `path`, and its weights beside it as ``NAME.data`` if there are many or they lay so before.

    What is there already is replaced only once all is written. Returns the files; raises CheckpointError.
    """
    target = Path(path)
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder: give the name of a file, such as {target / 'model.onnx'}")
    if not target.parent.is_dir():
        raise CheckpointError(f"the folder {target.parent} for {target.name} doesn't exist: make it first")
    outside = weight_bytes(model) > _LARGEST_INLINE or lies_outside(model)
    data = f"{target.name}.data" if outside else None
    with _aside(target) as draft:
        if data is None:
            with draft.open("wb") as opened:
                stream(_as_declared(model), opened)
        else:
            ir.save(_as_declared(model), draft, external_data=data)
        interruption.check()
        moved = [target.with_name(file.name) for file in sorted(draft.parent.iterdir(), reverse=True)]
        for file in moved:
            os.replace(draft.parent / file.name, file)
    return sorted(moved)


def _as_declared(model: ir.Model) -> ir.Model:
    """A copy in which initializers have no declarations but those that the file gave; onnx_ir would write one for each."""
    copy = model.clone()
    for name in model.meta.get(UNDECLARED, ()):
        value = copy.graph.initializers.get(name)
        if value is not None:
            value.shape = value.type = None
    return copy


@contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """A file of the target's name in a folder beside it that is gone afterwards."""
    folder = target.with_name(f".{target.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        folder.mkdir()
        yield folder / target.name
    except OSError as error:
        raise CheckpointError(f"{target} can't be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def lies_outside(model: ir.Model) -> bool:
    """Do weights lie beside the file, or did those that they were cut from?"""
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    return bool(model.meta.get(OUTSIDE)) or any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors)
