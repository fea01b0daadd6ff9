"""Structural pruning from a model's graph alone: trace, plan, cut, check.

Names are imported when they are first used, so that the command can listen for Ctrl-C before torch is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from depgraph.lazily import importing

if TYPE_CHECKING:
    from depgraph import errors
    from depgraph.axes import Axis, Group, Member
    from depgraph.checkpoint import SaveReport, load, save
    from depgraph.dependency import DependencyGraph
    from depgraph.plan import Plan
    from depgraph.rules.custom import rule
    from depgraph.target import Target
    from depgraph.tokens import TokenMap
    from depgraph.tracing import trace
    from depgraph.widths import Cost

__version__ = "0.1.0"
__all__ = [
    "Axis",
    "Cost",
    "DependencyGraph",
    "Group",
    "Member",
    "Plan",
    "SaveReport",
    "Target",
    "TokenMap",
    "errors",
    "load",
    "rule",
    "save",
    "trace",
]
_HOMES = {
    "Axis": "depgraph.axes",
    "Cost": "depgraph.widths",
    "DependencyGraph": "depgraph.dependency",
    "Group": "depgraph.axes",
    "Member": "depgraph.axes",
    "Plan": "depgraph.plan",
    "SaveReport": "depgraph.checkpoint",
    "Target": "depgraph.target",
    "TokenMap": "depgraph.tokens",
    "load": "depgraph.checkpoint",
    "rule": "depgraph.rules.custom",
    "save": "depgraph.checkpoint",
    "trace": "depgraph.tracing",
}
__getattr__ = importing(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
