"""Can the module's own Python express a cut, and which of its integers must change for that?

Every size in the captured graph knows the expression that made it (`depgraph.capture.recording`), and `rewriting` knows
what it must become. An attribute that alone supplies a size takes the new value; every other expression is evaluated with
the new attributes and shapes and must give what is needed. What doesn't is a conflict, with file and line.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.fx import Node

from depgraph.capture.recording import Comparison, Site, current
from depgraph.capture.sizes import Attr, Const, Expr, Op, ShapeOf, attributes, describe, evaluate
from depgraph.cutting.bounds import lowest
from depgraph.cutting.rewriting import Prepared, Sized, call_arguments, prepare, rewritten
from depgraph.cutting.touching import Touches
from depgraph.cutting.unread import by_reading
from depgraph.operators import aten_name
from depgraph.widths import Kept

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

T = TypeVar("T")


@dataclass(frozen=True)
class Conflict:
    """A size that the module's Python gets wrong after the cut."""

    text: str
    where: str
    nodes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.where or 'an unknown place'}: {self.text}"


@dataclass(frozen=True)
class Drift:
    """A number that is computed from a size and would change: operator `node` gets `ratio` times what it should.

    What the operator reads must be multiplied by `factor` to make up for it.
    """

    node: str
    ratio: float
    where: str
    factor: float


@dataclass
class Solution:
    """New values of attributes, and what they can't bring about."""

    attributes: dict[Attr, int] = field(default_factory=dict)
    conflicts: list[Conflict] = field(default_factory=list)
    drifts: list[Drift] = field(default_factory=list)


