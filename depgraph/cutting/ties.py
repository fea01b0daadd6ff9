"""Sizes that the module's Python computes from one another: where they stand, and which of them must agree.

What is run many times, such as one block that is applied over and over, has such places each time: alike ones are kept once.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from depgraph.capture.recording import Comparison, Site
from depgraph.capture.sizes import Attr, Op, ShapeOf, attributes
from depgraph.cutting.expressing import SizeRules

if TYPE_CHECKING:
    from depgraph.capture.sizes import Expr

_SPLITS = ("aten.chunk", "aten.split.Tensor", "aten.unsafe_chunk")


@dataclass(frozen=True)
class Tie:
    """Sizes at `sites` must agree: with each other where one attribute gives them, else with what their expressions give.

    `node` is a split whose parts must be even, `comparison` two sizes that the code found equal. `alone` are the places where
    attributes in the expressions stand by themselves.
    """

    sites: tuple[Site, ...]
    axes: tuple[str, ...]
    node: str = ""
    comparison: Comparison | None = None
    alone: tuple[tuple[Attr, tuple[Site, ...]], ...] = ()


def find_ties(rules: SizeRules) -> list[Tie]:
    """All places of a model whose sizes depend on one another and on some axis."""
    finder = _Finder(rules)
    for attr, sites in rules.users.items():
        finder.add((attr,), sites, 2)
    every = [s for found in rules.sites.values() for s in found]
    unknown: dict[Attr, list[Site]] = {}
    for site in every:
        if isinstance(site.expr, Op) and isinstance(site.value, int):
            inner = attributes(site.expr) - rules.users.keys()
            for attr in inner:
                unknown.setdefault(attr, []).append(site)
            if not inner:
                finder.add(("by itself",), [site], 1)
    for site in every:
        if isinstance(site.expr, ShapeOf) and _axes_in(rules, site.expr) and not _same_dim(rules, site):
            finder.add(("copied",), [site], 1)
    for attr, sites in unknown.items():
        finder.add((attr, "within"), sites, 1)
    finder.add_splits()
    finder.add_compared()
    return list(finder.ties.values())


class _Finder:
    """Collects the ties of a model: those alike in kind and in all their places once."""

    def __init__(self, rules: SizeRules) -> None:
        self.rules = rules
        self.ties: dict[Hashable, Tie] = {}
        self.dim = cache(self._dim)
        self.alone = cache(lambda attr: tuple(self._distinct(rules.users.get(attr, ())).values()))

    def add(self, kind: Hashable, sites: Iterable[Site], least: int) -> None:
        """A tie of the sites that some axis reaches, alike ones once; none when there are fewer than `least`."""
        axes: dict[str, None] = {}
        reached = []
        for site in sites:
            reach = [*self.rules.axes_of(site.node), *_axes_in(self.rules, site.expr)]
            if reach:
                axes.update(dict.fromkeys(reach))
                reached.append(site)
        distinct = self._distinct(reached)
        if len(distinct) >= least:
            attrs = [attr for site in distinct.values() for attr in attributes(site.expr)]  # type: ignore[arg-type]
            tie = Tie(tuple(distinct.values()), tuple(axes), alone=self._alone(attrs))
            self.ties.setdefault((kind, *distinct), tie)

    def add_splits(self) -> None:
        """Splits into parts that must be even."""
        for name, node in self.rules.nodes.items():
            axes = dict.fromkeys(self.rules.axes_of(name)) if str(node.target).startswith(_SPLITS) else ()
            if axes:
                dims = tuple(map(self.dim, self.rules.values[node.all_input_nodes[0].name].dims))
                self.ties.setdefault(
                    (node.target, *node.args[1:], *node.kwargs.items(), dims), Tie((), tuple(axes), name)
                )

    def add_compared(self) -> None:
        """What the code computes from sizes and found equal, such as `heads % 2` and 0, must stay so."""
        rules = self.rules
        for c in rules.graph.capture.recording.comparisons:
            attrs = attributes(c.left) | attributes(c.right)
            if (
                not c.equal
                or not (isinstance(c.left, Op) or isinstance(c.right, Op))
                or not attrs <= rules.users.keys()
            ):
                continue
            sites = [site for attr in sorted(attrs, key=str) for site in self.alone(attr)]
            reached = [a for site in sites for a in rules.axes_of(site.node)]
            axes = dict.fromkeys([*reached, *_axes_in(rules, c.left), *_axes_in(rules, c.right)])
            if axes:
                tie = Tie(tuple(sites), tuple(axes), comparison=c, alone=self._alone(attrs))
                self.ties.setdefault(("compared", self._as_dims(c.left), self._as_dims(c.right)), tie)

    def _alone(self, attrs: Iterable[Attr]) -> tuple[tuple[Attr, tuple[Site, ...]], ...]:
        return tuple((attr, self.alone(attr)) for attr in dict.fromkeys(attrs) if attr in self.rules.users)

    def _distinct(self, sites: Iterable[Site]) -> dict[Hashable, Site]:
        """Of sites that are alike, and so always need the same size, the first."""
        found: dict[Hashable, Site] = {}
        for site in sites:
            found.setdefault(self._likeness(site), site)
        return found

    def _likeness(self, site: Site) -> Hashable:
        """The operator, the place among its arguments, what stands there, and the dims that it takes and makes."""
        rules, node = self.rules, self.rules.nodes[site.node]
        values = [rules.values[n.name] for n in (*node.all_input_nodes[:1], node) if n.name in rules.values]
        dims = tuple(self.dim(d) for v in values for d in v.dims)
        reach = tuple(sorted(rules.axes_of(site.node)))
        return node.target, site.path, site.value, self._as_dims(site.expr), dims, reach

    def _dim(self, dim: int) -> Hashable:
        """What a dim has in common with all that always have its size: its class, or that size where no axis reaches it."""
        widths = self.rules.graph.widths
        return widths.class_of(dim) if widths.axes_of(dim) else (self.rules.graph.capture.program.relations.sizes[dim],)

    def _as_dims(self, expr: Expr | None) -> Hashable:
        """An expression with what dims are in the place of their sizes: such that are alike always have the same value."""
        if isinstance(expr, ShapeOf):
            value = self.rules.values.get(expr.node)
            return ("dim", self.dim(value.dim(expr.dim))) if value is not None and value.shape else expr
        if isinstance(expr, Op):
            return expr.name, *map(self._as_dims, expr.operands)
        return expr


def _same_dim(rules: SizeRules, site: Site) -> bool:
    """Is the size copied from a dim that the operator's own result has too?"""
    assert isinstance(site.expr, ShapeOf)
    source, made = rules.values.get(site.expr.node), rules.values.get(site.node)
    if source is None or made is None:
        return True
    widths = rules.graph.widths
    return widths.class_of(source.dim(site.expr.dim)) in {widths.class_of(d) for d in made.dims}


def _axes_in(rules: SizeRules, expr: Expr | None) -> list[str]:
    if isinstance(expr, ShapeOf):
        value = rules.values.get(expr.node)
        return rules.graph.widths.axes_of(value.dim(expr.dim)) if value is not None and value.shape else []
    if isinstance(expr, Op):
        return [a for operand in expr.operands for a in _axes_in(rules, operand)]
    return []
