"""torch's exporter leaves out what changes nothing, and takes 1e-8 for zero then.

So `log(x + 1e-12)` or `x / (norm + 1e-9)` lose what keeps them finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TOLERANCES = ("_rel_tol", "_abs_tol")


@contextmanager
def exact_no_ops() -> Iterator[None]:
    """Within, onnxscript's rules for operators that change nothing take only zero for zero, and only one for one."""
    before = [(constant, name, getattr(constant, name)) for constant in _constants() for name in _TOLERANCES]
    try:
        for constant, name, _ in before:
            setattr(constant, name, 0.0)
        yield
    finally:
        for constant, name, tolerance in before:
            setattr(constant, name, tolerance)


def _constants() -> list[Any]:
    """The numbers in the patterns of these rules; none where another onnxscript keeps them elsewhere."""
    try:
        from onnxscript.rewriter.rules.common import _no_op

        nodes = [node for rule in _no_op.rules for node in rule._target_pattern]
    except (ImportError, AttributeError, TypeError):
        return []
    return [value for node in nodes for value in node.inputs if all(hasattr(value, name) for name in _TOLERANCES)]
