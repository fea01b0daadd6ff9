"""The network behind both doors, made once."""

from __future__ import annotations

import pytest

from tests.onnx_door.both import Doors, both


@pytest.fixture(scope="session")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Doors:
    return both(tmp_path_factory.mktemp("both"))
