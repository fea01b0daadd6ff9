"""torchvision's operators in plain torch, defined where the package itself isn't installed: samples of its rules are tried on them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_CROPS = "Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width"
_STEPS = "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w"
_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align": f"({_CROPS}, int sampling_ratio, bool aligned) -> Tensor",
    "roi_pool": f"({_CROPS}) -> (Tensor, Tensor)",
    "ps_roi_align": f"({_CROPS}, int sampling_ratio) -> (Tensor, Tensor)",
    "ps_roi_pool": f"({_CROPS}) -> (Tensor, Tensor)",
    "deform_conv2d": f"(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, {_STEPS}, SymInt groups, "
    "SymInt offset_groups, bool use_mask) -> Tensor",
}
_held: list[torch.library.Library] = []


def sampled(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """`image` [channels, h, w] at places [...], bilinear, zeros outside: [channels, ...]."""
    h, w = image.shape[-2:]
    grid = torch.stack([(2 * x + 1) / w - 1, (2 * y + 1) / h - 1], -1).reshape(1, 1, -1, 2)
    return F.grid_sample(image[None], grid.to(image.dtype), align_corners=False)[0, :, 0].unflatten(1, y.shape)


def nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """The boxes that no box of a higher score covers."""
    lower, upper = (
        torch.maximum(dets[:, None, :2], dets[None, :, :2]),
        torch.minimum(dets[:, None, 2:], dets[None, :, 2:]),
    )
    shared = (upper - lower).clamp(min=0).prod(-1)
    area = (dets[:, 2:] - dets[:, :2]).prod(-1)
    covers = shared / (area[:, None] + area[None] - shared) > iou_threshold
    kept: list[int] = []
    for k in scores.argsort(descending=True, stable=True).tolist():
        if not any(covers[k, j] for j in kept):
            kept.append(k)
    return torch.tensor(kept, dtype=torch.int64)


def roi_align(x: Tensor, rois: Tensor, scale: float, high: int, wide: int, _ratio: int, aligned: bool) -> Tensor:
    """One sample in the middle of each bin."""
    found = []
    for number, left, top, right, bottom in (rois * torch.tensor([1, scale, scale, scale, scale])).tolist():
        shift = 0.5 if aligned else 0.0
        ys = top - shift + (bottom - top) / high * (torch.arange(high, dtype=x.dtype) + 0.5)
        xs = left - shift + (right - left) / wide * (torch.arange(wide, dtype=x.dtype) + 0.5)
        found.append(sampled(x[int(number)], *torch.meshgrid(ys, xs, indexing="ij")))
    return torch.stack(found)


def roi_pool(x: Tensor, rois: Tensor, scale: float, high: int, wide: int) -> tuple[Tensor, Tensor]:
    """The largest of each bin of a crop, and where in the crop it is."""
    made = []
    for number, *box in rois.tolist():
        left, top, right, bottom = (int(edge * scale) for edge in box)
        crop = x[int(number), :, top : bottom + 1, left : right + 1]
        made.append(F.adaptive_max_pool2d(crop, [high, wide], return_indices=True))
    return torch.stack([m for m, _ in made]), torch.stack([at for _, at in made]).int()


def ps_roi_align(x: Tensor, rois: Tensor, scale: float, high: int, wide: int, ratio: int) -> tuple[Tensor, Tensor]:
    """Each place of the result from channels of its own, and which."""
    parts = roi_align(x, rois, scale, high, wide, ratio, True).unflatten(1, (-1, high, wide))
    made = parts.diagonal(0, 2, 4).diagonal(0, 2, 3).contiguous()
    numbers = torch.arange(x.shape[1], dtype=torch.int32).unflatten(0, (-1, high, wide))
    return made, numbers.expand(made.shape).contiguous()


def ps_roi_pool(x: Tensor, rois: Tensor, scale: float, high: int, wide: int) -> tuple[Tensor, Tensor]:
    """The same, where here nothing tells a mean from a sample."""
    return ps_roi_align(x, rois, scale, high, wide, 1)


def deform_conv2d(x: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor, *numbers: int) -> Tensor:
    """A convolution of which each tap reads where its offset says; a step, an edge and a dilation for each direction."""
    steps, edges, wide, (groups, offset_groups, use_mask) = numbers[:2], numbers[2:4], numbers[4:6], numbers[6:]
    n, (kh, kw), (oh, ow) = len(x), weight.shape[2:], offset.shape[2:]
    assert len(mask) == n, "invalid batch size of mask"
    moves = offset.reshape(n, offset_groups, kh * kw, 2, oh, ow)
    shares = (
        mask.reshape(n, offset_groups, kh * kw, oh, ow)
        if use_mask
        else torch.ones(1, dtype=x.dtype).expand(moves[:, :, :, 0].shape)
    )
    runs = x.unflatten(1, (offset_groups, -1))
    read = []
    for sample in range(n):
        for run in range(offset_groups):
            for tap in range(kh * kw):
                y = torch.arange(oh)[:, None] * steps[0] - edges[0] + tap // kw * wide[0] + moves[sample, run, tap, 0]
                z = torch.arange(ow)[None] * steps[1] - edges[1] + tap % kw * wide[1] + moves[sample, run, tap, 1]
                read.append(sampled(runs[sample, run], y, z) * shares[sample, run, tap])
    columns = (
        torch.stack(read).unflatten(0, (n, offset_groups, kh * kw)).transpose(2, 3).flatten(1, 2)
    )  # [n, c, taps, oh, ow]
    made = torch.einsum(
        "ngitxy,goit->ngoxy", columns.unflatten(1, (groups, -1)), weight.flatten(2).unflatten(0, (groups, -1))
    )
    return made.flatten(1, 2) + bias[None, :, None, None]


def _shape_of_roi_align(x: Tensor, rois: Tensor, _scale: float, high: int, wide: int, *_more: object) -> Tensor:
    return x.new_empty(rois.shape[0], x.shape[1], high, wide)


def _shape_of_ps_roi_align(
    x: Tensor, rois: Tensor, _scale: float, high: int, wide: int, *_more: object
) -> tuple[Tensor, Tensor]:
    made = x.new_empty(rois.shape[0], x.shape[1] // (high * wide), high, wide)
    return made, made.to(torch.int32)


def _shape_of_deform_conv2d(x: Tensor, weight: Tensor, offset: Tensor, *_more: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], *offset.shape[2:])


def define() -> None:
    """Give torch the operators, once, unless the package is there and does."""
    if _held:
        return
    try:
        import torchvision  # noqa: F401
    except Exception:  # not installed, or not for this torch
        _define()


def _define() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    _held.append(library)
    for name, schema in _SCHEMAS.items():
        library.define(f"{name}{schema}")
        library.impl(name, globals()[name], "CPU")
    for shape in (_shape_of_roi_align, _shape_of_ps_roi_align, _shape_of_deform_conv2d):
        torch.library.register_fake(f"torchvision::{shape.__name__.removeprefix('_shape_of_')}", shape, lib=library)
