"""Samples of operators over space."""

from __future__ import annotations

from tests.rules.sample import cplx, ints, pos, sample, share, t

SAMPLES = [
    *(sample(name, t(2, 3, 8), *args, fixed="self.2 out.2") for name, args in {
        "max_pool1d": ([2],), "avg_pool1d": ([2],), "adaptive_avg_pool1d": ([4],), "upsample_nearest1d": ([16],),
        "upsample_linear1d": ([16], False), "_upsample_nearest_exact1d": ([16],)}.items()),
    *(sample(name, t(2, 3, 4, 4), *args, fixed="self.2 self.3 out.2 out.3") for name, args in {
        "max_pool2d": ([2],), "avg_pool2d": ([2],), "adaptive_avg_pool2d": ([2, 2],), "_adaptive_avg_pool2d": ([2, 2],),
        "upsample_nearest2d": ([8, 8],), "upsample_bilinear2d": ([8, 8], False), "upsample_bicubic2d": ([8, 8], False),
        "_upsample_bilinear2d_aa": ([8, 8], False), "_upsample_bicubic2d_aa": ([8, 8], False),
        "_upsample_nearest_exact2d": ([8, 8],)}.items()),
    *(sample(name, t(2, 3, 4, 4), *args, fixed="input.2 input.3 out.2 out.3") for name, args in {
        "upsample_nearest2d.vec": (None, [2.0, 2.0]), "upsample_bilinear2d.vec": ([8, 8], False, None),
        "upsample_bicubic2d.vec": ([8, 8], True, None)}.items()),
    *(sample(name, t(2, 3, 4, 4, 4), *args, fixed="self.2 self.3 self.4 out.2 out.3 out.4") for name, args in {
        "max_pool3d": ([2],), "avg_pool3d": ([2],), "adaptive_avg_pool3d": ([2, 2, 2],),
        "_adaptive_avg_pool3d": ([2, 2, 2],), "upsample_nearest3d": ([8, 8, 8],),
        "upsample_trilinear3d": ([8, 8, 8], False),
        "_upsample_nearest_exact3d": ([8, 8, 8],)}.items()),
    sample("max_pool2d", t(3, 4, 4), [2], fixed="self.1 self.2 out.1 out.2"),
    sample("max_pool1d_with_indices", t(2, 3, 8), [2], fixed="self.2 out0.2 out1.2"),
    sample("max_pool2d_with_indices", t(2, 3, 4, 4), [2], fixed="self.2 self.3 out0.2 out0.3 out1.2 out1.3"),
    sample("max_pool3d_with_indices", t(3, 4, 4, 4), [2],
           fixed="self.1 self.2 self.3 out0.1 out0.2 out0.3 out1.1 out1.2 out1.3"),
    sample("adaptive_max_pool1d", t(2, 3, 8), [4], fixed="self.2 out0.2 out1.2"),
    sample("adaptive_max_pool2d", t(2, 3, 4, 4), [2, 2], fixed="self.2 self.3 out0.2 out0.3 out1.2 out1.3"),
    sample("adaptive_max_pool3d", t(3, 4, 4, 4), [2, 2, 2],
           fixed="self.1 self.2 self.3 out0.1 out0.2 out0.3 out1.1 out1.2 out1.3"),
    sample("max_unpool2d", t(3, 2, 2), ints(16, 3, 2, 2), [4, 4],
           fixed="self.1 self.2 indices.1 indices.2 out.1 out.2"),
    sample("max_unpool3d", t(3, 2, 2, 2), ints(64, 3, 2, 2, 2), [4, 4, 4], [2, 2, 2], [0, 0, 0],
           fixed="self.1 self.2 self.3 indices.1 indices.2 indices.3 out.1 out.2 out.3"),
    *(sample(name, t(2, 3, 4, 4), t(2, 5, 5, 2), 0, 0, False,
             fixed="input.2 input.3 grid.1 grid.2 grid.3 out.2 out.3") for name in ("grid_sampler", "grid_sampler_2d")),
    sample("grid_sampler_3d", t(2, 3, 2, 4, 4), t(2, 3, 5, 5, 3), 0, 0, False,
           fixed="input.2 input.3 input.4 grid.1 grid.2 grid.3 grid.4 out.2 out.3 out.4"),
    sample("pixel_shuffle", t(2, 12, 3, 3), 2, fixed="self.2 self.3 out.2 out.3", tied="self.1:3"),
    sample("pixel_shuffle", t(12, 3, 3), 2, fixed="self.1 self.2 out.1 out.2", tied="self.0:3"),
    sample("pixel_unshuffle", t(2, 3, 4, 4), 2, fixed="self.2 self.3 out.2 out.3", tied="out.1:3"),
    sample("fractional_max_pool2d", t(2, 3, 6, 6), [2, 2], [3, 3], share(2, 3, 2),
           fixed="self.2 self.3 random_samples.2 out0.2 out0.3 out1.2 out1.3"),
    sample("fractional_max_pool3d", t(3, 6, 6, 6), [2, 2, 2], [3, 3, 3], share(1, 3, 3),
           fixed="self.1 self.2 self.3 random_samples.2 out0.1 out0.2 out0.3 out1.1 out1.2 out1.3"),
    sample("affine_grid_generator", t(2, 2, 3), [2, 3, 4, 4], False, fixed="theta.1 theta.2 out.1 out.2 out.3",
           cut=lambda shape: {"size": [shape("theta")[0], 3, 4, 4]}),
    sample("affine_grid_generator", t(2, 3, 4), [2, 3, 4, 4, 4], False,
           fixed="theta.1 theta.2 out.1 out.2 out.3 out.4",
           cut=lambda shape: {"size": [shape("theta")[0], 3, 4, 4, 4]}),
    sample("stft", t(2, 12), 4, 2, 4, pos(4), return_complex=True, fixed="self.1 window.0 out.1 out.2"),
    sample("stft", t(12), 4, 2, 4, pos(4), return_complex=True, fixed="*"),
    sample("istft", cplx(2, 3, 5), 4, 2, 4, pos(4), fixed="self.1 self.2 window.0 out.1"),
]  # fmt: skip
