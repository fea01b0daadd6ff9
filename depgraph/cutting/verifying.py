"""The check: what the pruned model computes must be what the zeroed original computes."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
import torch.fx
from torch import nn
from torch.fx import GraphModule

from depgraph.capture.exported import decisions_of
from depgraph.capture.proxies import no_flags
from depgraph.cutting.alone import apart_from_capture, require_own
from depgraph.cutting.bypassing import bypassed
from depgraph.cutting.choices import Chosen
from depgraph.cutting.comparing import TOLERANCE, Tensors, any_finite, difference, is_continuous
from depgraph.cutting.doubling import OF_TOLERANCE, alone_in_double, in_double
from depgraph.cutting.draws import Drawing, may_draw, same_draws
from depgraph.cutting.elsewhere import by_itself
from depgraph.cutting.reference import Following, Outputs, Reference
from depgraph.cutting.report import Check
from depgraph.cutting.rerunning import Inputs, Within, inputs_at, inputs_of_others, rerun
from depgraph.cutting.script import Script
from depgraph.cutting.shapes import require_shapes
from depgraph.cutting.sides import Side
from depgraph.cutting.slicing import positions, selected
from depgraph.errors import CheckError
from depgraph.graph import Value
from depgraph.widths import Kept

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph
    from depgraph.plan import Plan


class _Compared(NamedTuple):
    """A comparison, what the original computed, and whether that drew what the pruned model did."""

    check: Check
    original: list[tuple[Value, torch.Tensor]] = []
    follows: bool = True

    @property
    def error(self) -> float:
        return self.check.error

    @property
    def tolerance(self) -> float:
        return self.check.tolerance


class Verifier:
    """Knows what the original computes with the plan's groups zeroed; compares a pruned model with that.

    Holds on to the original's tensors, so that a model may be cut in place between making it and calling `check`.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.graph: DependencyGraph = plan.graph
        self.exported: Any = plan.graph.capture.exported
        if plan.branches:
            self.exported = bypassed(plan.graph, plan.branches)
        self.tensors = plan.graph.tensors()
        exact = {name: g for name, g in plan.removal.items() if plan.graph[name].exact}
        mixed = {name: g for name, g in plan.removal.items() if name not in exact}
        self.exact, self.mixed = exact, mixed

    def fetch(self, name: str) -> torch.Tensor:
        found = self.tensors.get(name)
        return self.graph.capture.exported.constants[name] if found is None else found

    @property
    def on_meta(self) -> bool:
        return self.graph.on_meta

    def check(self, model: nn.Module) -> Check:
        """Run both and compare; raises CheckError when they differ by more than rounding.

        The pruned model runs as it does for its user where it is the same as its capture then, else as it was captured. On
        the meta device the shapes of what it computes are compared.
        """
        if self.on_meta:
            return self._without_values(model)
        if isinstance(model, GraphModule):
            found = self._as_captured(model)
            if not self.plan.branches and self.graph.words is None:
                original = [tensor for _, tensor in found.original]
                require_own(self.graph, original, found.tolerance, partial(self._original_in_double, model))
            return found.check
        alone, decisions = self._alone(model), decisions_of(self.graph.capture.exported)
        found = alone or self._as_captured(model)
        if alone is None or decisions is not None:
            by_itself(self.graph, model, inputs_at(self.graph, self.plan.kept()))
        if alone is not None or decisions is not None:
            return found.check
        original = [tensor for _, tensor in found.original]
        others = inputs_of_others(self.graph, self.plan.kept())
        return replace(found.check, captured=apart_from_capture(self.graph, model, original, found.tolerance, others))

    def _without_values(self, model: nn.Module) -> Check:
        calls = 0
        if isinstance(model, GraphModule):
            rerun(self.graph, model, inputs_at(self.graph, self.plan.kept()))
        else:
            calls = require_shapes(self.graph, model, self.plan.kept())
        return Check(0, 0, 0, len(self.exact), len(self.mixed), calls, "the model is on the meta device")

    def _alone(self, model: nn.Module) -> _Compared | None:
        """The comparison where nobody tells the model that it is exported; None where it fails, or the two differ."""
        try:
            found = self._compared(model, no_flags)
        except Exception:  # what is wrong shows better where the model runs as it was captured
            return None
        return found if found.error <= found.tolerance else self._in_double(model, found, alone_in_double)

    def _as_captured(self, model: nn.Module) -> _Compared:
        """The comparison where the model is told what it was told while it was captured."""
        found = self._compared(model)
        if not found.error <= found.tolerance:
            return self._in_double(model, found) or self._refused(model, found)
        return found

    def _compared(self, model: nn.Module, within: Within = nullcontext) -> _Compared:
        """Run both, `within` something, and compare."""
        graph = self.graph
        chosen, drawing, nodes = Chosen(), Drawing(), self.exported.graph.nodes
        draw = any(map(may_draw, nodes))
        with (
            same_draws(),
            chosen if self._chooses() else nullcontext(),
            drawing if draw else nullcontext(),
        ):
            got = rerun(graph, model, inputs_at(graph, self.plan.kept()), within)
        widths, empty = graph.widths, graph.widths.at({})
        sliced, zeroed = widths.at(self.mixed), widths.at(self.exact)
        tolerance = max(
            (TOLERANCE.get(t.dtype, 1e-4) for t in (*got, *_computed(nodes)) if t.is_floating_point()), default=1e-4
        )
        follow = Following(chosen.picks(nodes), tolerance, drawing.draws, self.plan.kept())
        with torch.no_grad(), within():
            reference, original = self._references(Side(sliced, zeroed), Side(empty, empty), follow)
            expected = self._narrow(reference, zeroed, sliced)
        self._require_finite(expected)
        moved = self._narrow(original, self.plan.kept(), empty)
        error = difference(got, expected)
        check = Check(error, difference(expected, moved), tolerance, len(self.exact), len(self.mixed))
        if graph.words is not None:
            check = replace(check, moved_by="other tokens")
        return _Compared(check, original, follow.drawn.followed)

    def _in_double(self, model: nn.Module, found: _Compared, within: Within = in_double) -> _Compared | None:
        """The same comparison in double precision where that shows that only rounding differs; None where it doesn't."""
        try:
            again = self._compared(model, within)
        except Exception:  # an operator that can't be run so proves nothing
            return None
        if not again.error <= found.tolerance * OF_TOLERANCE:
            return None
        check = replace(again.check, tolerance=found.tolerance, rounding=found.error)
        return again._replace(check=check)

    def _original_in_double(self, model: nn.Module) -> Tensors:
        return [tensor for _, tensor in self._compared(model, in_double).original]

    def _refused(self, model: nn.Module, found: _Compared) -> NoReturn:
        """Raise CheckError that says where the two part, or how far."""
        if not isinstance(model, GraphModule):
            require_shapes(self.graph, model, self.plan.kept())
        if not found.follows:
            self._require_repeatable(found.original, found.tolerance)
        raise CheckError(
            f"the pruned {type(model).__name__} differs from the zeroed original by {found.error:.1e} of the largest output "
            f"(allowed {found.tolerance:.0e}, the removal itself moved it by {found.check.sensitivity:.1e}){self._leaks()}"
        )

    def _require_finite(self, expected: Tensors) -> None:
        numbers = [t for t in expected if t.numel() and is_continuous(t)]
        if numbers and not any(map(any_finite, numbers)):
            raise CheckError(
                f"{type(self.graph.model).__name__} gives nothing but NaN and infinity on the example inputs, so that nothing can "
                "be compared with it: trace it with other inputs, or mend its weights"
            )

    def _chooses(self) -> bool:
        """Does the graph choose among indices, and not as decisions say?"""
        exported = self.graph.capture.exported
        return bool(self.graph.capture.program.relations.least) and decisions_of(exported) is None

    def _require_repeatable(self, original: list[tuple[Value, torch.Tensor]], tolerance: float) -> None:
        """Raise CheckError when the original doesn't compute the same twice: then no comparison says anything."""
        empty = self.graph.widths.at({})
        again = Reference(Script(self.exported), self.graph.capture.program, [Side(empty, empty)])
        with torch.no_grad():  # with other random numbers
            (found,) = again.run(self.fetch, *inputs_of_others(self.graph, self.plan.kept()))
        if difference([t for _, t in found], [t for _, t in original]) > tolerance:
            raise CheckError(
                f"{type(self.graph.model).__name__} computes something else each time it runs (it draws random numbers in "
                "eval mode), so that nothing can be compared with it: take that out, or apply with check='none'"
            )

    def _leaks(self) -> str:
        places = list(dict.fromkeys(leak.where for leak in self.graph.capture.recording.leaks))
        return f"; sizes become ordinary numbers at {', '.join(places[:3])}" if places else ""

    def _references(self, cut: Side, whole: Side, follow: Following) -> list[Outputs]:
        """The outputs of the captured program on both sides, together where they take the same inputs."""
        if self.graph.words is None:
            return self._run((self.graph.args, self.graph.kwargs), follow, cut, whole)
        others = inputs_of_others(self.graph, self.plan.kept())
        return [*self._run(inputs_at(self.graph, cut.sliced), follow, cut), *self._run(others, None, whole)]

    def _run(self, inputs: Inputs, follow: Following | None, *sides: Side) -> list[Outputs]:
        """The outputs of the captured program on each of `sides`."""
        reference = Reference(Script(self.exported), self.graph.capture.program, sides, follow)
        with same_draws():
            return reference.run(self.fetch, *inputs)

    @staticmethod
    def _narrow(outputs: list[tuple[Value, torch.Tensor]], kept: Kept, already: Kept) -> Tensors:
        """Outputs narrowed to `kept`, where they have been narrowed to `already` before."""
        narrow = []
        for value, tensor in outputs:
            for d in range(len(value.shape)):
                stays = kept.of(value, d)
                if stays is not None:
                    at = torch.from_numpy(positions(already.of(value, d), stays))
                    tensor = selected(tensor, d, at.to(tensor.device))
            narrow.append(tensor)
        return narrow


def _computed(nodes: Iterable[torch.fx.Node]) -> list[torch.Tensor]:
    """What a graph computes by the way, perhaps in lower precision than its outputs have; without data."""
    made = [node.meta.get("val") for node in nodes if node.op == "call_function"]
    return [one for one in made if isinstance(one, torch.Tensor)]
