"""Parts that the code takes one by one leave with the indices that stand for them: experts, with their rows of the router.

They are entries of lists of modules, or slices of stacked weights. The cut model must compute what the original computes when it
can't choose them (`barring`), on the example and on inputs made from it, where both decide by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from depgraph.capture import proxies
from depgraph.capture.capturing import quiet
from depgraph.capture.exported import decisions_of
from depgraph.capture.keeping import unwritten
from depgraph.capture.restoring import own_containers
from depgraph.capture.sizes import Attr
from depgraph.classes import NONE
from depgraph.cutting.alone import only_captured
from depgraph.cutting.barring import barred, bars_of
from depgraph.cutting.comparing import TOLERANCE, difference
from depgraph.cutting.draws import same_draws
from depgraph.cutting.elsewhere import by_itself, moved
from depgraph.cutting.entries import contents, positions, renumber
from depgraph.cutting.inputs import describe_inputs
from depgraph.cutting.report import Check
from depgraph.cutting.rerunning import Inputs, Within
from depgraph.cutting.shortening import Shortening
from depgraph.cutting.slicing import positions as places_of
from depgraph.errors import CheckError, one_line

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph
    from depgraph.plan import Plan
    from depgraph.widths import Kept

FORMAT = 1
_HOW = "on inputs that it took before, with its other axes cut and the parts that the plan takes out barred"
Groups = Mapping[str, tuple[int, ...]]


def with_entries(plan: Plan) -> dict[str, tuple[int, ...]]:
    """The part of a plan's removal that takes along what the code takes one by one."""
    return {name: groups for name, groups in plan.removal.items() if plan.graph[name].tried}


def leaving(graph: DependencyGraph, removal: Groups, before: Groups = MappingProxyType({})) -> Shortening:
    """What must be done to the module so that the entries leave, and the indices that stand for them.

    `before` is what it was cut of already.
    """
    cut, kept, going = graph.widths.at(before), graph.widths.at({**before, **removal}), _going(graph, removal)
    known, rules = graph.sizes.follow(cut), graph.sizes
    follow = {a: new for a, new in rules.follow(kept).items() if known.get(a, rules.now(a)) != new}
    found = Shortening(integers=follow, narrowed=list(_narrowing(graph, cut, kept)))
    sized = frozenset(graph.sizes.users)
    for container, gone in going.items():
        places = positions(graph.model, container, sized)
        found.integers |= renumber(graph.model, container, places, gone)
        found.entries += [(container, k) for k in sorted(gone, reverse=True)]
    found.integers |= _counts(graph, removal)
    for entries in (entries for name in removal for entries in graph[name].entries):
        if entries.keys == "first":
            names = list(contents(graph.model.get_submodule(entries.container)))
            row = [names[k] for k in np.flatnonzero(entries.labels != NONE)]
            found.keyed[entries.container] = [*(found.keyed.get(entries.container) or ()), row]
    return found


def _counts(graph: DependencyGraph, removal: Groups) -> dict[Attr, int]:
    """What counts parts afterwards: an index stays that no axis takes away."""
    gone: dict[Attr, np.ndarray] = {}
    for name, groups in removal.items():
        for counted in graph[name].counted:
            gone[counted.attr] = counted.going(groups) | gone.get(counted.attr, False)
    return {attr: int((~mask).sum()) for attr, mask in gone.items()}


def _narrowing(graph: DependencyGraph, cut: Kept, kept: Kept) -> Iterator[tuple[str, int, list[int]]]:
    """The parameters and buffers that get narrower, along which dim, and without which of the indices that were left."""
    tensors = graph.tensors()
    for value in kept.smaller().values():
        if value.kind not in ("parameter", "buffer") or value.target not in tensors:
            continue
        for d, size in enumerate(value.shape):
            stays, left = kept.of(value, d), cut.of(value, d)
            count = size if left is None else len(left)
            gone = set() if stays is None else set(range(count)).difference(places_of(left, stays).tolist())
            if gone:
                yield value.target, d, sorted(gone)


