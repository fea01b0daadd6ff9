"""Samples of operators that are known and yet fix all their dims."""

from __future__ import annotations

from tests.rules.sample import sample, t, words

SAMPLES = [
    *(sample(name, t(3, 3), fixed="*") for name in words("""
      diagonal diag diag_embed diagflat trace msort trapezoid.dx trapz.dx cumulative_trapezoid.dx cov corrcoef
      matrix_exp linalg_matrix_exp linalg_inv inverse linalg_inv_ex linalg_det det linalg_slogdet slogdet logdet
      linalg_eigh linalg_eigvalsh linalg_qr linalg_svd linalg_svdvals pinverse
      linalg_matrix_norm.str_ord gradient.scalarint""")),
    sample("linalg_pinv", t(3, 3), 1e-9, fixed="*"),
    sample("block_diag", [t(3, 3), t(2, 2)], fixed="*"),
    sample("rot90", t(3, 4), fixed="*"),
    sample("renorm", t(3, 4), 2, 0, 1.0, fixed="*"),
    sample("quantile.scalar", t(3, 4), 0.5, fixed="*"),
    sample("nanquantile.scalar", t(3, 4), 0.5, fixed="*"),
    sample("as_strided", t(3, 4), [2, 2], [1, 2], fixed="*"),
    sample("as_strided_scatter", t(3, 4), t(2, 2), [2, 2], [1, 2], fixed="*"),
    sample("diagonal_scatter", t(3, 4), t(3), fixed="*"),
    sample("fill_diagonal_", t(3, 4), 0.0, fixed="*"),
    sample("linalg_cross", t(4, 3), t(4, 3), fixed="*"),
    sample("cross", t(4, 3), t(4, 3), fixed="*"),
    sample("affine_grid_generator", t(2, 2, 3), [2, 3, 4, 4], False, fixed="*"),
    sample("linalg_solve", t(3, 3), t(3, 2), fixed="*"),
    sample("linalg_solve_triangular", t(3, 3), t(3, 2), upper=True, fixed="*"),
    sample("linalg_lstsq", t(3, 3), t(3, 2), fixed="*"),
    sample("linalg_matrix_power", t(3, 3), 2, fixed="*"),
    sample("matrix_power", t(3, 3), 2, fixed="*"),
]  # fmt: skip

UNSAMPLED = {
    **{f"aten.fractional_max_pool{n}d": "its windows are drawn at random; all its dims are fixed" for n in (2, 3)},
    **{f"aten.{name}": "needs a positive definite matrix or a window; all its dims are fixed" for name in
       ("linalg_cholesky", "linalg_cholesky_ex", "cholesky", "stft", "istft")},
}  # fmt: skip