class SizeRules:
    """The sizes that one model's Python supplies, ready to be compared with what a cut needs."""

    def __init__(self, graph: DependencyGraph) -> None:
        self.graph = graph
        self.values = graph.capture.program.values
        self.nodes: dict[str, Node] = {n.name: n for n in graph.capture.exported.graph.nodes}
        self.sites: dict[str, list[Site]] = {}
        self.users: dict[Attr, list[Site]] = {}
        read, beside = by_reading(graph.capture.recording.sites, self.nodes)
        for site in read:
            self.sites.setdefault(site.node, []).append(site)
        for site in (*read, *beside):
            if isinstance(site.expr, Attr) and isinstance(site.value, int):
                self.users.setdefault(site.expr, []).append(site)
        self._now: dict[Attr, int] = {}
        self._axes: dict[str, list[str]] = {}
        self._prepared: dict[str, Prepared | None] = {}
        self._last: tuple[Kept, Solution] | None = None
        self._sized: tuple[Kept | None, dict[str, Sized | None]] = None, {}
        self._once: dict[str, Any] = {}

    def once(self, name: str, find: Callable[[], T]) -> T:
        """What `find` gives, which is the same for every cut: found when it is asked for by this name first."""
        if name not in self._once:
            self._once[name] = find()
        found: T = self._once[name]
        return found

    def now(self, attr: Attr) -> int:
        """The value of an attribute in the uncut model."""
        if attr not in self._now:
            self._now[attr] = current(self.graph.model, attr)
        return self._now[attr]

    def axes_of(self, name: str) -> list[str]:
        """Names of the axes that reach a tensor that operator `name` reads or makes."""
        if name not in self._axes:
            self._axes[name] = self._reaching(name)
        return self._axes[name]

    def _reaching(self, name: str) -> list[str]:
        node = self.nodes[name]
        values = [self.values[n.name] for n in node.all_input_nodes if n.name in self.values]
        values += [self.values[name]] if name in self.values else self._outputs(node)
        found = [axis for v in values for dim in v.dims for axis in self.graph.widths.axes_of(dim)]
        return list(dict.fromkeys(found))

    def _outputs(self, node: Node) -> list[Any]:
        count = len(node.meta["val"]) if isinstance(node.meta.get("val"), (tuple, list)) else 0
        return [self.values[f"{node.name}:{k}"] for k in range(count) if f"{node.name}:{k}" in self.values]

    def rewritten(self, name: str, kept: Kept) -> Sized | None:
        """What an operator must be called with after a cut, which is asked for at each of its sites."""
        if self._sized[0] is not kept:
            self._sized = kept, {}
        found = self._sized[1]
        if name not in found:
            if name not in self._prepared:
                self._prepared[name] = prepare(self.nodes[name], self.values)
            found[name] = rewritten(self._prepared[name], kept)
        return found[name]

    def needed(self, site: Site, kept: Kept) -> Any:
        """What the number at `site` must be after the cut; None where the operator, or what it reads, would have to change."""
        if site.node in self._scaling:
            return None
        changed = self.rewritten(site.node, kept)
        if changed is None:
            return site.value
        if changed.target is not None:
            return None
        where, key, *rest = site.path
        name = key if where == "kwargs" else changed.node.target._schema.arguments[key].name  # type: ignore[union-attr]
        if isinstance(site.expr, Op) and (least := self._lowest(site, kept)) is not None:
            return least
        return _within(changed.changes[name], rest, site.value) if name in changed.changes else site.value

    @cached_property
    def _scaling(self) -> frozenset[str]:
        """Operators that multiply or divide numbers: what they are given is no size."""
        return frozenset(name for name in self.sites if _scales(self.nodes[name]))

    def runs_out(self, site: Site) -> bool:
        """Does any number from some on do the same here?"""
        return self._lowest(site) is not None

    def _lowest(self, site: Site, kept: Kept | None = None) -> int | None:
        before = self.graph.capture.program.relations.sizes.__getitem__
        after = before if kept is None else kept.size
        return lowest(self.nodes[site.node], site, self.values, (before, after))

    def solve(self, kept: Kept) -> Solution:
        """Find the attributes that make the module compute the cut, and whatever conflicts remain.

        Axes with which whole modules go are left to `cutting.experts`.
        """
        kept = kept.of_dims()
        if self._last is None or not self._last[0].is_same(kept):  # planning asks for what is then cut
            self._last = kept, self._solve(kept)
        found = self._last[1]
        return Solution(dict(found.attributes), list(found.conflicts), list(found.drifts))

    def follow(self, kept: Kept) -> dict[Attr, int]:
        """The attributes that follow from the dims of all axes of a cut, whole modules' too, conflicts or not."""
        return self._solve(kept).attributes

    def _solve(self, kept: Kept) -> Solution:
        solution = Solution()
        touched = self._touches.by(kept.masks)
        self._assign(touched, kept, solution)
        self._assign_compared(kept, solution)
        for name in touched:
            self._check(name, kept, solution)
        for comparison in self.graph.capture.recording.comparisons:
            self._check_comparison(comparison, kept, solution)
        return solution

    @cached_property
    def _touches(self) -> Touches:
        names = [n.name for n in self.nodes.values() if n.op == "call_function" and hasattr(n.target, "_schema")]
        computed = {n for n, sites in self.sites.items() if any(not isinstance(s.expr, Const | None) for s in sites)}
        return Touches({name: self.axes_of(name) for name in names}, computed)

    def _assign(self, touched: list[str], kept: Kept, solution: Solution) -> None:
        """Attributes that alone supply a size take the size that is needed."""
        for attr, sites in self.users.items():
            wanted: dict[int, Site] = {}
            for site in sites:
                need = self.needed(site, kept)
                if need is not None and not self.runs_out(site):
                    wanted.setdefault(need, site)
            if len(wanted) > 1:
                (a, first), (b, second) = list(wanted.items())[:2]
                text = f"{describe(attr)} would have to be {a} there and {b} at {second.where}"
                solution.conflicts.append(Conflict(text, first.where, (first.node, second.node)))
            elif wanted and next(iter(wanted)) != self.now(attr):
                solution.attributes[attr] = next(iter(wanted))
        for name in touched:
            for site in self.sites.get(name, ()):
                self._assign_within(site, kept, solution)

    def _assign_within(self, site: Site, kept: Kept, solution: Solution) -> None:
        """An attribute that stands nowhere alone, as the only unknown of an expression, takes what solves it."""
        need = self.needed(site, kept)
        if isinstance(site.value, int) and need is not None:
            self._assign_unknown(site.expr, need, kept, solution)

    def _assign_unknown(self, expr: Expr | None, need: int, kept: Kept, solution: Solution) -> None:
        """The only unknown of an expression that doesn't give what is needed takes what solves it: in proportion, if that does."""
        if not isinstance(expr, Op):
            return
        unknown = [a for a in attributes(expr) if a not in self.users and a not in solution.attributes]
        gives = self.value(expr, kept, solution)
        if len(unknown) != 1 or gives == need:
            return
        now = self.now(unknown[0])
        for guess in (now * need // gives if gives else now, *range(now, 0, -1)):
            if self.value(expr, kept, solution, {unknown[0]: guess}) == need:
                solution.attributes[unknown[0]] = guess
                return

    def _assign_compared(self, kept: Kept, solution: Solution) -> None:
        """An attribute that is only compared with a size, or is the only unknown of what is, follows it: one that is as large
        and only ordered, where the order would be another.
        """
        for c in self.graph.capture.recording.comparisons:
            for one, other in ((c.left, c.right), (c.right, c.left)) if c.equal else ():
                self._follow(one, other, kept, solution)
        for o in self.graph.capture.recording.orders:
            for one, other in ((o.left, o.right), (o.right, o.left)):
                left, right = (self.value(side, kept, solution) for side in (o.left, o.right))
                if left is not None and right is not None and getattr(operator, o.name)(left, right) != o.holds:
                    self._follow(one, other, kept, solution)

    def _follow(self, one: Expr, other: Expr, kept: Kept, solution: Solution) -> None:
        value = self.value(other, kept, solution)
        if value is not None and isinstance(one, Attr):
            if one not in self.users and one not in solution.attributes and value != self.now(one):
                solution.attributes[one] = value
        elif value is not None:
            self._assign_unknown(one, value, kept, solution)

    def value(self, expr: Expr, kept: Kept, solution: Solution, guess: dict[Attr, int] | None = None) -> Any:
        """What an expression gives after the cut, with the attributes found so far; None where it can't be told."""

        def lookup(leaf: Attr | ShapeOf) -> int:
            if isinstance(leaf, ShapeOf):
                value = self.values[leaf.node]
                return kept.shape(value)[leaf.dim]
            if guess and leaf in guess:
                return guess[leaf]
            return solution.attributes.get(leaf, self.now(leaf))

        try:
            return evaluate(expr, lookup)
        except (ZeroDivisionError, KeyError):
            return None

    def _check(self, name: str, kept: Kept, solution: Solution) -> None:
        changed = self.rewritten(name, kept)
        sites = self.sites.get(name, [])
        where = next((s.where for s in sites), "") or _where(self.nodes[name])
        if changed is not None and changed.target is not None:
            text = f"{self.nodes[name].target} would need parts of sizes that this line doesn't give"
            solution.conflicts.append(Conflict(text, where, (name,)))
            return
        if changed is not None and "scale" in changed.changes:
            before = changed.source.shape[-1]  # type: ignore[union-attr]
            after = changed.shape(changed.source)[-1]  # type: ignore[arg-type]
            ratio = (before / after) ** 0.5
            solution.drifts.append(Drift(name, ratio, where, 1 / ratio))
        call = call_arguments(changed) if changed is not None else (self.nodes[name].args, self.nodes[name].kwargs)
        for site in sites:
            self._check_site(site, _leaf(call, site.path, site.value), kept, solution)

    def _check_site(self, site: Site, need: Any, kept: Kept, solution: Solution) -> None:
        gives = site.value if site.expr is None else self.value(site.expr, kept, solution)
        least = self._lowest(site, kept)
        if gives == need or (gives is not None and least is not None and gives >= least):
            return
        if isinstance(site.value, float) or site.node in self._scaling:
            self._drift(site, gives / need if gives and need else 0.0, solution)
            return
        written = f"{describe(site.expr)} = {gives}" if site.expr is not None else f"the number {site.value}"
        target = self.nodes[site.node].target
        solution.conflicts.append(
            Conflict(f"{target} needs size {need}, the code gives {written}", site.where, (site.node,))
        )

    def _drift(self, site: Site, ratio: float, solution: Solution) -> None:
        """A float computed from sizes: a factor or a divisor can be made up for, anything else can't."""
        factors = {"mul": 1 / ratio, "div": ratio, "scaled_dot_product_attention": 1 / ratio} if ratio else {}
        factor = factors.get(aten_name(self.nodes[site.node]))
        if factor is None:
            text = f"a number computed from a size reaches {self.nodes[site.node].target} and would change by a factor of {ratio:.4f}"
            solution.conflicts.append(Conflict(text, site.where, (site.node,)))
            return
        solution.drifts.append(Drift(site.node, ratio, site.where, factor))

    def _check_comparison(self, c: Comparison, kept: Kept, solution: Solution) -> None:
        if not c.equal:
            return
        left, right = self.value(c.left, kept, solution), self.value(c.right, kept, solution)
        if left is not None and right is not None and left != right:
            text = f"the code asks whether {describe(c.left)} == {describe(c.right)}, which would be {left} and {right}"
            solution.conflicts.append(Conflict(text, c.where))


def _scales(node: Node) -> bool:
    made = node.meta.get("val")
    return aten_name(node) in ("mul", "div") and isinstance(made, torch.Tensor) and made.is_floating_point()


def _leaf(call: tuple[Any, Any], path: tuple[Any, ...], default: Any) -> Any:
    return _within({"args": call[0], "kwargs": call[1]}, path, default)


def _within(item: Any, path: Iterable[Any], default: Any) -> Any:
    """What stands at the end of a path of keys; `default` where it leads nowhere."""
    try:
        for key in path:
            item = item[key]
    except (KeyError, IndexError, TypeError):
        return default
    return item


def _where(node: Node) -> str:
    from depgraph.capture.places import place

    return place(node)
