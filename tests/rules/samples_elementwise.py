"""Samples of operators that keep every element in its place, of factories, and of losses."""

from __future__ import annotations

import torch

from tests.rules.sample import bools, cplx, ints, pos, sample, share, t, words

_ONE = words("""
    alias clone contiguous cpu detach fix lift lift_fresh lift_fresh_copy nan_to_num resolve_conj resolve_neg real angle
    conj isreal absolute arctan arcsinh gelu hardswish log_sigmoid negative relu6 zero special_erf special_exp2
    special_expit special_expm1 special_ndtr special_round special_sinc zeros_like zero_
""")  # fmt: skip
_SHARES = words("arccos arcsin arctanh special_log1p rsqrt sqrt_ logit")
_TWO = words("""
    arctan2 complex copy copy_ divide.Tensor eq.Tensor expand_as floor_divide greater.Tensor greater_equal.Tensor
    ge.Tensor gt.Tensor isclose le.Tensor less.Tensor less_equal.Tensor lt.Tensor multiply.Tensor ne.Tensor
    not_equal.Tensor polar rsub.Tensor subtract.Tensor true_divide.Tensor
""")  # fmt: skip
_BITS = words("__and__ __or__ __xor__ __lshift__ __rshift__ __iand__ __ior__ __ixor__")
_POINTWISE = words("relu relu_ sigmoid silu tanh exp neg cos hardtanh elu mish softplus sign ceil_ reciprocal")
_LOSSES = {
    "l1_loss": (t(3, 4), t(3, 4)),
    "mse_loss": (t(3, 4), t(3, 4)),
    "smooth_l1_loss": (t(3, 4), t(3, 4)),
    "huber_loss": (t(3, 4), t(3, 4)),
    "soft_margin_loss": (t(3, 4), t(3, 4)),
    "kl_div": (t(3, 4), pos(3, 4)),
}
_TRIPLET = words("anchor positive negative")
_RANDOM = "its values are drawn at random, so that nothing can be compared; its dims are those of `zeros_like`"

