"""Samples of linear algebra: a batch of matrices each, of which only the batch is free."""

from __future__ import annotations

from tests.rules.sample import sample, t, words

_ALONE = {
    "linalg_inv": "out", "inverse": "out", "matrix_exp": "out", "linalg_matrix_exp": "out",
    "linalg_inv_ex": "out0", "linalg_det": "", "linalg_slogdet": "", "slogdet": "",
}  # fmt: skip


def _fixed(name: str, *results: str) -> str:
    """The dims of a square matrix and of the given results."""
    return " ".join([f"{name}.1", f"{name}.2", *results])


def _both(name: str) -> list[str]:
    return [f"{name}.1", f"{name}.2"] if name else []


SAMPLES = [
    *(sample(name, t(2, 3, 3), fixed=_fixed("self" if name in _SELF else "A", *_both(out)))
      for _SELF in [words("inverse matrix_exp linalg_matrix_exp slogdet")]
      for name, out in _ALONE.items()),
    sample("det", t(2, 3, 3), fixed=_fixed("self")),
    sample("linalg_pinv", t(2, 3, 3), 1e-9, fixed=_fixed("self", *_both("out")), poison=9.0),
    sample("pinverse", t(2, 3, 3), fixed=_fixed("self", *_both("out")), poison=9.0),
    sample("linalg_cond", t(2, 3, 3), fixed=_fixed("self"), poison=9.0),
    sample("linalg_pinv.rcond_tensor", t(2, 3, 3), t(2), fixed="*"),
    sample("linalg_matrix_rank", t(2, 3, 3), 1e-9, fixed=_fixed("self"), poison=9.0),
    *(sample(name, t(2, 3, 3), 2, fixed=_fixed("self", *_both("out"))) for name in words("linalg_matrix_power matrix_power")),
    *(sample(name, t(2, 3, 3), fixed=_fixed("self" if name != "linalg_svdvals" else "A", "out.1"), poison=9.0)
      for name in words("linalg_eigvalsh linalg_eigvals linalg_svdvals")),
    sample("linalg_eigh", t(2, 3, 3), fixed=_fixed("self", "out0.1", *_both("out1")), poison=9.0),
    sample("linalg_eig", t(2, 3, 3), fixed=_fixed("self", "out0.1", *_both("out1")), poison=9.0),
    sample("linalg_qr", t(2, 4, 3), fixed=_fixed("A", *_both("out0"), *_both("out1"))),
    sample("linalg_lu_factor", t(2, 3, 3), fixed=_fixed("A", *_both("out0"), "out1.1")),
    sample("linalg_lu", t(2, 3, 3), fixed=_fixed("A", *_both("out0"), *_both("out1"), *_both("out2"))),
    sample("linalg_svd", t(2, 4, 3), False, fixed=_fixed("A", *_both("out0"), "out1.1", *_both("out2")), poison=9.0),
    sample("linalg_householder_product", t(2, 4, 3), t(2, 3), fixed="input.1 input.2 tau.1 out.1 out.2"),
    sample("linalg_solve", t(2, 3, 3), t(2, 3, 4), fixed="A.1 A.2 B.1 out.1"),
    sample("linalg_solve", t(2, 3, 3), t(2, 3), fixed="A.1 A.2 B.1 out.1"),
    sample("linalg_solve", t(3, 3), t(2, 3), left=False, fixed="*"),
    sample("linalg_solve_triangular", t(2, 3, 3), t(2, 3, 4), upper=True, fixed="self.1 self.2 B.1 out.1"),
    sample("linalg_matrix_norm.str_ord", t(2, 3, 4), mixed="self.1 self.2"),
    sample("linalg_matrix_norm.str_ord", t(2, 3, 4), "nuc", [0, 2], True, fixed="self.0 self.2", poison=9.0),
    sample("linalg_matrix_norm", t(2, 3, 4), 2, fixed="self.1 self.2", poison=9.0),
    sample("linalg_cross", t(4, 3), t(4, 3), fixed="self.1 other.1 out.1"),
    sample("cross", t(4, 3), t(4, 3), 1, fixed="self.1 other.1 out.1"),
    sample("cross", t(4, 3), t(4, 3), fixed="*"),
    sample("linalg_cross", t(3, 4), t(3, 4), dim=0, fixed="self.0 other.0 out.0"),
    sample("diagonal", t(4, 3, 5), 0, 0, 1, fixed="self.0 self.1 out.1"),
    sample("linalg_diagonal", t(4, 3, 5), fixed="A.1 A.2 out.1"),
    sample("diag_embed", t(4, 3), fixed="self.1 out.1 out.2"),
    sample("diag_embed", t(4, 3), 0, 0, 2, fixed="self.1 out.0 out.2"),
    sample("diagonal_scatter", t(4, 3, 5), t(5, 3), 0, 0, 1, fixed="self.0 self.1 src.1 out.0 out.1"),
    sample("linalg_multi_dot", [t(2, 3), t(3, 4), t(4, 5)]),
    sample("linalg_multi_dot", [t(3), t(3, 4), t(4)]),
    sample("chain_matmul", [t(2, 3), t(3, 4), t(4, 5)]),
]  # fmt: skip

UNSAMPLED = {
    f"aten.{name}": "needs a positive definite matrix; its rule is that of linalg_inv"
    for name in ("linalg_cholesky", "linalg_cholesky_ex", "cholesky", "cholesky_inverse", "logdet")
}
