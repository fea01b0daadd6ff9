"""Operators that look along whole dims: sums, statistics, softmax, running sums, order."""

from __future__ import annotations

import numpy as np

from depgraph.graph import Value
from depgraph.rules.registry import Op, aten, rule


def _given_dims(op: Op, *names: str) -> list[int]:
    """The dims named by the first of these arguments that is there, from the front; all of them when it says none."""
    rank = len(op.inputs[0].shape)
    given = next((op[name] for name in names if op.get(name) is not None), None)
    if given is None or given == []:
        return list(range(rank))
    given = given if isinstance(given, (list, tuple)) else [given]
    return sorted({d % rank for d in given}) if rank else []


def _align_kept(op: Op, reduced: list[int], output: Value) -> None:
    source = op.inputs[0]
    kept = [d for d in range(len(source.shape)) if d not in reduced]
    same_rank = len(output.shape) == len(source.shape)
    for position, d in enumerate(kept):
        op.relations.align(source.dim(d), output.dim(d if same_rank else position))


@rule("aten.sum", "aten.nansum", "aten.count_nonzero")
def total(op: Op) -> None:
    """Zeros add nothing."""
    reduced = _given_dims(op, "dim")
    _align_kept(op, reduced, op.output)
    for d in reduced:
        op.contract_alone(op.inputs[0], d)


_STATISTICS = aten("""
    all _is_all_true _is_any_true amax amin any logsumexp special_logsumexp linalg_vector_norm linalg_norm frobenius_norm
    max mean nanmean median nanmedian min norm prod std std_mean var var_mean aminmax
""")
_NUMBERS_ITS_PICKS = {"aten.median.dim", "aten.nanmedian.dim"}
_CHOOSES = {"aten.max.dim", "aten.min.dim"}


@rule(*_STATISTICS)
def statistic(op: Op) -> None:
    """What is taken over a dim mixes it; where it also says where it found its result, and that is read, it counts the dim."""
    name = op.target.split(".")[1]
    if op.target.endswith(".other"):
        for value in op.inputs:
            op.align_elementwise([value, op.output])
        return
    reduced = _given_dims(op, "dim")
    for output in op.outputs:
        _align_kept(op, reduced, output)
    for d in reduced:
        op.relations.mix(op.inputs[0].dim(d), f"{name} is taken over it")
        if op.target in _CHOOSES:
            op.choose(op.inputs[0], d, op.outputs[1], 1)
        if op.target in _NUMBERS_ITS_PICKS and 1 not in op.unread:
            op.fix(op.inputs[0], d, "its indices are what the operator returns")


@rule("aten.argmax", "aten.argmin")
def largest(op: Op) -> None:
    """Which index has the extreme value; without a dim, the index counts through all of them."""
    reduced = _given_dims(op, "dim")
    if len(reduced) != 1:
        position(op)
        return
    _align_kept(op, reduced, op.output)
    op.choose(op.inputs[0], reduced[0], op.output, 1)


@rule("aten.kthvalue", "aten.mode")
def position(op: Op) -> None:
    reduced = _given_dims(op, "dim")
    for output in op.outputs:
        _align_kept(op, reduced, output)
    for d in reduced:
        op.fix(op.inputs[0], d, "its indices are what the operator returns")


@rule(*aten("softmax log_softmax _softmax _log_softmax _safe_softmax special_softmax special_log_softmax"))
def softmax(op: Op) -> None:
    op.align_elementwise([op.inputs[0], op.output])
    if op.output.shape:
        op.relations.mix(op.output.dim(op["dim"]), "softmax normalises over it")


@rule("aten.pairwise_distance")
def pairwise_distance(op: Op) -> None:
    """‖a - b + eps‖ over the last dim: because of the eps, zeros are not nothing."""
    left, right = op.inputs
    op.align_elementwise([left, right])
    for value in op.inputs:
        for d in range(2, len(value.shape) + 1):
            op.relations.align(value.dim(-d), op.output.dim(-d if op["keepdim"] else 1 - d))
        op.relations.mix(value.dim(-1), "a distance is taken over it")


@rule("aten.cumsum")
def running_total(op: Op) -> None:
    """Zeros add nothing to what comes after them."""
    op.align_elementwise([op.inputs[0], op.output])
    if op.output.shape:
        op.contract(op.inputs[0], op["dim"])


_ORDERED = aten("cumprod cummax cummin logcumsumexp roll sort argsort")


@rule(*_ORDERED)
def ordered(op: Op) -> None:
    """The order of indices along `dim` matters, so none of them may go; the other dims are left alone."""
    source = op.inputs[0]
    for output in op.outputs:
        op.align_elementwise([source, output])
    for d in _given_dims(op, "dims", "dim"):
        op.fix(source, d, "the order of its indices matters")


_FOURIER = aten("""
    fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2
    fft_hfft2 fft_ihfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_hfftn fft_ihfftn fft_fftshift fft_ifftshift
""")


