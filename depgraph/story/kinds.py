"""Kinds of axes: those that are alike but for the numbers of the modules that they lie in, across stages of a model too."""

from __future__ import annotations

import re
from collections.abc import Iterable

from depgraph.inspecting import starred
from depgraph.story.parts import AxisCut, Story

_BRACES = re.compile(r"\{[^}]*\}")


def kind_of(what: str) -> str:
    """What an axis or a family is, with the numbers of modules starred."""
    words = _BRACES.sub("*", what).split(" ")
    return " ".join(starred(word) if "." in word else word for word in words)


def kinds_of(story: Story, axes: Iterable[AxisCut]) -> dict[str, list[AxisCut]]:
    """Axes by their kind, in the order of the story."""
    found: dict[str, list[AxisCut]] = {}
    for axis in axes:
        found.setdefault(kind_of(story.families[axis.family]), []).append(axis)
    return found
