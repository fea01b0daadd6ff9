"""Structural pruning from a model's graph alone: trace, plan, cut, check."""

from depgraph import errors
from depgraph.axes import Axis, Group, Member
from depgraph.checkpoint import SaveReport, load, save
from depgraph.dependency import DependencyGraph, trace
from depgraph.plan import Plan
from depgraph.rules.registry import rule
from depgraph.target import Target
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
    "errors",
    "load",
    "rule",
    "save",
    "trace",
]
