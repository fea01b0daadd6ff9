"""Structural pruning from a model's graph alone: trace, plan, cut, check.

Names are imported when they are first used, so that the command can listen for Ctrl-C before torch is loaded.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

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
    "Axis": "axes",
    "Cost": "widths",
    "DependencyGraph": "dependency",
    "Group": "axes",
    "Member": "axes",
    "Plan": "plan",
    "SaveReport": "checkpoint",
    "Target": "target",
    "TokenMap": "tokens",
    "load": "checkpoint",
    "rule": "rules.custom",
    "save": "checkpoint",
    "trace": "tracing",
}


def __getattr__(name: str) -> Any:
    """A public name from its module, or a module of the package."""
    if name in _HOMES:
        globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return globals()[name]
    if name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
