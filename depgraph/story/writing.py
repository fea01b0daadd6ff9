"""A story as files: the page and its data."""

from __future__ import annotations

import json
from pathlib import Path

from depgraph.files import written
from depgraph.story.page import story_page
from depgraph.story.parts import Story

PAGE, DATA = "report.html", "report.json"


def write_story(story: Story, folder: str | Path) -> tuple[Path, Path]:
    """Write `report.html` and `report.json` into a folder that exists; each appears whole or not at all.

    Raises CheckpointError when they can't be written.
    """
    page, data = Path(folder) / PAGE, Path(folder) / DATA
    written(data, json.dumps(story.to_json(), indent=1, allow_nan=False) + "\n")
    written(page, story_page(story))
    return page, data
