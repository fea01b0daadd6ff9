"""Samples of torchvision's operators."""

from __future__ import annotations

from typing import Any

from tests.rules.sample import Sample, boxes, pos, share, t
from tests.rules.torchvision_operators import define

define()
_STEP, _SPACE = (1, 1, 1, 1, 1, 1), "input.2 input.3"
_WINDOWS = f"{_SPACE} weight.2 weight.3 offset.1 offset.2 offset.3"


def _sample(name: str, *args: Any, fixed: str, tied: str = "", poison: float = float("nan")) -> Sample:
    return Sample(f"torchvision.{name}", args, fixed=fixed, tied=tied, poison=poison)


SAMPLES = [
    _sample("nms", t(4, 4), t(4), 0.5, fixed="*"),
    _sample("roi_align", t(2, 3, 8, 8), boxes(3), 1.0, 2, 3, 1, True, fixed=f"input.0 {_SPACE} rois.0 rois.1 out.0 out.2 out.3"),
    _sample("roi_pool", t(2, 3, 8, 8), boxes(3), 1.0, 2, 3,
            fixed=f"input.0 {_SPACE} rois.0 rois.1 out0.0 out0.2 out0.3 out1.0 out1.2 out1.3"),
    *(_sample(name, t(2, 18, 8, 8), boxes(3), 1.0, 2, 3, *more,
              fixed="*")  # as the numbers of channels are read
      for name, more in {"ps_roi_align": (1,), "ps_roi_pool": ()}.items()),
    _sample("deform_conv2d", t(2, 3, 6, 6), t(4, 3, 3, 3), share(2, 18, 6, 6), share(2, 9, 6, 6), t(4), *_STEP, 1, 1, True,
            fixed=f"{_WINDOWS} mask.1 mask.2 mask.3 out.2 out.3", poison=9.0),
    _sample("deform_conv2d", t(2, 4, 6, 6), t(6, 2, 3, 3), share(2, 36, 6, 6), pos(2, 1), t(6), *_STEP, 2, 2, False,
            fixed=f"{_WINDOWS} out.2 out.3", tied="input.1:2 weight.0:3 bias.0:3 out.1:3", poison=9.0),
    _sample("deform_conv2d", t(2, 4, 6, 6), t(6, 2, 3, 3), share(2, 18, 6, 6), pos(2, 1), t(6), *_STEP, 2, 1, False,
            fixed=f"{_WINDOWS} out.2 out.3", poison=9.0),
    _sample("deform_conv2d", t(2, 6, 6, 6), t(6, 1, 3, 3), share(2, 18, 6, 6), pos(2, 1), t(6), *_STEP, 6, 1, False,
            fixed=f"{_WINDOWS} out.2 out.3", poison=9.0),
]  # fmt: skip