@rule(*_FOURIER)
def fourier(op: Op) -> None:
    """Transformed dims are counted; a list of sizes without dims means the last ones, so then all are left alone."""
    source = op.inputs[0]
    along = _given_dims(op, "dim")
    if op.get("s") is not None and op.get("dim") is None:
        along = list(range(len(source.shape)))
    for d in range(len(source.shape)):
        if d in along:
            op.fix(source, d, "a Fourier transform runs along it")
            op.fix(op.output, d, "a Fourier transform runs along it")
        else:
            op.relations.align(source.dim(d), op.output.dim(d))


@rule("aten.flip", "aten.fliplr", "aten.flipud")
def flip(op: Op) -> None:
    """Index i of a flipped dim comes out as index n - 1 - i."""
    source = op.inputs[0]
    named = {"aten.fliplr.default": [1], "aten.flipud.default": [0]}.get(op.target)
    flipped = {d % len(source.shape) for d in (op["dims"] if named is None else named)}
    for d, size in enumerate(source.shape):
        order = np.arange(size)
        op.relations.align_at(source.dim(d), order, op.output.dim(d), order[::-1] if d in flipped else order)


@rule("aten.topk")
def selected(op: Op) -> None:
    """What is left of `dim` is chosen among, as long as `k` indices are."""
    if not op["self"].shape:
        return
    for output in op.outputs:
        op.align_beside(op["self"], output, op["dim"])
        op.fix(output, op["dim"], "it counts the values picked")
    op.choose(op["self"], op["dim"], op.outputs[1], op["k"])


@rule("aten.msort")
def sorted_rows(op: Op) -> None:
    op.align_elementwise([op.inputs[0], op.output])
    if op.output.shape:
        op.fix(op.output, 0, "the order of its indices matters")


@rule("aten.quantile", "aten.nanquantile")
def quantile(op: Op) -> None:
    """Several quantiles make a further, first dim."""
    source, wanted = op["self"], op["q"]
    reduced = _given_dims(op, "dim")
    first = len(wanted.shape) if isinstance(wanted, Value) else 0
    kept = [d for d in range(len(source.shape)) if d not in reduced]
    for place, d in enumerate(kept):
        op.relations.align(source.dim(d), op.output.dim(first + (d if op["keepdim"] else place)))
    for d in reduced:
        op.relations.mix(source.dim(d), "a quantile is taken over it")
    if first:
        op.relations.align(wanted.dim(0), op.output.dim(0))


@rule("aten.renorm")
def renorm(op: Op) -> None:
    """Each slice along `dim` is scaled by its own norm."""
    source = op["self"]
    op.align_elementwise([source, op.output])
    for d in range(len(source.shape)):
        if d != op["dim"] % len(source.shape):
            op.relations.mix(source.dim(d), "a norm is taken over it")


@rule("aten.trapezoid", "aten.trapz", "aten.cumulative_trapezoid")
def trapezoid(op: Op) -> None:
    """Neighbours along `dim` are added up, which goes unless it is cumulative."""
    source = op["y"]
    rank = len(source.shape)
    along = op["dim"] % rank
    shift = len(op.output.shape) == rank
    for d in range(rank):
        if d != along:
            op.relations.align(source.dim(d), op.output.dim(d if shift or d < along else d - 1))
    fixed = [(source, along)] + [(op.output, along)] * shift
    if op.get("x") is not None:
        op.align_elementwise([op["x"], source] if len(op["x"].shape) > 1 else [op["x"]])
        fixed.append((op["x"], along if len(op["x"].shape) > 1 else 0))
    for value, d in fixed:
        op.fix(value, d, "neighbouring indices are added up")


@rule("aten.gradient")
def gradient(op: Op) -> None:
    for output in op.outputs:
        op.align_elementwise([op["self"], output])
    for value in op.inputs[1:]:
        for dim in value.dims:
            op.relations.fix(dim, op.reason("it says how far neighbours are apart"))
    for d in _given_dims(op, "dim"):
        op.fix(op["self"], d, "neighbouring indices are subtracted")


@rule("aten.segment_reduce")
def segment_reduce(op: Op) -> None:
    """Runs of rows are reduced, each to one."""
    op.align_beside(op["data"], op.output, 0)
    for value in (op["data"], op.output):
        op.fix(value, 0, "runs of its indices are reduced")
    for value in op.inputs[1:]:
        for dim in value.dims:
            op.relations.fix(dim, op.reason("it says which rows are reduced together"))


@rule("aten.pdist", "aten._pdist_forward")
def pairs_within(op: Op) -> None:
    """The distances of all pairs of rows: zeros in both add nothing."""
    op.relate("n! c -> p!")
    op.contract(op.inputs[0], 1)


@rule("aten.diff")
def difference(op: Op) -> None:
    for value in op.inputs:
        op.align_beside(value, op.output, op["dim"])
        op.fix(value, op["dim"], "neighbouring indices are subtracted")
    op.fix(op.output, op["dim"], "neighbouring indices are subtracted")
