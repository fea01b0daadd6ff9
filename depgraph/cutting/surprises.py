"""Notes on a cut: what a user of the cut model might not expect."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from depgraph.graph import Program
    from depgraph.plan import Plan
    from depgraph.widths import Kept


def surprises(plan: Plan) -> list[str]:
    """What a user of the cut model might not expect: outputs that are narrower, tensors that nothing was known of."""
    program, kept = plan.graph.capture.program, plan.kept()
    notes = [*plan.notes] if plan.graph.words is not None else []
    notes += narrower_outputs(program, kept)
    notes += [odd] if (odd := odd_size(program, kept)) else []
    unread = _unread(program, kept)
    if unread:
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        notes.append(
            f"left as they were, since the traced forward doesn't read them: {', '.join(unread[:3])}{more}; code that reads "
            "them with what was cut (in training, say) fails until they are cut by hand"
        )
    return [*notes, plan.graph.note] if plan.graph.note else notes


def odd_size(program: Program, kept: Kept) -> str:
    """Which size an operator may not take after a cut, and why; empty where all are as it needs them."""
    odd = next((s for s in program.relations.steps if kept.size(s.dim) % s.size), None)
    return (
        ""
        if odd is None
        else f"a dimension now has {kept.size(odd.dim)} indices, no multiple of {odd.size}: {odd.reason}"
    )


def narrower_outputs(program: Program, kept: Kept) -> list[str]:
    """A note for each output that a cut makes narrower."""
    return [
        f"{name} now has shape {kept.shape(value)}, it had {value.shape}"
        + (f" (keep it with trace(..., fixed=[{name!r}]))" if name in program.by_products else "")
        for name, value in program.outputs.items()
        if kept.shape(value) != value.shape
    ]


def _unread(program: Program, kept: Kept) -> list[str]:
    """Parameters that nothing reads, and buffers that may have to fit a tensor of their module that was cut."""
    held = [v for v in program.values.values() if v.kind in ("parameter", "buffer")]
    read = {program.ties.get(v.target, v.target) for v in held if v.used}
    cut = {
        (v.target.rpartition(".")[0], before)
        for v in held
        for before, after in zip(v.shape, kept.shape(v), strict=True)
        if before != after
    }
    return [
        v.target
        for v in held
        if program.ties.get(v.target, v.target) not in read
        and (v.kind == "parameter" or any((v.target.rpartition(".")[0], size) in cut for size in v.shape))
    ]
