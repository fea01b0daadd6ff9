"""Operators that keep every element in its place. Those tagged `pointwise` in ATen come here without being named."""

from __future__ import annotations

from depgraph.graph import Value
from depgraph.rules.registry import Op, aten, rule

_SAME_PLACE = aten("""
    alias bernoulli clone contiguous copy copy_ cpu detach dropout empty_like feature_dropout alpha_dropout
    feature_alpha_dropout fill full_like lift lift_fresh lift_fresh_copy masked_fill native_dropout normal_ uniform_
    exponential_ log_normal_ cauchy_ geometric_ random_ ones_like rand_like
    randn_like randint_like zeros_like zero zero_ resolve_conj resolve_neg where
    broadcast_tensors rrelu nan_to_num to type_as _to_copy
    absolute arccos arccosh arcsin arcsinh arctan arctan2 arctanh clip divide fix floor_divide gelu greater
    greater_equal hardswish less less_equal log_sigmoid multiply negative not_equal relu6 rsub subtract true_divide
    eq ne lt le gt ge __and__ __or__ __xor__ __lshift__ __rshift__ __iand__ __ior__ __ixor__
    complex polar real imag angle conj _conj _neg_view isclose isreal
    special_erf special_exp2 special_expit special_expm1 special_log1p special_ndtr special_round
    special_polygamma special_sinc special_xlogy
    elu_backward gelu_backward hardsigmoid_backward hardswish_backward hardtanh_backward leaky_relu_backward
    logit_backward mish_backward sigmoid_backward silu_backward softplus_backward tanh_backward threshold_backward
""")


_KEEPS_CONSTANT = frozenset(
    ["aten.bitwise_not.default", "aten.logical_not.default", "aten.alias.default", "aten.detach.default"]
    + [f"aten.to.{overload}" for overload in ("dtype", "device", "dtype_layout", "other")]
)


@rule(*_SAME_PLACE)
def elementwise(op: Op) -> None:
    """Aligned from the right, with broadcasting; an operand that only lends its dtype is left out."""
    inputs = op.inputs[:1] if op.target in ("aten.type_as.default", "aten.to.other") else op.inputs
    for output in op.outputs:
        op.align_elementwise([*inputs, output])
    if len(inputs) == 1 and op.target in _KEEPS_CONSTANT:
        pairs = zip(inputs[0].dims, op.output.dims, strict=True)
        op.relations.constant.update(b for a, b in pairs if a in op.relations.constant)


@rule("aten.prelu", "aten._prelu_kernel")
def prelu(op: Op) -> None:
    source, weight = op.inputs
    if weight.shape and weight.shape[0] > 1 and op.target.startswith("aten.prelu"):
        op.relate("n c ..., c -> n c ...")
    else:
        op.align_elementwise([source, weight, op.output] if "kernel" in op.target else [source, op.output])


@rule("aten.fake_quantize_per_tensor_affine", "aten.fake_quantize_per_channel_affine")
def fake_quantize(op: Op) -> None:
    """Rounded in its place; each channel may have its own scale."""
    source = op["self"]
    op.align_elementwise([source, op.output])
    for value in op.inputs[1:] if "axis" in op.arguments else ():
        op.relations.align(value.dim(0), source.dim(op["axis"]))


@rule("aten.fused_moving_avg_obs_fake_quant", "aten._fused_moving_avg_obs_fq_helper")
def observed_fake_quantize(op: Op) -> None:
    """As `fake_quantize`, with the scale of the extremes that were seen: of each row, or of all."""
    source = op["self"]
    for made in op.outputs:
        op.align_elementwise([source, made])
    if op["per_row_fake_quant"]:
        for name in ("running_min", "running_max", "scale", "zero_point"):
            if op[name].shape:
                op.relations.align(op[name].dim(0), source.dim(op["ch_axis"]))
    for d in range(len(source.shape)):
        if not op["per_row_fake_quant"] or d != op["ch_axis"] % len(source.shape):
            op.relations.mix(source.dim(d), "its scale is that of the extremes along it")


@rule("aten.glu")
def glu(op: Op) -> None:
    """The first half of `dim` times the sigmoid of its second half: [half, size] in one."""
    source, along = op["self"], op["dim"] % len(op.output.shape)
    half = op.relations.new_dim(2)
    op.relations.fix(half, op.reason("one half of the dim gates the other"))
    for d in range(len(source.shape)):
        if d == along:
            op.relations.fold(source.dim(d), [half, op.output.dim(d)])
        else:
            op.relations.align(source.dim(d), op.output.dim(d))


_LOSSES = aten("""
    l1_loss mse_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div
    soft_margin_loss hinge_embedding_loss margin_ranking_loss poisson_nll_loss
""")


@rule(*_LOSSES)
def loss(op: Op) -> None:
    """Elementwise, then the mean or the sum over everything (unless reduction is 0)."""
    if op["reduction"] == 0:
        elementwise(op)
        return
    broadcast_and_mix(op, op.inputs)


@rule("aten.dist")
def distance(op: Op) -> None:
    broadcast_and_mix(op, op.inputs)


@rule("aten.triplet_margin_loss")
def triplet_loss(op: Op) -> None:
    """Distances over the last dim, then the mean or the sum of what is left (unless reduction is 0)."""
    broadcast_and_mix(op, op.inputs)
    if op["reduction"] == 0:
        single = [value.dims[:-1] for value in op.inputs]
        for dim in (*op.output.dims, *(d for dims in single for d in dims)):
            op.relations.fix(dim, op.reason("there is a loss for each of its indices"))


def broadcast_and_mix(op: Op, values: list[Value]) -> None:
    """All dims of tensors that broadcast with each other go into one number."""
    for k, value in enumerate(values):
        for other in values[k + 1 :]:
            op.align_elementwise([value, other])
        for dim in value.dims:
            op.relations.mix(dim, f"{op.target.split('.')[1]} is taken over it")


@rule(*aten("cross_entropy_loss nll_loss nll_loss_nd nll_loss2d nll_loss_forward nll_loss2d_forward ctc_loss"))
def classification_loss(op: Op) -> None:
    op.fix_all("a loss over classes counts them")


_ALIKE = aten("""
    empty empty_strided empty_permuted full ones zeros rand randn randint scalar_tensor
    new_empty new_empty_strided new_full new_ones new_zeros
""")
_WITHOUT_RESULT = aten("""
    _assert_tensor_metadata _assert_async _assert_scalar _local_scalar_dense item is_nonzero equal allclose is_same_size
    result_type size sym_size sym_numel sym_stride sym_storage_offset sym_constrain_range sym_constrain_range_for_size
    is_floating_point is_complex
""")


@rule(*_ALIKE, *_WITHOUT_RESULT)
def free(op: Op) -> None:
    """The result is alike at every index (or has no dims): its dims depend on nothing."""


_COUNTED = aten("""
    arange range eye linspace logspace tril_indices triu_indices randperm vander
    bartlett_window blackman_window hamming_window hann_window kaiser_window fft_fftfreq fft_rfftfreq
""")


@rule(*_COUNTED)
def counting(op: Op) -> None:
    op.fix_all("its values are counted from the dimension's size")


@rule("aten.tril", "aten.triu")
def triangle(op: Op) -> None:
    elementwise(op)
    op.fix(op.output, -1, "the triangle is laid along it")
    op.fix(op.output, -2, "the triangle is laid along it")
