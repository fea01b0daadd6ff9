"""Samples of operators that are known and yet fix all their dims."""

from __future__ import annotations

from tests.rules.sample import T, sample, t, words

SAMPLES = [
    *(sample(name, t(3, 3), fixed="*") for name in words("diag diagflat trace cov corrcoef linalg_vander linalg_ldl_factor")),
    sample("as_strided", t(3, 4), [2, 2], [1, 2], fixed="*"),
    sample("as_strided_scatter", t(3, 4), t(2, 2), [2, 2], [1, 2], fixed="*"),
    sample("fill_diagonal_", t(3, 4), 0.0, fixed="*"),
    sample("linalg_lstsq", t(3, 3), t(3, 2), fixed="*"),
    sample("lu_unpack", t(2, 2), T((2,), "twos32"), fixed="*"),
    sample("cholesky_solve", t(3, 2), t(3, 3), fixed="*"),
    sample("triangular_solve", t(3, 2), t(3, 3), fixed="*"),
    sample("orgqr", t(3, 3), t(3), fixed="*"),
]  # fmt: skip