def _going(graph: DependencyGraph, removal: Groups) -> dict[str, set[int]]:
    """The positions of all entries that leave, by their container."""
    found: dict[str, set[int]] = {}
    for name, groups in removal.items():
        for entries in graph[name].entries:
            found.setdefault(entries.container, set()).update(entries.going(groups))
    return found


class Expected(NamedTuple):
    """What a model computes when it can't choose what goes, narrowed as its outputs will be, and when it can.

    `inputs` are those on which it was run. `captured`: by how much what it computes differs on the example when it simply runs.
    """

    inputs: list[Inputs]
    barred: list[list[Tensor]]
    free: list[list[Tensor]]
    captured: float = 0.0

    @property
    def tolerance(self) -> float:
        """How far apart rounding may take two computations of the same."""
        tensors = [t for made in self.barred for t in made if t.is_floating_point()]
        return max((TOLERANCE.get(t.dtype, 1e-4) for t in tensors), default=1e-4)

    @property
    def sensitivity(self) -> float:
        """How far it moves the outputs that what goes can't be chosen."""
        pairs = zip(self.barred, self.free, strict=True)
        # what is empty shows nothing
        filled = ((within, free) for within, free in pairs if all(t.numel() for t in within))
        return max((difference(within, free) for within, free in filled), default=0.0)


def taken(graph: DependencyGraph) -> list[Inputs]:
    """The example inputs, and of those that are made from them the ones that the graph's model takes as it is now."""
    first, *others = _inputs(graph)
    return [first, *(inputs for inputs in others if _runs(graph, inputs))]


def _runs(graph: DependencyGraph, inputs: Inputs) -> bool:
    try:
        outputs(graph, graph.model, inputs)
    except Exception:  # what it raises is its own affair: it isn't cut yet
        return False
    return True


@dataclass(frozen=True)
class Whole:
    """What a model gives on each of several inputs as it is; `captured` as `Expected`'s."""

    free: list[list[Tensor]]
    captured: float


def whole(graph: DependencyGraph, model: nn.Module, given: list[Inputs]) -> Whole:
    """Run `model` as it is on inputs that the original took; raises CheckError when it doesn't take one of them."""
    try:
        free = [outputs(graph, model, inputs) for inputs in given]
        if not given or not _told(graph):
            return Whole(free, 0.0)
        return Whole(free, difference(outputs(graph, model, given[0], proxies.no_flags), free[0]))
    except Exception as failure:
        raise _not_running(model, _HOW, failure) from failure


def expected(
    graph: DependencyGraph, model: nn.Module, removal: Groups, given: list[Inputs], before: Whole | None = None
) -> Expected:
    """Run `model`, the graph's or one cut in its other axes, with what `removal` takes away out of reach, and as it is.

    `given` are the inputs that the original took; `before` is what the model gives on them as it is, if that is known. Raises
    CheckError when `model` doesn't take one of them.
    """
    bars, silent = bars_of(graph, removal), _modules(graph, model, removal)
    kept = graph.widths.at(removal)
    before = before or whole(graph, model, given)
    try:
        within = [outputs(graph, model, inputs, lambda: barred(model, bars, silent)) for inputs in given]
    except Exception as failure:
        raise _not_running(model, _HOW, failure) from failure
    free, narrow = ([_narrow(graph, made, kept) for made in runs] for runs in (before.free, within))
    return Expected(given, narrow, free, before.captured)


def _told(graph: DependencyGraph) -> bool:
    """Is the code told that it is captured where `outputs` runs it?"""
    decisions = decisions_of(graph.capture.exported)
    return decisions is None or decisions.exporting


def _modules(graph: DependencyGraph, model: nn.Module, removal: Groups) -> list[nn.Module]:
    """The modules that leave."""
    going = _going(graph, removal).items()
    held = [(list(contents(model.get_submodule(container)).values()), gone) for container, gone in going]
    leaving = [entries[k] for entries, gone in held for k in sorted(gone)]
    return [entry for entry in leaving if isinstance(entry, nn.Module)]


def _inputs(graph: DependencyGraph) -> Iterator[Inputs]:
    """The example inputs, and such with a little noise and with their whole numbers the other way round."""
    given = (graph.args, graph.kwargs)
    yield given
    args, kwargs = pytree.tree_map(_turned, moved(given))
    yield args, kwargs


