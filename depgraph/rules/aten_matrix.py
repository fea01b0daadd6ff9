"""Linear algebra: the dims of the matrices are tied to each other, those of the batch, and of right-hand sides, are free."""

from __future__ import annotations

from functools import partial

from depgraph.rules.registry import Op, aten, rule

_MATRIX, _VECTOR, _NUMBER = "... p{0}! q{0}!", "... p{0}!", "..."
_SQUARE = "... n! m!"

_RESULTS: dict[str, tuple[str, ...]] = {
    """linalg_inv inverse linalg_cholesky cholesky cholesky_inverse matrix_exp linalg_matrix_exp linalg_matrix_power
    matrix_power linalg_pinv pinverse""": (_MATRIX,),
    "linalg_inv_ex linalg_cholesky_ex": (_MATRIX, _NUMBER),
    "linalg_det det logdet linalg_cond linalg_matrix_rank": (_NUMBER,),
    "linalg_slogdet slogdet": (_NUMBER, _NUMBER),
    "linalg_eigvalsh linalg_eigvals linalg_svdvals": (_VECTOR,),
    "linalg_eigh linalg_eig": (_VECTOR, _MATRIX),
    "linalg_qr": (_MATRIX, _MATRIX),
    "linalg_svd": (_MATRIX, _VECTOR, _MATRIX),
    "linalg_lu_factor": (_MATRIX, _VECTOR),
    "linalg_lu": (_MATRIX, _MATRIX, _MATRIX),
}


def of_one_matrix(op: Op, equation: str) -> None:
    """Whatever is computed from a matrix needs all of it."""
    if len(op.inputs) > 1:  # tolerances
        op.fix_all("the operator ties its dims to each other")
        return
    op.relate(equation)


for _names, _results in _RESULTS.items():
    _equation = f"{_SQUARE} -> {', '.join(term.format(k) for k, term in enumerate(_results))}"
    rule(*aten(_names))(partial(of_one_matrix, equation=_equation))

rule("aten.linalg_householder_product", equation="... n! m!, ... k! -> ... p! q!")


@rule("aten.linalg_solve", "aten.linalg_solve_triangular")
def solve(op: Op) -> None:
    """A x = b: the columns of the right-hand side are solved one by one."""
    matrix, right = op.inputs
    if not op["left"]:
        op.fix_all("the operator ties its dims to each other")
    elif len(right.shape) == 1 or right.shape == matrix.shape[:-1]:
        op.relate("... n! m!, ... p! -> ... q!")
    else:
        op.relate("... n! m!, ... p! k -> ... q! k")


@rule("aten.linalg_matrix_norm")
def matrix_norm(op: Op) -> None:
    source, (a, b) = op["self"], op["dim"]
    rank = len(source.shape)
    kept = [d for d in range(rank) if d not in (a % rank, b % rank)]
    for place, d in enumerate(kept):
        op.relations.align(source.dim(d), op.output.dim(d if op["keepdim"] else place))
    for d in (a, b):
        if op["ord"] == "fro":
            op.relations.mix(source.dim(d), "a matrix norm is taken over it")
        else:
            op.fix(source, d, "a matrix norm is taken over it")


@rule("aten.linalg_cross", "aten.cross")
def cross(op: Op) -> None:
    """Products of vectors of three; without `dim` they lie along the first dim of that size, whichever it is."""
    if op["dim"] is None:
        op.fix_all("the first dim of size 3 is looked for")
        return
    op.align_elementwise([*op.inputs, op.output])
    op.fix(op.output, op["dim"], "vectors lie along it")


@rule("aten.diagonal", "aten.linalg_diagonal")
def diagonal(op: Op) -> None:
    """The two dims of the diagonal go, a last one comes."""
    _diagonal(op, whole=0)


@rule("aten.diag_embed")
def diag_embed(op: Op) -> None:
    """The last dim becomes the diagonal of two."""
    _diagonal(op, whole=1)


@rule("aten.diagonal_scatter")
def diagonal_scatter(op: Op) -> None:
    op.align_elementwise([op["self"], op.output])
    _diagonal(op, whole=0)


def _diagonal(op: Op, whole: int) -> None:
    """`whole` is the place of the tensor with both dims among the first input, or a patch of it, and the output."""
    narrow = op["src"] if op.get("src") is not None else op.output
    pair = (op.inputs[0], narrow)
    matrix, line = pair[whole], pair[1 - whole]
    rank = len(matrix.shape)
    crossed = (op["dim1"] % rank, op["dim2"] % rank)
    rest = [d for d in range(rank) if d not in crossed]
    for place, d in enumerate(rest):
        op.relations.align(matrix.dim(d), line.dim(place))
    for value, d in ((matrix, crossed[0]), (matrix, crossed[1]), (line, -1)):
        op.fix(value, d, "a diagonal runs along it")


@rule("aten.linalg_multi_dot", "aten.chain_matmul")
def chain(op: Op) -> None:
    """A product of several matrices, of which the first and the last may be vectors."""
    first = len(op.inputs[0].shape) == 1
    names = [f"d{k}" for k in range(len(op.inputs) + 1)]
    terms = [f"{a} {b}" for a, b in zip(names, names[1:], strict=False)]
    terms[0] = names[1] if first else terms[0]
    last = len(op.inputs[-1].shape) == 1
    terms[-1] = names[-2] if last else terms[-1]
    ends = [names[0]] * (not first) + [names[-1]] * (not last)
    op.relate(f"{', '.join(terms)} -> {' '.join(ends)}")
