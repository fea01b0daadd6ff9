"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from depgraph.errors import CheckpointError
from depgraph.files import replacing, written


def test_a_failure_leaves_what_was_there_and_nothing_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    target = tmp_path / "profile.json"
    written(target, "before")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match=r"profile.json can't be written: No space left on device"):
        written(target, "after")
    with pytest.raises(ZeroDivisionError), replacing(target) as draft:
        draft.write_text(str(1 / 0))
    assert [*tmp_path.iterdir()] == [target] and target.read_text() == "before"
