"""Files of an export appear together or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from depgraph.errors import ExportError
from exporters.verifying import published


@pytest.fixture
def drafts(tmp_path: Path) -> dict[Path, Path]:
    """Two new files, and one old one where the first is to go."""
    (tmp_path / "drafts").mkdir()
    made = {tmp_path / "drafts" / name: tmp_path / name for name in ("a", "b")}
    for draft in made:
        draft.write_text("new")
    (tmp_path / "a").write_text("old")
    return made


def test_all_files_take_their_places(drafts: dict[Path, Path]) -> None:
    assert published(drafts) == 6
    assert [target.read_text() for target in drafts.values()] == ["new", "new"]


def test_a_failure_leaves_what_was_there(
    drafts: dict[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "b":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ExportError, match="b could not be written .No space left on device"):
        published(drafts)
    assert (tmp_path / "a").read_text() == "old" and not (tmp_path / "b").exists()


def test_a_folder_is_not_replaced(drafts: dict[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with pytest.raises(ExportError, match="b is a folder"):
        published(drafts)
    assert (tmp_path / "a").read_text() == "old" and (tmp_path / "b").is_dir()
