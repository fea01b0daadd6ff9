"""Operators that multiply and sum: linear maps, matrix products, einsum, distances, attention."""

from __future__ import annotations

import string

from depgraph.graph import Step, Value, Work
from depgraph.operators import without_overload
from depgraph.rules.registry import Op, rule

_BYTES_OF_A_ROW = 16

rule("aten.linear", equation="... i, o i, o -> ... o", work="... i o")
rule("aten.mv", equation="o i, i -> o", work="o i")
rule("aten.dot", "aten.vdot", equation="i, i ->", work="i")
rule("aten.outer", "aten.ger", equation="a, b -> a b", work="a b")
rule("aten.mm", equation="a k, k b -> a b", work="a k b")
rule("aten._sparse_mm", equation="a! k!, k b -> a b", work="a k b")
rule("aten.bmm", equation="n a k, n k b -> n a b", work="n a k b")
rule("aten.bilinear", equation="... i, ... j, o i j, o -> ... o", work="... i j o")


@rule("aten._grouped_mm", "transformers.grouped_mm_fallback")
def grouped_product(op: Op) -> None:
    """Runs of rows of [rows, i] are multiplied each with a matrix of its own of [g, i, o]; `offs` [g] says where they end.

    torch's kernel wants strides that are multiples of 16 bytes, which the operator shows only when it runs.
    """
    rows, matrices, *ends = op.inputs
    if len(rows.shape) == 2 and len(matrices.shape) == 3 and len(ends) == 1:
        op.relate("s! i, g~ i o, g~ -> s! o", work="s i o")
        step = _BYTES_OF_A_ROW // rows.itemsize
        reason = op.reason(f"torch multiplies groups only where rows are a multiple of {_BYTES_OF_A_ROW} bytes")
        for value, dim in ((rows, 1), (matrices, 2)):  # of matrices that are turned, rows are along the other dim
            if value.shape[dim] % step == 0:
                op.relations.steps.append(Step(value.dim(dim), step, reason))
    else:
        op.fix_all("which of its rows belong together is known at run time only")


_ADDED = {
    "aten.addmm": ("a k, k b -> a b", "a k b"),
    "aten.addmv": ("a k, k -> a", "a k"),
    "aten.addr": ("a, b -> a b", "a b"),
    "aten.baddbmm": ("n a k, n k b -> n a b", "n a k b"),
    "aten.addbmm": ("n a k, n k b -> a b", "n a k b"),
}


@rule(*_ADDED)
def add_product(op: Op) -> None:
    """beta · added + alpha · product."""
    base = without_overload(op.target).removesuffix("_")
    equation, work = _ADDED[base]
    added, *factors = op.inputs
    op.relate(equation, *factors, work=work)
    op.align_elementwise([added, op.output])


@rule("aten.matmul", "aten.linalg_matmul")
def matmul(op: Op) -> None:
    left, right = op.inputs
    a = "k" if len(left.shape) == 1 else "... m k"
    b = "k" if len(right.shape) == 1 else "... k n"
    out = [letter for letter, value in (("m", left), ("n", right)) if len(value.shape) > 1]
    run = ["..."] if max(len(left.shape), len(right.shape)) > 2 else []
    op.relate(f"{a}, {b} -> {' '.join(run + out)}", work=" ".join([*run, *out, "k"]))


@rule("aten.inner")
def inner(op: Op) -> None:
    """The last dims are summed, all others stand side by side; a scalar operand multiplies."""
    left, right = op.inputs
    if not left.shape or not right.shape:
        op.align_elementwise([left, op.output])
        op.align_elementwise([right, op.output])
        return
    a, b = (string.ascii_letters[: len(left.shape) - 1], string.ascii_uppercase[: len(right.shape) - 1])
    op.relate(f"{' '.join([*a, 'z'])}, {' '.join([*b, 'z'])} -> {' '.join(a + b)}", work=" ".join([*a, *b, "z"]))


@rule("aten.tensordot")
def tensordot(op: Op) -> None:
    """`dims_self` of one meet `dims_other` of the other; the rest stand side by side."""
    left, right = op.inputs
    a, b = list(string.ascii_lowercase[: len(left.shape)]), list(string.ascii_uppercase[: len(right.shape)])
    for i, j in zip(op["dims_self"], op["dims_other"], strict=True):
        b[j] = a[i]
    rest = [x for x in [*a, *b] if not (x in a and x in b)]
    op.relate(f"{' '.join(a)}, {' '.join(b)} -> {' '.join(rest)}", work=" ".join(dict.fromkeys([*a, *b])))


