"""Applying a plan: in the module where its Python can express the cut, in the graph otherwise, checked in any case."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from depgraph.capture.capturing import quiet
from depgraph.capture.exported import only_as_module
from depgraph.capture.forgetting import forget
from depgraph.capture.training import training_forward
from depgraph.cutting.absorbing import absorb
from depgraph.cutting.drifting import new_drifts, numbers_of
from depgraph.cutting.experts import Expected, check_without, expected, leaving, record_without, taken, with_entries
from depgraph.cutting.expressible import expressed
from depgraph.cutting.expressing import Solution
from depgraph.cutting.module import Undo, cut_copy, cut_in_place
from depgraph.cutting.parting import ways
from depgraph.cutting.program import cut_programs
from depgraph.cutting.record import make_record, put_record
from depgraph.cutting.report import Check, CutReport
from depgraph.cutting.rerunning import Inputs, inputs_at, ran
from depgraph.cutting.roles import other_reads
from depgraph.cutting.shortening import Shortening, shorten, shortening_of, shorter_copy
from depgraph.cutting.shorter import carried, check_shorter, graph_of, record_of, references, renamed, together
from depgraph.cutting.surprises import narrower_outputs, odd_size, surprises
from depgraph.cutting.varying import fixed_sizes
from depgraph.cutting.verifying import Verifier
from depgraph.errors import CheckError, CutError, PlanError
from depgraph.finite import require_finite

if TYPE_CHECKING:
    from depgraph.capture.recording import Call
    from depgraph.plan import Plan

_ONLY_MODULE = "what the code takes one by one leaves a list of the module, or its weights, not a graph: use form='module' or 'auto'"


@dataclass(frozen=True)
class How:
    """form: "module" (the user's class), "graph" (a torch.fx.GraphModule) or "auto" (module where it can be expressed).

    check: "default" compares the result with the zeroed original; "none" leaves that out.
    """

    form: str = "auto"
    check: str = "default"

    def __post_init__(self) -> None:
        if self.form not in ("auto", "module", "graph"):
            raise PlanError(f"form={self.form!r} is not one of auto, module, graph")
        if self.check not in ("default", "none"):
            raise PlanError(f"check={self.check!r} is not one of default, none")


def apply(plan: Plan, **options: Any) -> CutReport:
    """Cut a copy of the model: weights are copied once, already cut.

    Raises:
        CutError: ``form="module"`` and the module's Python can't express the plan (the message has file and line).
        CheckError: the result doesn't compute what the zeroed original computes, or a weight is NaN or infinite.
        PlanError: the model has changed since it was traced.
    """
    how = _how(options)
    plan.graph.check_unchanged()
    forget(plan.graph.model, plan.graph.args, plan.graph.kwargs)
    if how.check != "none":
        require_finite(plan.graph.model, CheckError)
    if with_entries(plan) and not plan.branches:
        return _without_entries(plan, how)
    why = ""
    if how.form != "graph":
        try:
            return _without_branches(plan, how) if plan.branches else _module(plan, how)
        except (CutError, CheckError) as error:
            if how.form == "module" or only_as_module(plan.graph.capture.exported) or with_entries(plan):
                raise
            why = str(error)
    if with_entries(plan):
        raise CutError(_ONLY_MODULE)
    return _graph(plan, how, why)


def apply_in_place(plan: Plan, **options: Any) -> CutReport:
    """Cut the graph's own model; a failed cut, or an interruption, leaves it as it was.

    Raises:
        CutError: the module's Python can't express the plan, or ``form="graph"`` was asked for.
        CheckError: the result doesn't compute what the zeroed original computes, or a weight is NaN or infinite.
        PlanError: the model has changed since it was traced.
    """
    how = _how({"form": "module", **options})
    if not isinstance(plan.graph.model, nn.Module):
        raise CutError(f"{plan.graph.name} can't be cut in place: use plan.apply(), which gives a new model")
    if how.form == "graph":
        raise CutError("a graph can't be cut in place: use plan.apply(form='graph'), which gives a new module")
    plan.graph.check_unchanged()
    forget(plan.graph.model, plan.graph.args, plan.graph.kwargs)
    if how.check != "none":
        require_finite(plan.graph.model, CheckError)
    if plan.branches:
        return _without_branches_in_place(plan, how)
    if with_entries(plan):
        return _without_entries_in_place(plan, how)
    return _in_place(plan, how)[0]


def _in_place(plan: Plan, how: How) -> tuple[CutReport, Undo]:
    """Narrow the graph's own model; also gives what takes it back."""
    graph, verifier = plan.graph, Verifier(plan)
    solution = expressed(plan)
    dense = numbers_of(graph, graph.model)
    undo = cut_in_place(graph, plan.kept(), solution)
    try:
        solution.drifts += new_drifts(graph, dense, _numbers_after(plan, graph.model), solution.drifts, plan.kept())
        absorb(graph, graph.model, solution.drifts, plan.kept())
        check = _check(verifier, graph.model, how)
        return _report(plan, graph.model, "module", check, solution, _in_training(plan, graph.model)), undo
    except BaseException:
        undo()
        raise


def _without_entries(plan: Plan, how: How) -> CutReport:
    """Narrow a copy along all other axes, then let whole modules leave it."""
    if how.form == "graph":
        raise CutError(_ONLY_MODULE)
    removal, rest, given = with_entries(plan), _of_dims(plan), _given(plan, how)
    first = _module(rest, how) if rest.removal else None
    model = plan.graph.model if first is None else first.model
    wanted = _expected(plan, model, given)
    shortening = leaving(plan.graph, removal, rest.removal)
    if first is None:
        model = shorter_copy(model, shortening)
    else:
        shorten(model, shortening)
    return _entries_report(plan, model, shortening, wanted, first)


def _without_entries_in_place(plan: Plan, how: How) -> CutReport:
    model, rest, steps = plan.graph.model, _of_dims(plan), list[Undo]()
    before, given = getattr(model, "depgraph_record", None), _given(plan, how)
    try:
        first = None
        if rest.removal:
            first, undo = _in_place(rest, how)
            steps.append(undo)
        wanted = _expected(plan, model, given)
        shortening = leaving(plan.graph, with_entries(plan), rest.removal)
        steps.append(shorten(model, shortening))
        return _entries_report(plan, model, shortening, wanted, first)
    except BaseException:
        for step in reversed(steps):
            step()
        put_record(model, before)
        raise


def _of_dims(plan: Plan) -> Plan:
    """The plan without the axes that take whole modules along."""
    left = {name: groups for name, groups in plan.removal.items() if not plan.graph[name].tried}
    return replace(plan, removal=left)


def _given(plan: Plan, how: How) -> list[Inputs]:
    """What the original is to be compared on; nothing where nothing is to be compared."""
    on_meta = any(t.is_meta for t in plan.graph.tensors().values())
    return [] if how.check == "none" or on_meta else taken(plan.graph)


def _expected(plan: Plan, model: nn.Module, given: list[Inputs]) -> Expected | None:
    return expected(plan.graph, model, with_entries(plan), given) if given else None


def _entries_report(
    plan: Plan, model: nn.Module, shortening: Shortening, wanted: Expected | None, first: CutReport | None
) -> CutReport:
    """Check what the modules have left, and say what was done."""
    removal = with_entries(plan)
    check = None if wanted is None else replace(check_without(plan.graph, model, wanted), chosen=len(removal))
    earlier = getattr(model, "depgraph_record", None)
    model.depgraph_record = record = record_without(plan, removal, shortening, earlier)  # type: ignore[assignment]
    checked = check if first is None else together(first.check, check)
    notes = (
        surprises(plan) if first is None else (*first.notes, *narrower_outputs(plan.graph.capture.program, plan.kept()))
    )
    return CutReport(model, "module", plan.graph.dense_cost, plan.cost(), checked, record, tuple(dict.fromkeys(notes)))


def _without_branches(plan: Plan, how: How) -> CutReport:
    """Leave the branches out of a copy, check that, then narrow the axes of what remains."""
    failure: Exception | None = None
    for wanted in ways(plan.graph, plan.branches):
        try:
            shortening = shortening_of(plan.graph, wanted)
            model = shorter_copy(plan.graph.model, shortening)
            check = _checked_shorter(plan, model, how)
            break
        except (CutError, CheckError) as error:
            failure = failure or error
    else:
        assert failure is not None
        raise failure
    model.depgraph_record = record_of(plan, shortening, getattr(plan.graph.model, "depgraph_record", None))  # type: ignore[assignment]
    if not plan.removal:
        return _short_report(plan, model, check)
    rest = apply(carried(plan, renamed(plan.graph.model, shortening), graph_of(plan, model)), **vars(how))
    return replace(
        rest, before=plan.graph.dense_cost, after=plan.cost(), check=together(check, rest.check), notes=rest.notes
    )


def _without_branches_in_place(plan: Plan, how: How) -> CutReport:
    """The same with the graph's own model, in the way that would be taken for a copy."""
    model = plan.graph.model
    expected = references(plan) if how.check != "none" else ([], [])
    before, failure = getattr(model, "depgraph_record", None), None
    for wanted in ways(plan.graph, plan.branches):
        undo: Undo | None = None
        try:
            shortening = shortening_of(plan.graph, wanted)
            record, names = record_of(plan, shortening, before), renamed(model, shortening)
            undo = shorten(model, shortening)
            check = _checked_shorter(plan, model, how, expected)
            return _narrowed_in_place(plan, how, check, (record, names))
        except BaseException as error:
            if undo is not None:
                undo()
            put_record(model, before)
            if not isinstance(error, (CutError, CheckError)):
                raise
            failure = failure or error
    assert failure is not None
    raise failure


def _narrowed_in_place(
    plan: Plan, how: How, check: Check | None, made: tuple[dict[str, Any], dict[str, str]]
) -> CutReport:
    """Narrow the axes of what remains of the graph's own model; `made` are the record of what was left out and new names."""
    model, (record, names) = plan.graph.model, made
    model.depgraph_record = record  # type: ignore[assignment]
    if not plan.removal:
        return _short_report(plan, model, check)
    dense, after = plan.graph.dense_cost, plan.cost()
    rest = apply_in_place(carried(plan, names, graph_of(plan, model)), form="module", check=how.check)
    return replace(rest, before=dense, after=after, check=together(check, rest.check))


def _checked_shorter(plan: Plan, model: nn.Module, how: How, expected: Any = None) -> Check | None:
    """Compare with what is expected: by default, what the program computes without the branches on the graph's model."""
    if how.check == "none":
        return None
    expected = expected or references(plan)
    if not expected[0]:
        return Check(0, 0, 0, 0, 0, skipped="the model is on the meta device", branches=len(plan.branches))
    return check_shorter(plan, model, *expected)


def _short_report(plan: Plan, model: nn.Module, check: Check | None) -> CutReport:
    record: dict[str, Any] = model.depgraph_record  # type: ignore[assignment]
    return CutReport(model, "module", plan.graph.dense_cost, plan.cost(), check, record, plan.notes)


def _how(options: dict[str, Any]) -> How:
    unknown = set(options) - {"form", "check"}
    if unknown:
        raise PlanError(f"apply has no option {sorted(unknown)[0]!r}; it takes form and check")
    return How(**options)


def _module(plan: Plan, how: How) -> CutReport:
    solution = expressed(plan)
    model = cut_copy(plan.graph, plan.kept(), solution)
    dense = numbers_of(plan.graph, plan.graph.model)
    after = _numbers_after(plan, model)
    solution.drifts += new_drifts(plan.graph, dense, after, solution.drifts, plan.kept())
    absorb(plan.graph, model, solution.drifts, plan.kept())
    check = _check(Verifier(plan), model, how)
    return _report(plan, model, "module", check, solution, _in_training(plan, model))


def _numbers_after(plan: Plan, model: nn.Module) -> list[Call]:
    """What the code of a cut model computes from sizes; raises CheckError where it doesn't run."""
    inputs = inputs_at(plan.graph, plan.kept())
    return ran(plan.graph, model, lambda: numbers_of(plan.graph, model, inputs))


def _in_training(plan: Plan, model: nn.Module) -> tuple[str, ...]:
    """A note where the training forward went with the example and doesn't any more."""
    with quiet(model), torch.no_grad():
        inputs = inputs_at(plan.graph, plan.kept())
        if not plan.graph.capture.trained or training_forward(model, inputs) is not None:
            return ()
    return ("its forward in training mode fails on the example now, which it didn't before: it has sizes of its own",)


def _graph(plan: Plan, how: How, why: str) -> CutReport:
    if plan.graph.words is not None:
        raise CutError(f"a vocabulary is trimmed in the module, not in the graph{f', and {why}' if why else ''}")
    failure: CheckError | None = None
    for number, way in enumerate(cut_programs(plan)):
        try:
            check = _checked_graph(plan, way.model, how)
        except CheckError as error:
            failure = failure or error
            continue
        reason = (f"cut as a graph because {why}",) if why else ()
        fixed = fixed_sizes(plan.graph, way.model, way.inputs)
        report = _report(plan, way.model, "graph", check, Solution(), (*reason, *fixed))
        report.record["way"] = number
        return report
    assert failure is not None
    raise failure


def _checked_graph(plan: Plan, model: nn.Module, how: How) -> Check | None:
    if plan.branches and not plan.removal:
        return _checked_shorter(plan, model, how)
    check = _check(Verifier(plan), model, how)
    return check and replace(check, branches=len(plan.branches))


def _check(verifier: Verifier, model: nn.Module, how: How) -> Check | None:
    if how.check == "none":
        return None
    odd = odd_size(verifier.plan.graph.capture.program, verifier.plan.kept())
    return ran(verifier.plan.graph, model, lambda: verifier.check(model), odd)


def _report(
    plan: Plan, model: nn.Module, form: str, check: Check | None, solution: Solution, notes: tuple[str, ...]
) -> CutReport:
    record = make_record(plan, form, solution)
    model.depgraph_record = record  # type: ignore[assignment]
    more = (*notes, *surprises(plan), *other_reads(plan.graph, solution.attributes))
    return CutReport(model, form, plan.graph.dense_cost, plan.cost(), check, record, more)
