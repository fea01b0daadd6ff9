"""Examples of the zoo as ONNX files."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from tests.zoo.example import Example


def exported(example: Example, path: Path, **options: Any) -> Path:
    """The file that torch's first exporter writes, with parameters under their names and nothing folded."""
    plain = {"do_constant_folding": False, "training": torch.onnx.TrainingMode.PRESERVE, "opset_version": 17}
    with _silence():
        torch.onnx.export(
            example.model, example.args, path, kwargs=example.kwargs, dynamo=False, **{**plain, **options}
        )
    return path


def exported_anew(example: Example, path: Path, opset: int = 20) -> Path:
    """The file that torch's present exporter writes."""
    with _silence():
        torch.onnx.export(
            example.model, example.args, path, kwargs=example.kwargs, opset_version=opset, external_data=False
        )
    return path


@contextlib.contextmanager
def _silence() -> Any:
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
