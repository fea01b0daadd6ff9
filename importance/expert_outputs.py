"""What experts put out, times their share: the mean length over the tokens that are routed to them (Minitron, METHODS.md 2.9).

What a mixture puts out is a sum of what its experts do, each times its share, and each is linear in the expert's last weights. So the
part of one expert is what is left of the sum once the last weights of all others are zero, less what is left without any. That
holds however the code goes about it: weights looked up for every token, tokens sorted by expert, a loop over modules.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from depgraph import Axis, DependencyGraph
from depgraph.axes import Member
from depgraph.capture.capturing import quiet
from depgraph.cutting.omitting import has_tensors
from depgraph.cutting.sides import SideRun
from depgraph.errors import ScoreError
from depgraph.layers import Anatomy
from depgraph.observing import Runnable
from depgraph.walks import behind, moving
from importance.activation import with_unread
from importance.calling import calls_of, check_batches, samples_in
from importance.commuting import JOINING, PASSING, TABLES, ZEROS
from importance.experts import routers
from importance.gradients import require_module
from importance.laid_out import Samples
from importance.stream_parts import name_of
from importance.units import units

_NOTHING = 1e-9
_NONE: frozenset[Node] = frozenset()
_COPIES = frozenset(["to", "_to_copy", "type_as", "clone", "contiguous", "dropout", "alias", "detach"])
_SHAPED = ZEROS | {"empty_like", "ones_like", "full_like", "rand_like", "new_empty", "new_ones", "new_full"}
_LINEAR = PASSING | JOINING | TABLES | _COPIES | {"sum", "mean", "neg", "rsub", "masked_fill", "scatter", "scatter_add"}


@dataclass(frozen=True)
class ExpertOutputs:
    """Scores experts by the mean, over the tokens that are routed to them, of ||share x output||_2; of no token, 0.

    A token is routed to an expert where this is more than zero, so that a router without a top-k sends it to all. Padding doesn't
    count. Stacked weights are multiplied once more for every expert. Axes that aren't experts go last, by the size of their
    weights. Source: Muralidharan et al. 2024 (Compact LMs), as in METHODS.md 2.9.

    Raises, when called: NothingToPrune for a model without experts, ScoreError where it isn't clear what experts put out or that
    is NaN or infinite, DataError for no batches or unfit ones.
    """

    comparable: ClassVar[bool] = False

    batches: Iterable[Any] = field(repr=False)

    def __post_init__(self) -> None:
        check_batches(self.batches)

    def __call__(self, graph: DependencyGraph, /) -> dict[str, np.ndarray]:
        require_module(graph, "a score of experts' outputs", "modules whose weights it takes apart")
        held = {name: _held(graph, graph[name]) for name in units(graph, "experts")}
        sums = {name: np.zeros((2, graph[name].size)) for name in held}
        observer, seen = graph.observer(), dict.fromkeys(held, 0)
        with quiet(graph.model):
            for args, kwargs in calls_of(graph, self.batches, "to score with"):
                samples, found = samples_in(graph, args, kwargs), observer.runnable(args, kwargs)
                mixtures = {name: _Mixture(found, held[name], samples, sums[name]) for name in held}
                observer.look(found, (args, kwargs), _watches(mixtures.values()))
                for name, mixture in mixtures.items():
                    seen[name] += mixture.end is not None
        return with_unread(graph, {name: _means(name, sums[name], seen[name]) for name in held})


def _held(graph: DependencyGraph, axis: Axis) -> dict[str, Member]:
    """The weights of experts, by name, without those of the router."""
    chosen, tensors = routers(Anatomy(graph), axis.name), graph.tensors()
    return {m.target: m for m in axis.members if m.kind == "parameter" and id(tensors[m.target]) not in chosen}


def _means(name: str, sums: np.ndarray, seen: int) -> np.ndarray:
    if not seen:
        raise ScoreError(f"no batch shows what the experts of {name!r} put out: give some that come into their mixture")
    if not np.isfinite(sums).all():
        raise ScoreError(
            f"what the experts of {name!r} put out is NaN or infinite: look at the weights and the batches"
        )
    lengths, tokens = sums
    return lengths / np.maximum(tokens, 1)


def _watches(mixtures: Iterable[_Mixture]) -> dict[Node, Callable[[Node, SideRun], None]]:
    """What is to be called after each node: by all that want it."""
    wanted: dict[Node, list[_Mixture]] = defaultdict(list)
    for mixture in mixtures:
        for node in mixture.needed:
            wanted[node].append(mixture)

    def see(node: Node, side: SideRun) -> None:
        for mixture in wanted[node]:
            mixture.see(node, side.env[node])

    return dict.fromkeys(wanted, see)


class _Mixture:
    """One axis of experts in one capture: from their last weights to `end`, what the mixture puts out."""

    def __init__(self, found: Runnable, held: Mapping[str, Member], samples: Samples, sums: np.ndarray) -> None:
        self.program, self.samples, self.sums = found.program, samples, sums
        self.nodes = list(found.exported.graph.nodes)
        targets = {spec.arg.name: spec.target for spec in found.exported.graph_signature.input_specs}
        ties = self.program.ties
        first = {n: str(targets[n.name]) for n in self.nodes if n.op == "placeholder" and targets[n.name]}
        members = {n: held.get(ties.get(t, t)) for n, t in first.items()}
        self.weights = {n: member for n, member in members.items() if member is not None}
        self.contracting = {c.op for c in self.program.relations.contractions}
        self.moving = moving(self.nodes, self.program.values)
        self.end: Node | None = None
        self._follow()
        self.needed = self._needed()
        self.seen: dict[Node, Any] = {}

    def _follow(self) -> None:
        """Find the end: where what is linear in the last weights of experts is used otherwise for the first time."""
        linear: dict[Node, frozenset[Node]] = {weight: frozenset([weight]) for weight in self.weights}
        ends: dict[Node, Node] = {}
        for node in self.nodes:
            for given in node.all_input_nodes if name_of(node) not in _SHAPED else ():
                going = linear.get(given, _NONE) - ends.keys()
                if going and self._is_linear(node, given, going, linear):
                    linear[node] = linear.get(node, _NONE) | going
                else:
                    ends |= dict.fromkeys(going, given)
        order = {node: k for k, node in enumerate(self.nodes)}
        self.end = max(ends.values(), key=order.__getitem__, default=None)
        self.last = frozenset(weight for weight, end in ends.items() if end is self.end)
        before = behind([self.end]) if self.end is not None else {}
        self.inner = [
            n for n in self.nodes if n in before and n not in self.weights and self.last & linear.get(n, _NONE)
        ]

    def _is_linear(
        self, node: Node, given: Node, going: frozenset[Node], linear: Mapping[Node, frozenset[Node]]
    ) -> bool:
        """Is a result linear in one operand, of which others that count aren't made?"""
        name = name_of(node)
        plain = name.removesuffix("_") if not name.startswith("_") else name
        others = [n for n in node.all_input_nodes if n is not given]
        apart = not any(linear.get(n, _NONE) & going for n in others)
        if node.name in self.contracting:
            return apart and (given not in self.moving or all(n in self.moving for n in others if has_tensors(n)))
        if plain == "mul":
            return apart and list(node.args[:2]).count(given) == 1
        if plain in ("div", "where", "embedding", "index"):
            at = {"div": 0, "embedding": 0, "index": 0}.get(plain)
            return node.args[at] is given and apart if at is not None else node.args[0] is not given
        return plain in _LINEAR | {"add", "sub"}

    def _needed(self) -> set[Node]:
        """What must be seen of a run to go from the last weights to the end again."""
        inner = set(self.inner)
        given = {n for node in self.inner for n in node.all_input_nodes} - inner
        return given | self.last | ({self.end} if self.end is not None else set())

    def see(self, node: Node, made: Any) -> None:
        """Take note of what a node has made; at the end, of every expert's part."""
        self.seen[node] = _exact(made)
        if node is self.end:
            self._part()
            self.seen.clear()

    def _part(self) -> None:
        assert self.end is not None
        whole = self._run(self.inner, self.seen)
        for group in range(self.sums.shape[1]):
            without = self._without(group)
            if without:
                rest = self._run(_after(without, self.inner), {**self.seen, **whole, **without})
                self._add(group, whole[self.end] - rest.get(self.end, whole[self.end]))

    def _without(self, group: int) -> dict[Node, Tensor]:
        """The last weights of an expert as zeros."""
        found: dict[Node, Tensor] = {}
        for weight in self.last:
            member = self.weights[weight]
            gone = torch.from_numpy(member.indices(group))
            if len(gone):
                found[weight] = self.seen[weight].index_fill(member.dim, gone.to(self.seen[weight].device), 0)
        return found

    def _run(self, nodes: Iterable[Node], given: Mapping[Node, Any]) -> dict[Node, Any]:
        made: dict[Node, Any] = {}
        for node in nodes:
            made[node] = _called(node, lambda n: made[n] if n in made else given[n])
        return made

    def _add(self, group: int, part: Tensor) -> None:
        assert self.end is not None
        rows = self.samples.rows(part, self._channels(), torch.float64).flat
        lengths = rows.norm(dim=-1)
        routed = lengths > _NOTHING * lengths.max() if len(lengths) else lengths
        self.sums[0, group] += float(lengths.sum())
        self.sums[1, group] += int(routed.sum())

    def _channels(self) -> int:
        """The dim of what the mixture puts out that its last weights make; the last one where that can't be told."""
        find, made = self.program.relations.find, self.program.values[self.end.name]  # type: ignore[union-attr]
        held = [(self.weights[weight], self.program.values[weight.name].dims) for weight in self.last]
        own = {find(d) for m, dims in held for k, d in enumerate(dims) if k != m.dim or (m.labels == m.labels[0]).all()}
        return next((k for k, d in enumerate(made.dims) if find(d) in own), len(made.dims) - 1)


def _after(begun: Iterable[Node], nodes: Iterable[Node]) -> list[Node]:
    """Those of `nodes` that are computed from some."""
    found = dict.fromkeys(begun)
    first = len(found)
    for node in nodes:
        if not found.keys().isdisjoint(node.all_input_nodes):
            found[node] = None
    return list(found)[first:]


def _exact(made: Any) -> Any:
    """Floats in double precision, so that what isn't there is told from rounding."""
    return made.double() if isinstance(made, Tensor) and made.is_floating_point() else made


def _called(node: Node, value: Callable[[Node], Any]) -> Any:
    """What an operator makes of these, without writing to them or going to another precision."""
    name = name_of(node)
    args: Any = map_arg(node.args, value)
    kwargs: Any = map_arg(node.kwargs, value)
    if name in ("to", "_to_copy", "type_as"):
        return args[0]
    if name.endswith("_"):
        args = (args[0].clone(), *args[1:])
    return node.target(*args, **kwargs)  # type: ignore[operator]
