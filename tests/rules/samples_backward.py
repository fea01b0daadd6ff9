"""Samples of gradients that a forward takes itself."""

from __future__ import annotations

import torch

from tests.rules.sample import ints, pos, sample, share, t

_FIRST = [True, False, False]
_SPACE = "grad_output.2 grad_output.3 self.2 self.3 out.2 out.3"


def _conv(
    grad: tuple[int, ...], x: tuple[int, ...], w: tuple[int, ...], groups: int, mask: list[bool]
) -> tuple[object, ...]:
    return t(*grad), t(*x), t(*w), [w[0]], [1], [0], [1], False, [0], groups, mask


_DEEP = "grad_output.2 grad_output.3 grad_output.4 self.2 self.3 self.4 out.2 out.3 out.4"
_RESIZED = [("nearest1d", 1, []), ("nearest3d", 3, []), ("linear1d", 1, [False]), ("bilinear2d", 2, [False]),
            ("bicubic2d", 2, [False]), ("trilinear3d", 3, [False])]  # fmt: skip
SAMPLES = [
    sample("_softmax_backward_data", t(3, 4), share(3, 4), -1, torch.float64, mixed="grad_output.1 output.1 out.1"),
    sample("_log_softmax_backward_data", t(3, 4), t(3, 4), 0, torch.float64,
           mixed="grad_output.0 output.0 out.0"),
    sample("native_layer_norm_backward", t(2, 3, 4), t(2, 3, 4), [4], t(2, 3, 1), pos(2, 3, 1), t(4), t(4), _FIRST,
           mixed="grad_out.2 input.2 weight.0 bias.0 out0.2"),
    sample("native_group_norm_backward", t(2, 6, 5), t(2, 6, 5), t(2, 3), pos(2, 3), t(6), 2, 6, 5, 3, _FIRST,
           mixed="grad_out.1 grad_out.2 input.1 input.2 weight.0 out0.1 out0.2",
           cut=lambda shape: {"N": shape("input")[0], "C": shape("input")[1], "HxW": shape("input")[2],
                              "group": shape("mean")[1]}),
    sample("native_batch_norm_backward", t(2, 4, 3), t(2, 4, 3), t(4), t(4), pos(4), t(0), t(0), False, 1e-5, _FIRST),
    sample("native_batch_norm_backward", t(2, 4, 3), t(2, 4, 3), t(4), t(4), pos(4), t(4), pos(4), True, 1e-5, _FIRST,
           mixed="grad_out.0 grad_out.2 input.0 input.2 out0.0 out0.2"),
    sample("convolution_backward", *_conv((2, 6, 5), (2, 4, 7), (6, 4, 3), 1, _FIRST),
           fixed="grad_output.2 input.2 weight.2 out0.2"),
    sample("convolution_backward", *_conv((2, 6, 5), (2, 4, 7), (6, 2, 3), 2, _FIRST),
           fixed="grad_output.2 input.2 weight.2 out0.2"),
    sample("convolution_backward", *_conv((2, 6, 7), (2, 4, 7), (6, 4, 1), 1, _FIRST)),
    sample("avg_pool3d_backward", t(1, 3, 1, 2, 2), t(1, 3, 2, 4, 4), [2] * 3, [2] * 3, [0] * 3, False, True, None,
           fixed="grad_output.3 grad_output.4 self.2 self.3 self.4 out.2 out.3 out.4"),
    sample("avg_pool2d_backward", t(2, 3, 2, 2), t(2, 3, 4, 4), [2, 2], [2, 2], [0, 0], False, True, None, fixed=_SPACE),
    sample("_adaptive_avg_pool2d_backward", t(2, 3, 2, 2), t(2, 3, 4, 4), fixed=_SPACE),
    sample("max_pool2d_with_indices_backward", t(2, 3, 2, 2), t(2, 3, 4, 4), [2, 2], [2, 2], [0, 0], [1, 1], False,
           ints(16, 2, 3, 2, 2), fixed="grad_output.2 grad_output.3 self.2 self.3 indices.2 indices.3 out.2 out.3"),
    sample("upsample_nearest2d_backward", t(2, 3, 4, 4), [4, 4], [2, 3, 2, 2],
           fixed="grad_output.2 grad_output.3 out.2 out.3"),
    *(sample(f"upsample_{name}_backward", t(2, 3, *[4] * rank), [4] * rank, [2, 3, *[2] * rank], *more,
             fixed=" ".join(f"{of}.{d + 2}" for of in ("grad_output", "out") for d in range(rank)))
      for name, rank, more in _RESIZED),
    sample("_adaptive_avg_pool3d_backward", t(1, 3, 2, 2, 2), t(1, 3, 4, 4, 4), fixed=_DEEP),
    sample("max_pool3d_with_indices_backward", t(1, 3, 1, 2, 2), t(1, 3, 2, 4, 4), [2] * 3, [2] * 3, [0] * 3, [1] * 3,
           False, ints(32, 1, 3, 1, 2, 2),
           fixed="grad_output.3 grad_output.4 self.2 self.3 self.4 indices.3 indices.4 out.2 out.3 out.4"),
    sample("slice_backward", t(2, 3, 4), [2, 3, 6], 2, 1, 5, 1, fixed="grad_output.2 out.2"),
    sample("select_backward", t(2, 4), [2, 3, 4], 1, 2, fixed="out.1"),
]  # fmt: skip
