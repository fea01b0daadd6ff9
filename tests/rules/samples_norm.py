"""Samples of normalisations."""

from __future__ import annotations

from tests.rules.sample import pos, sample, t

_STORED = (t(4), t(4), t(4), pos(4))


def _last(*names: str, rank: int = 3) -> str:
    return " ".join(f"{name}.{rank - 1}" for name in names)


SAMPLES = [
    sample("batch_norm", t(2, 4, 3), *_STORED, False, 0.1, 1e-5, False),
    sample("batch_norm", t(2, 4), None, None, t(4), pos(4), False, 0.1, 1e-5, False),
    sample("batch_norm", t(2, 4, 3), *_STORED, True, 0.1, 1e-5, False, mixed="input.0 input.2 out.0 out.2"),
    sample("native_batch_norm", t(2, 4, 3), *_STORED, False, 0.1, 1e-5),
    sample("native_batch_norm", t(2, 4, 3), *_STORED, True, 0.1, 1e-5, mixed="input.0 input.2 out0.0 out0.2"),
    sample("_native_batch_norm_legit", t(2, 4, 3), *_STORED, False, 0.1, 1e-5),
    sample("_native_batch_norm_legit.no_stats", t(2, 4, 3), t(4), t(4), True, 0.1, 1e-5,
           mixed="input.0 input.2 out0.0 out0.2"),
    sample("_native_batch_norm_legit_functional", t(2, 4, 3), *_STORED, False, 0.1, 1e-5),
    sample("_native_batch_norm_legit_no_training", t(2, 4, 3), *_STORED, 0.1, 1e-5),
    sample("instance_norm", t(2, 4, 5), t(4), t(4), None, None, True, 0.1, 1e-5, False, mixed="input.2 out.2"),
    sample("instance_norm", t(2, 4, 5), *_STORED, False, 0.1, 1e-5, False),
    sample("group_norm", t(2, 6, 5), 3, t(6), t(6), mixed="input.1 input.2 weight.0 bias.0 out.1 out.2"),
    sample("group_norm", t(2, 6, 5), 3, mixed="input.1 input.2 out.1 out.2"),
    sample("group_norm", t(2, 6, 5), 1, t(6), t(6), mixed="input.1 input.2 weight.0 bias.0 out.1 out.2"),
    sample("group_norm", t(2, 6, 5), 6, t(6), t(6), mixed="input.2 out.2"),
    sample("group_norm", t(2, 6), 3, t(6), t(6), mixed="input.1 weight.0 bias.0 out.1"),
    sample("native_group_norm", t(2, 6, 5), t(6), t(6), 2, 6, 5, 3, 1e-5,
           mixed="input.1 input.2 weight.0 bias.0 out0.1 out0.2",
           cut=lambda shape: {"N": shape("input")[0], "C": shape("input")[1], "HxW": shape("input")[2],
                              "group": shape("out1")[1]}),
    sample("layer_norm", t(2, 3, 4), [4], t(4), t(4), mixed="input.2 weight.0 bias.0 out.2"),
    sample("layer_norm", t(2, 3, 4), [3, 4], t(3, 4), None, mixed="input.1 input.2 weight.0 weight.1 out.1 out.2"),
    sample("layer_norm", t(2, 3, 4), [4], mixed="input.2 out.2"),
    sample("native_layer_norm", t(2, 3, 4), [4], t(4), t(4), 1e-5, mixed="input.2 weight.0 bias.0 out0.2"),
    sample("rms_norm", t(2, 3, 4), [4], t(4), mixed="input.2 weight.0 out.2"),
    sample("rms_norm", t(2, 3, 4), [3, 4], mixed="input.1 input.2 out.1 out.2"),
    sample("_fused_rms_norm", t(2, 3, 4), [4], t(4), 1e-5, mixed="input.2 weight.0 out0.2"),
    sample("_weight_norm", t(5, 3, 4), t(5, 1, 1), 0, mixed="v.1 v.2 out.1 out.2"),
    sample("_weight_norm", t(5, 3, 4), t(1, 1, 4), 2, mixed="v.0 v.1 out.0 out.1"),
    sample("_weight_norm", t(5, 3), t(), -1, mixed="v.0 v.1 out.0 out.1"),
    sample("_weight_norm_interface", t(5, 3), t(5, 1), 0, mixed="v.1 out0.1"),
]  # fmt: skip