def _turned(leaf: Any) -> Any:
    whole = isinstance(leaf, Tensor) and leaf.dtype in (torch.int64, torch.int32) and leaf.ndim
    return leaf.flip(-1) if whole else leaf


def _narrow(graph: DependencyGraph, made: list[Tensor], kept: Kept) -> list[Tensor]:
    """Outputs without the indices that go, where they show what is chosen among."""
    values = list(graph.capture.program.outputs.values())
    if len(values) != len(made):
        return made
    narrow = []
    for value, tensor in zip(values, made, strict=True):
        for d in range(len(value.shape)):
            stays = kept.of(value, d)
            if stays is not None:
                tensor = tensor.index_select(d, torch.from_numpy(places_of(None, stays)).to(tensor.device))
        narrow.append(tensor)
    return narrow


def outputs(graph: DependencyGraph, model: nn.Module, inputs: Inputs, within: Within = nullcontext) -> list[Tensor]:
    """The output tensors of a forward that decides by itself; it leaves no trace. It runs `within` something."""
    args, kwargs = own_containers(inputs)
    decisions = decisions_of(graph.capture.exported)
    told = proxies.exporting_flags() if decisions is None else decisions.told()
    with quiet(model), torch.no_grad(), unwritten(model, *args, kwargs) as written, same_draws(), told, within():
        output = model(*args, **kwargs)
    return [written.own(leaf) for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _not_running(model: nn.Module, how: str, failure: Exception) -> CheckError:
    return CheckError(f"{type(model).__name__} doesn't run {how}: {one_line(failure)}; protect their axis")


def check_without(graph: DependencyGraph, model: nn.Module, wanted: Expected) -> Check:
    """Compare a model that the entries have left with what was expected of it.

    Raises CheckError when they differ by more than rounding, or the model doesn't run, or computes something else when it simply
    runs though the original didn't.
    """
    error, tolerance, computed = 0.0, wanted.tolerance, []
    for inputs, within in zip(wanted.inputs, wanted.barred, strict=True):
        try:
            got = outputs(graph, model, inputs)
        except Exception as failure:
            raise _not_running(model, "without the parts that the plan takes out", failure) from failure
        computed.append(got)
        error = max(error, difference(got, within))
    if not error <= tolerance:
        raise CheckError(
            f"{type(model).__name__} without the parts that the plan takes out differs by {error:.1e} of the largest output "
            f"(allowed {tolerance:.0e}) from the original in which they can't be chosen: protect their axis"
        )
    alone = by_itself(graph, model, wanted.inputs[0]) if _told(graph) else computed[0]
    if wanted.captured <= tolerance and not difference(alone, computed[0]) <= tolerance:
        raise only_captured(model, in_place=False)
    captured = wanted.captured if wanted.captured > tolerance else 0.0
    return Check(error, wanted.sensitivity, tolerance, 0, 0, captured=captured)


def record_without(plan: Plan, removal: Groups, how: Shortening, earlier: dict[str, Any] | None) -> dict[str, Any]:
    """JSON-able: all that is needed to take the same modules out again, as `record.make_record` for other axes."""
    graph, done = plan.graph, how.to_json(plan.graph.model)
    before = graph.widths.at({n: g for n, g in plan.removal.items() if n not in removal}).cost()
    return {
        "format": FORMAT,
        "form": "depth",
        "branches": [],
        "shortening": done,
        "removed": [],
        "attributes": done["attributes"],
        "axes": {name: [graph[name].size, len(groups)] for name, groups in removal.items()},
        "groups": {name: [int(g) for g in groups] for name, groups in removal.items()},
        "config": {},
        "free": sorted(graph.free),
        "inputs": describe_inputs(graph.args, graph.kwargs),
        "vocabulary": {},
        "cost": {"before": asdict(before), "after": asdict(plan.cost())},
        "original": {},
        "earlier": [*earlier["earlier"], {k: v for k, v in earlier.items() if k != "earlier"}] if earlier else [],
    }
