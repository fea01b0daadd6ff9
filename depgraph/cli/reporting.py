"""The report page of `prune`: what was told of the cut, with how it was made."""

from __future__ import annotations

import datetime
import shlex
import sys
from pathlib import Path

from depgraph.cli.data import Measured
from depgraph.cli.options import Wish
from depgraph.options import Options
from depgraph.story import Making, Quality, Story, versions, write_story


def write_report(wish: Wish, story: Story, found: Measured, folder: Path) -> None:
    """Write `report.html` and `report.json` into a folder."""
    settings = {name: str(value) for name, value in Options.changed(wish.options).items()}
    making = Making(
        command=shlex.join(["depgraph", *sys.argv[1:]]),
        recipe=wish.recipe or wish.score,
        target=str(wish.keep),
        settings=settings,
        seeds={"scores": wish.loading.seed},
        versions=versions(),
        made=datetime.date.today().isoformat(),
    )
    quality: tuple[Quality, ...] = ()
    if (figures := found.figures) is not None:
        on = f"{figures['tokens']:,} held-out tokens"
        quality = (Quality("perplexity", figures["before"], figures["after"], data=on),)
    notes = (*story.notes, *([found.why] if found.why else []))
    write_story(story.with_(making=making, quality=quality, notes=notes), folder)
