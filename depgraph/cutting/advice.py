"""What to do where the module's own code can't compute a cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph


def instead(graph: DependencyGraph) -> str:
    """The other form, where there is one: code that depends on values has none."""
    if graph.form == "module":
        return "protect the axis whose size that is (protect=[...])"
    return "use form='graph' (or 'auto')"
