"""Operators that are known and yet fix all their dims: what they do ties dims in ways that no cut survives."""

from __future__ import annotations

from depgraph.rules.registry import Op, aten, rule

_LEFT_ALONE = aten("""
    as_strided as_strided_scatter diag diagflat fill_diagonal_ trace cov corrcoef linalg_lstsq linalg_vander
    linalg_ldl_factor lu_unpack cholesky_solve triangular_solve orgqr
""")


@rule(*_LEFT_ALONE)
def left_alone(op: Op) -> None:
    op.fix_all("the operator ties its dims to each other")
