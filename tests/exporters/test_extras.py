"""Exports whose package is missing say how to install it, and write nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from depgraph.errors import ExportError
from exporters import to_executorch, to_gguf, to_openvino


@pytest.mark.parametrize(
    ("export", "module", "extra"),
    [
        (to_openvino, "openvino", "openvino"),
        (to_executorch, "executorch.exir", "executorch"),
        (to_gguf, "gguf", "gguf"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    export: Callable[..., Any], module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ExportError, match=rf"needs {extra}.*pip install 'depgraph\[{extra}\]'"):
        export(nn.Linear(2, 2), torch.randn(1, 2), tmp_path)
    assert not list(tmp_path.iterdir())