@rule("aten.einsum")
def einsum(op: Op) -> None:
    """The formula is an axis equation already; a letter of a single operand and no result is contracted too."""
    left, arrow, right = op["equation"].replace(" ", "").partition("->")
    if not arrow:
        letters = left.replace(",", "").replace("...", "")
        right = ("..." if "..." in left else "") + "".join(sorted(a for a in set(letters) if letters.count(a) == 1))
    terms = left.split(",")
    work = _spaced(("..." if "..." in left else "") + "".join(a for a in string.ascii_letters if a in left))
    op.relate(f"{', '.join(map(_spaced, terms))} -> {_spaced(right)}", work=work if len(terms) > 1 else "")
    for k, (term, value) in enumerate(zip(terms, op.inputs, strict=True)):
        others = set("".join(terms[:k] + terms[k + 1 :])) - {"."}
        run = "." * (len(value.shape) - len(term.replace("...", "")))
        for d, letter in enumerate(term.replace("...", run)):
            if letter not in right and letter not in others:
                op.contract_alone(value, d)


def _spaced(term: str) -> str:
    return " ".join(term.replace("...", ".")).replace(".", "...")


@rule("aten.kron")
def kron(op: Op) -> None:
    """Every dim of the result is [left, right] in one."""
    left, right = op.inputs
    for d in range(1, len(op.output.shape) + 1):
        parts = [value.dim(-d) for value in (left, right) if d <= len(value.shape)]
        op.relations.fold(op.output.dim(-d), parts)


@rule("aten.cdist", "aten._cdist_forward")
def pairs_of_distances(op: Op) -> None:
    """A sum over the differences of two vectors: neither may have what the other lost."""
    op.relate("... a k, ... b k -> ... a b", work="... a b k")
    _each_alone(op, -1)


def _each_alone(op: Op, along: int) -> None:
    """Zeros in one operand aren't enough: both are summed by themselves too."""
    for k, value in enumerate(op.inputs):
        op.contract(value, along, product=k + 1)


def _along(op: Op, work: bool) -> tuple[int, list[Value]]:
    """States that two tensors, broadcast, are multiplied and summed over one dim: that dim, from behind, and who has it."""
    rank = len(op.output.shape) + 1
    along = op.get("dim", -1) % rank
    names = [f"d{d}" for d in range(rank)]
    terms = [" ".join(names[rank - len(value.shape) :]) for value in op.inputs]
    rest = [name for d, name in enumerate(names) if d != along]
    op.relate(f"{', '.join(terms)} -> {' '.join(rest)}", work=" ".join(names) if work else "")
    return along - rank, [value for value in op.inputs if len(value.shape) >= rank - along]


@rule("aten.linalg_vecdot")
def vecdot(op: Op) -> None:
    """The products are summed over `dim`."""
    _along(op, work=True)


@rule("aten.cosine_similarity")
def cosine_similarity(op: Op) -> None:
    """The products and both norms are sums over `dim`; one number for all of its indices counts once for each in a norm."""
    along, having = _along(op, work=False)
    wide = [value for value in having if value.shape[along] != 1]
    if len(wide) < len(op.inputs):
        for value in wide:
            op.fix(value, along, "the norm of one number counts its indices")
    else:
        _each_alone(op, along)


@rule("aten.scaled_dot_product_attention")
def attention(op: Op) -> None:
    """softmax(q kᵀ) v over the last two dims; with grouped queries, q has (h r) heads where k and v have h."""
    query, key, value = op["query"], op["key"], op["value"]
    if op.get("enable_gqa") and query.shape[-3] != key.shape[-3]:
        text = "... (h r) q d, ... h k d, ... h k v -> ... (h r) q v"
        op.relate(text, query, key, value, r=query.shape[-3] // key.shape[-3])
    else:
        op.relate("... q d, ... k d, ... k v -> ... q v", query, key, value)
    run = op.output.dims[:-2]
    op.relations.work += [
        Work(op.name, (*run, query.dim(-2), query.dim(-1), key.dim(-2))),
        Work(op.name, (*run, query.dim(-2), key.dim(-2), value.dim(-1))),
    ]
    op.relations.mix(key.dim(-2), "attention's softmax mixes it")
    if op.get("is_causal"):
        op.fix(query, -2, "causal attention counts along it")
        op.fix(key, -2, "causal attention counts along it")
    mask = op.get("attn_mask")
    if mask is not None:
        for d in range(3, len(mask.shape) + 1):
            op.relations.align(mask.dim(-d), op.output.dim(-d))
        op.relations.align(mask.dim(-1), key.dim(-2))
        op.relations.align(mask.dim(-2), query.dim(-2))
