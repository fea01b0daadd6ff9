"""Operators that are known and yet fix all their dims: what they do ties dims in ways that no cut survives."""

from __future__ import annotations

from depgraph.rules.registry import Op, aten, rule

_LEFT_ALONE = aten("""
    as_strided as_strided_scatter diagonal diag diag_embed diagonal_scatter diagflat fill_diagonal_ trace block_diag
    rot90 renorm msort gradient trapezoid trapz cumulative_trapezoid quantile nanquantile cov corrcoef
    linalg_matrix_norm linalg_cross cross affine_grid_generator fractional_max_pool2d fractional_max_pool3d stft istft
    linalg_inv linalg_inv_ex inverse linalg_det det linalg_slogdet slogdet logdet linalg_cholesky linalg_cholesky_ex
    cholesky linalg_eigh linalg_eigvalsh linalg_qr linalg_svd linalg_svdvals linalg_solve linalg_solve_triangular
    linalg_pinv pinverse linalg_lstsq linalg_matrix_exp matrix_exp linalg_matrix_power matrix_power
""")


@rule(*_LEFT_ALONE)
def left_alone(op: Op) -> None:
    op.fix_all("the operator ties its dims to each other")
