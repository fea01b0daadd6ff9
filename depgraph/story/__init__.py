"""What a pruning did, told to people: a story as data (`parts`), made after a cut (`telling`), drawn as a page (`page`)."""

from depgraph.story.in_steps import stages, tell_steps
from depgraph.story.page import story_page
from depgraph.story.parts import (
    AxisCut,
    Curve,
    Dropped,
    LayerWidths,
    MadeFile,
    Making,
    Quality,
    Sensitivity,
    Stage,
    Story,
    Timing,
    TradeOff,
    Trial,
)
from depgraph.story.telling import tell, versions
from depgraph.story.writing import write_story

__all__ = [
    "AxisCut",
    "Curve",
    "Dropped",
    "LayerWidths",
    "MadeFile",
    "Making",
    "Quality",
    "Sensitivity",
    "Stage",
    "Story",
    "Timing",
    "TradeOff",
    "Trial",
    "stages",
    "story_page",
    "tell",
    "tell_steps",
    "versions",
    "write_story",
]
