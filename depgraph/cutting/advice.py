"""What to do where the module's own code can't compute a cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from depgraph.capture.sizes import Attr, Op, ShapeOf

if TYPE_CHECKING:
    from depgraph.capture.sizes import Expr
    from depgraph.dependency import DependencyGraph
    from depgraph.widths import Kept


def instead(graph: DependencyGraph, kept: Kept) -> str:
    """The other form, where there is one: code that depends on values has none, so axes whose sizes become numbers are to stay."""
    if graph.form != "module":
        return "use form='graph' (or 'auto')"
    behind = [name for leak in graph.capture.recording.leaks for name in axes_of(graph, leak.expr)]
    kinds = list(dict.fromkeys(graph[name].kind for name in behind if name in kept.masks))
    return f"leave whole the axis whose size that is (protect={kinds if kinds else '[...]'})"


def axes_of(graph: DependencyGraph, expr: Expr) -> Iterator[str]:
    """The axes that reach the sizes in an expression."""
    if isinstance(expr, Attr):
        yield from (name for site in graph.sizes.users.get(expr, ()) for name in graph.sizes.axes_of(site.node))
    elif isinstance(expr, ShapeOf):
        value = graph.capture.program.values.get(expr.node)
        yield from graph.widths.axes_of(value.dim(expr.dim)) if value is not None and value.shape else ()
    elif isinstance(expr, Op):
        yield from (name for operand in expr.operands for name in axes_of(graph, operand))
