"""The public names of `importance`, which are imported when they are first used."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

import importance


@pytest.mark.parametrize("name", importance.__all__)
def test_every_public_name_is_there_and_no_module_takes_its_place(name: str) -> None:
    found = getattr(importance, name)
    module = find_spec(f"importance.{name}")
    assert module is None or found.__spec__ == module
    assert name in dir(importance)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Magnitud'"):
        importance.Magnitud  # noqa: B018


def test_a_score_by_magnitude_needs_nothing_of_onnx() -> None:
    told = "import sys, depgraph, importance; importance.Magnitude(), depgraph.trace; "
    told += "sys.exit(int('onnxruntime' in sys.modules or 'onnx_ir' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", told], check=False).returncode == 0