SAMPLES = [
    *(sample(name, t(3, 4)) for name in (*_ONE, *_POINTWISE)),
    sample("arccosh", pos(3, 4)),
    *(sample(name, share(3, 4)) for name in _SHARES),
    *(sample(name, t(2, 3, 4), t(2, 3, 4)) for name in _TWO),
    *(sample(f"{name}.Tensor", ints(4, 3, 4), ints(4, 3, 4)) for name in _BITS),
    sample("special_xlogy", t(3, 4), pos(3, 4)),
    sample("special_polygamma", 1, pos(3, 4)),
    sample("imag", cplx(3, 4)),
    sample("_conj", cplx(3, 4)),
    sample("_neg_view", t(3, 4)),
    # gradients that the forward itself asks for
    sample("elu_backward", t(3, 4), 1.0, 1.0, 1.0, False, t(3, 4)),
    sample("hardtanh_backward", t(3, 4), t(3, 4), -1.0, 1.0),
    sample("leaky_relu_backward", t(3, 4), t(3, 4), 0.1, False),
    sample("logit_backward", t(3, 4), share(3, 4)),
    sample("softplus_backward", t(3, 4), t(3, 4), 1.0, 20.0),
    sample("threshold_backward", t(3, 4), t(3, 4), 0.0),
    *(
        sample(f"{name}_backward", t(3, 4), t(3, 4))
        for name in ("gelu", "hardsigmoid", "hardswish", "mish", "sigmoid", "silu", "tanh")
    ),
    # broadcasting
    sample("add.Tensor", t(2, 3, 4), t(3, 1)),
    sample("add.Tensor", t(4), t(2, 3, 4)),
    sample("add_.Tensor", t(2, 3, 4), t(1, 4)),
    sample("mul.Tensor", t(2, 1, 4), t(3, 1)),
    sample("multiply.Tensor", t(2, 1, 4), t(3, 1)),
    sample("pow.Tensor_Scalar", t(3, 4), 2),
    sample("clamp", t(3, 4), 0.0),
    sample("clip", t(3, 4), 0.0),
    sample("addcmul", t(2, 3, 4), t(3, 1), t(4)),
    sample("addcdiv", t(3, 4), t(3, 4), pos(3, 4)),
    sample("lerp.Scalar", t(3, 4), t(3, 4), 0.3),
    sample("maximum", t(3, 4), t(4)),
    sample("le_.Scalar", t(3, 4), 0.0),
    sample("where.self", bools(2, 1, 4), t(3, 1), t(2, 3, 4)),
    sample("where.self", bools(3, 4), t(), t(4)),
    sample("where.ScalarOther", bools(3, 4), t(3, 4), 0.0),
    sample("masked_fill.Scalar", t(2, 3, 4), bools(3, 1), 0.0),
    sample("masked_fill_.Tensor", t(3, 4), bools(3, 4), t()),
    sample("fill.Scalar", t(3, 4), 2.0),
    sample("fill_.Tensor", t(3, 4), t()),
    sample("full_like", t(3, 4), 2.0),
    sample("ones_like", t(3, 4)),
    sample("expand_as", t(3, 1), t(2, 3, 4)),
    sample("broadcast_tensors", [t(3, 1), t(2, 1, 4)]),
    sample("type_as", t(3, 4), t(5, 6)),
    sample("to.other", t(3, 4), t(5)),
    sample("to.dtype", t(3, 4), torch.float64),
    sample("_to_copy", t(3, 4), dtype=torch.float64),
    sample("dropout", t(3, 4), 0.5, False),
    sample("dropout_", t(3, 4), 0.5, False),
    sample("native_dropout", t(3, 4), 0.5, False),
    sample("alpha_dropout", t(3, 4), 0.5, False),
    sample("feature_dropout", t(3, 4), 0.5, False),
    sample("feature_alpha_dropout", t(3, 4), 0.5, False),
    sample("rrelu", t(3, 4), 0.1, 0.2, False),
    sample("prelu", t(2, 3, 4), t(1)),
    sample("prelu", t(2, 3, 4), t(3)),
    sample("prelu", t(2, 3), t(3)),
    sample("_prelu_kernel", t(2, 3, 4), t(1, 3, 1)),
    sample("glu", t(2, 6), 1, tied="self.1:3"),
    sample("glu", t(6, 3), 0, tied="self.0:3"),
    sample("tril", t(2, 3, 4), fixed="self.1 self.2 out.1 out.2"),
    sample("triu", t(2, 3, 4), 1, fixed="self.1 self.2 out.1 out.2"),
    sample("tril_", t(3, 4), fixed="*"),
    # losses
    *(sample(name, *args, mixed="self.0 self.1 target.0 target.1") for name, args in _LOSSES.items()),
    sample("mse_loss", t(3, 4), t(3, 4), 0),
    sample("binary_cross_entropy", share(3, 4), share(3, 4), t(4), mixed="self.0 self.1 target.0 target.1 weight.0"),
    sample("binary_cross_entropy_with_logits", t(3, 4), pos(3, 4), t(4), None, 0),
    sample("binary_cross_entropy_with_logits", t(3, 4), pos(3, 4), None, t(4),
           mixed="self.0 self.1 target.0 target.1 pos_weight.0"),
    sample("hinge_embedding_loss", t(3, 4), t(3, 4), mixed="self.0 self.1 target.0 target.1"),
    sample("margin_ranking_loss", t(4), t(4), t(4), mixed="input1.0 input2.0 target.0"),
    sample("triplet_margin_loss", t(3, 4), t(3, 4), t(3, 4), mixed=" ".join(f"{n}.{d}" for n in _TRIPLET for d in (0, 1))),
    sample("triplet_margin_loss", t(3, 4), t(1, 4), t(3, 4), reduction=0,
           fixed="anchor.0 negative.0 out.0", mixed=" ".join(f"{n}.1" for n in _TRIPLET)),
    sample("poisson_nll_loss", t(3, 4), t(3, 4), True, False, 1e-8, 1, mixed="input.0 input.1 target.0 target.1"),
    sample("cross_entropy_loss", t(3, 4), ints(4, 3), fixed="*"),
    sample("nll_loss", t(3, 4), ints(4, 3), fixed="*"),
    sample("nll_loss_nd", t(3, 4), ints(4, 3), fixed="*"),
    sample("nll_loss2d", t(2, 4, 3, 3), ints(4, 2, 3, 3), fixed="*"),
    sample("nll_loss_forward", t(3, 4), ints(4, 3), None, 1, -100, fixed="*"),
    sample("nll_loss2d_forward", t(2, 4, 3, 3), ints(4, 2, 3, 3), None, 1, -100, fixed="*"),
    sample("ctc_loss.IntList", t(6, 1, 4), ints(3, 1, 2), [6], [2], fixed="*"),
    # factories: no dim of theirs depends on another
    sample("arange", 5, fixed="*"),
    sample("range", 0, 5, fixed="*"),
    sample("eye", 3, fixed="*"),
    sample("linspace", 0, 1, 5, fixed="*"),
    sample("logspace", 0, 1, 5, fixed="*"),
    sample("tril_indices", 3, 4, fixed="*"),
    sample("triu_indices", 3, 4, fixed="*"),
    sample("vander", t(3), fixed="*"),
    *(sample(f"{name}_window", 4, fixed="*") for name in ("bartlett", "blackman", "hamming", "hann", "kaiser")),
    sample("fft_fftfreq", 4, fixed="*"),
    sample("fft_rfftfreq", 4, fixed="*"),
    sample("zeros", [3, 4]),
    sample("ones", [3, 4]),
    sample("full", [3, 4], 2.0),
    sample("scalar_tensor", 2.0),
    sample("new_zeros", t(5), [3, 4]),
    sample("new_ones", t(5), [3, 4]),
    sample("new_full", t(5), [3, 4], 2.0),
    sample("fake_quantize_per_tensor_affine", t(3, 4), 0.1, 0, -128, 127),
]  # fmt: skip

UNSAMPLED = {
    "aten.fake_quantize_per_channel_affine": "its scales are of single precision only",
    "aten.fused_moving_avg_obs_fake_quant": "it takes single precision only; tests/test_operators.py cuts a model with it",
    "aten._fused_moving_avg_obs_fq_helper": "it takes single precision only",
    **{f"aten.{name}": _RANDOM for name in
       words("""bernoulli normal_ uniform_ exponential_ log_normal_ cauchy_ geometric_ random_ rand_like randn_like
       randint_like rand randn randint randperm""")},
    **{f"aten.{name}": "its values are whatever was in memory" for name in
       words("empty empty_like empty_strided empty_permuted new_empty new_empty_strided")},
    **{f"aten.{name}": "it has no tensor among its results" for name in
       words("""_assert_tensor_metadata _assert_async _assert_scalar _local_scalar_dense item is_nonzero equal allclose
       is_same_size result_type size sym_size sym_numel sym_stride sym_storage_offset sym_constrain_range
       sym_constrain_range_for_size is_floating_point is_complex""")},
}  # fmt: skip
