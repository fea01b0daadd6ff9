"""Rules that users register for operators of their own: checked when they are given, and again at each use."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from depgraph.errors import RuleError
from depgraph.graph import Value
from depgraph.rules.equation import Equation, parse
from depgraph.rules.registry import Op, Rule, register

_NAME = re.compile(r"(\w+)(?:::|\.)(\w+)(\.\w+)?")


def rule(*targets: Any, equation: str = "", work: str = "") -> Callable[[Rule], Rule]:
    """Say what operators do with the dims of their tensors, so that these can be pruned through them.

    ``rule("mylib::scale", "... c, c -> ... c")`` registers at once. A term stands for one tensor, in the order of the
    operator's schema, those after the arrow for its results. The same letter in two terms aligns two dims; a letter of two
    inputs and no result is summed over; ``...`` is any run of dims that broadcast; ``(g c)`` is a dim made of two; ``x!``
    can't be narrowed; ``x~`` is mixed, so that removing an index isn't the same as zeroing it. `work` names the letters whose
    sizes multiply to the multiply-accumulates. Without an equation this decorates a function of one `depgraph.rules.Op`.

    Args:
        targets: Names such as ``mylib::scale`` or ``mylib.scale.default`` (without an overload: all of them), or operators
            themselves (``torch.ops.mylib.scale``). They may be registered with torch later. An equation may be the last.
        equation: The same as a keyword.

    Raises:
        RuleError: a name or the equation can't be read. While tracing: the equation doesn't fit the operator's tensors.
    """
    if targets and isinstance(targets[-1], str) and "->" in targets[-1]:
        if equation:
            raise RuleError(f"two equations are given, {targets[-1]!r} and {equation!r}: give one")
        *names, equation = targets
    else:
        names = list(targets)
    if not names:
        raise RuleError(
            'a rule needs the name of an operator, such as depgraph.rule("mylib::scale", "... c, c -> ... c")'
        )
    known = [_name(target) for target in names]
    if equation:
        parsed = _checked(equation, work)
        register(known, partial(_apply, equation=parsed, work=work))
    elif work:
        raise RuleError(
            "work= names letters of an equation, and none is given: give one, or append to op.relations.work"
        )

    def decorate(function: Rule) -> Rule:
        if not callable(function):
            raise RuleError(f"a rule is an axis equation or a function of one Op, not {function!r}")
        register(known, function)
        return function

    return decorate


def _name(target: Any) -> str:
    """An operator's name as graphs have it, ``mylib.scale`` or ``mylib.scale.overload``."""
    found = _NAME.fullmatch(str(getattr(target, "_qualname", target)))
    if found is None:
        raise RuleError(
            f"{target!r} names no operator: write 'namespace::name' or 'namespace::name.overload', and an equation with an arrow"
        )
    return f"{found[1]}.{found[2]}{found[3] or ''}"


def _checked(text: str, work: str) -> Equation:
    """The equation, of which every letter says something about the dims it stands for."""
    try:
        equation = parse(text)
    except ValueError as error:
        raise RuleError(f"{error}; write terms such as '... c' apart by commas, results after '->'") from error
    marked = {a for t in (*equation.inputs, *equation.outputs) for k in t if k.mark for a in k.letters}
    given = Counter(a for term in equation.inputs for token in term for a in token.letters)
    made = Counter(a for term in equation.outputs for token in term for a in token.letters)
    for letter in sorted((given | made).keys() - marked - {"..."}):
        if not given[letter]:
            raise RuleError(
                f"axis equation {text!r}: {letter!r} stands in no input; mark it {letter}! if the operator counts it out"
            )
        if given[letter] == 1 and not made[letter]:
            raise RuleError(
                f"axis equation {text!r}: {letter!r} stands in one input and in no result; mark it {letter}~ if the operator "
                f"reduces or mixes it, or {letter}! if none of its indices may go"
            )
    for letter in work.split():
        if not given[letter] and not made[letter]:
            raise RuleError(f"work={work!r}: {letter!r} is no letter of the axis equation {text!r}")
    return equation


def _apply(op: Op, equation: Equation, work: str) -> None:
    inputs = _operands(op, len(equation.inputs))
    if inputs is None or len(equation.outputs) != len(op.outputs):
        raise _unfit(
            op,
            equation,
            f"it has {len(equation.inputs)} inputs and {len(equation.outputs)} results, the operator was called with "
            f"{len(op.inputs)} tensors and gave {len(op.outputs)}",
        )
    try:
        op.relate(equation.text, *inputs, work=work)
    except ValueError as error:
        raise _unfit(op, equation, str(error)) from error


def _operands(op: Op, count: int) -> list[Value | None] | None:
    """As many operands as the equation has terms: the tensors, or these and what could have been one but is None."""
    tensors: list[Value | None] = list(op.inputs)
    if len(tensors) == count:
        return tensors
    places: list[Value | None] = []
    for argument in op.arguments.values():
        listed = argument if isinstance(argument, list) else [argument]
        places += [item for item in listed if item is None or isinstance(item, Value)]
    return places if len(places) == count else None


def _unfit(op: Op, equation: Equation, why: str) -> RuleError:
    where = f" at {op.where}" if op.where else ""
    return RuleError(
        f"the rule {equation.text!r} doesn't fit {op.target}{where}: {why}; register another with depgraph.rule"
    )
