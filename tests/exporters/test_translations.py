"""Operators that torch's exporter doesn't translate, or not for all sizes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import exporters


class Layer(nn.Module):
    """One layer with weights before what is tested."""

    def __init__(self, rest: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.rest = nn.Linear(6, 8), rest

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.first(x))


def rotated(x: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))
    angles = torch.arange(4.0).outer(torch.tensor([0.1, 0.2, 0.3, 0.5]))
    turn = torch.polar(torch.ones_like(angles), angles)
    chosen = turn[torch.tensor([3, 1, 2])] * turn[0].unsqueeze(0).expand(3, 4)
    return torch.view_as_real(pairs[:, :, None] * chosen[None, :, None, :].unsqueeze(-2)[..., 0, :]).flatten(1)


def paired(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))


SPECTRAL = torch.complex(*torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)))


def spectral(x: Tensor) -> Tensor:
    waves = torch.fft.rfft(x, dim=-1)
    out = torch.zeros(x.shape[0], 4, waves.shape[-1], dtype=torch.cfloat)
    out[..., :4] = torch.einsum("bim,iom->bom", waves[:, :, :4], SPECTRAL[:, :, :4])
    out[:, -1] = torch.einsum("bim->bm", waves)
    more = waves.new_zeros(out.shape)
    more[:, 0] = waves[:, 1]
    ones = torch.zeros_like(waves, dtype=torch.float32) + 1
    return torch.fft.irfft(out + more + torch.zeros_like(waves)[:, :1], n=x.shape[-1]) + ones.sum()


def of_spectrum(x: Tensor) -> Tensor:
    """Windows of a signal from a spectrum, which torch puts together by indices of 32 bits."""
    spectrum = torch.fft.rfft(x.transpose(1, 2).reshape(x.shape[0], 8, -1), dim=1)
    return torch.istft(spectrum, 8, 4, window=torch.ones(8))


def padded_pairs(x: Tensor) -> Tensor:
    return torch.view_as_real(nn.functional.pad(paired(x), (1, 0, 0, 2)))


def complex_layers(x: Tensor) -> Tensor:
    z, weight = paired(x), SPECTRAL[0, :, :4]
    z = nn.functional.linear(z, weight.T @ weight, weight[0]) + nn.functional.linear(z, weight)[..., :1]
    z = torch.addmm(weight[1], z.flatten(0, 1), weight.mT @ weight).view(z.shape) + torch.tensordot(
        z, weight.T @ weight, 1
    )
    z = torch.baddbmm(z, z @ z.mH, z)
    return torch.view_as_real(z / torch.linalg.vector_norm(z, dim=-1, keepdim=True))


def complex_moves(x: Tensor) -> Tensor:
    z = paired(x)
    z = torch.where(z.abs() > 0.5, z, z.conj()).masked_fill(z.real < -1.0, 2 - 1j).cumsum(1)
    first, second = z.split(2, -1)
    z = torch.cat((first.repeat(1, 1, 2), second.index_select(-1, torch.tensor([1, 0])), torch.sgn(second)), -1)
    z = z.gather(-1, torch.tensor([5, 0, 2]).expand(*z.shape[:-1], 3)).tril() + z.unfold(-1, 3, 2).unbind(2)[1].triu()
    return torch.view_as_real(z)


def attended(x: Tensor) -> Tensor:
    """Without heads, with several dims before them, of one sequence."""
    attend = nn.functional.scaled_dot_product_attention
    split = x.unflatten(-1, (2, 2, 2))
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    own = x.mean(-1, keepdim=True) > x.mean(-1).unsqueeze(-2) - 9
    windows = split.permute(0, 2, 3, 1, 4)
    folded = attend(windows, windows, windows, attn_mask=causal) + attend(windows, windows, windows, own[:, None, None])
    return (
        attend(x, x, x, own)
        + attend(x, x, x, is_causal=True, scale=0.3)
        + attend(x[0], x[0], x[0])
        + folded.sum((1, 2, 4))[..., None]
    )


def clamped_twice(x: Tensor) -> Tensor:
    """By bounds in tensors, so that one tensor has several pairs of them."""
    return x.clamp(torch.tensor(-1.0), torch.tensor(0.5)) + x.clamp(torch.tensor(-0.3), torch.tensor(0.2)) * x


def masks_in_sums(x: Tensor) -> Tensor:
    known = x[..., 0] > 0
    pairs = torch.einsum("bi,bj->bij", known, known)
    return torch.einsum("bij,bjf->bijf", pairs, x) + torch.einsum("bi,bif->bif", known, x)[:, None]


def pooled(x: Tensor) -> Tensor:
    """To sizes that don't divide what comes in, where windows overlap; by place, too."""
    found, place = F.adaptive_max_pool2d(x[:, None], (2, 4), return_indices=True)
    mean = F.adaptive_avg_pool3d(x[:, None, None].expand(-1, 1, 3, -1, -1), 2)
    largest, among = F.adaptive_max_pool3d(x[:, None, None].expand(-1, 1, 3, -1, -1), 2, return_indices=True)
    return (found + place).mean(-1) + (mean + largest + among).sum((-1, -2))


CASES = {
    "pools of sizes that don't divide": pooled,
    "sums with masks": masks_in_sums,
    "aliases of complex numbers": lambda x: torch.view_as_real(torch.ops.aten.alias.default(paired(x)) * 2),
    "complex hyperbolic tangent": lambda x: torch.view_as_real((paired(x) * 3).tanh()),
    "layers of complex numbers": complex_layers,
    "moves of complex numbers": complex_moves,
    "attention of any dims": attended,
    "bounds in tensors": clamped_twice,
    "slopes drawn in training": nn.RReLU().eval(),
    "sums over complex products": spectral,
    "complex times a number": lambda x: torch.view_as_real(torch.ops.aten.mul.Scalar(paired(x), 2 - 3j)),
    "complex powers": lambda x: torch.view_as_real(paired(x).exp() ** 3 + paired(x) ** 1),
    "inverse short-time transform": of_spectrum,
    "pads of complex numbers": padded_pairs,
    "squeeze of a dim that isn't 1": lambda x: x.squeeze(1).squeeze(-1).squeeze((1, 2)),
    "squeeze of some dims of several": lambda x: x[:, None, :, None].squeeze((1, 2, 3)).unsqueeze(1).squeeze(1),
    "cumulative products": lambda x: (x.tanh() + 1.5).cumprod(-1),
    "sizes of determinants": lambda x: torch.linalg.slogdet(x.unfold(-1, 3, 1)[:, :, :3])[1],
    "distances": lambda x: sum(torch.cdist(x, x[:1] * 0.5, p) for p in (0.0, 1.0, 1.5, 2.0, float("inf"))),
    "inverse error function": lambda x: (
        (x.tanh() * 0.999).erfinv() + torch.tensor([1.0, -1.0, 0, 0.3]).erfinv()[2:].sum()
    ),
    "complex views": rotated,
    "all and any of truths": lambda x: (
        x * torch.ops.aten._is_all_true(x > -99.0) + torch.ops.aten._is_any_true(x > 99.0).to(x.dtype)
    ),
    "views by strides of dims in another order": lambda x: (
        x.transpose(1, 2).contiguous().transpose(1, 2).as_strided((2, 3, 3, 4), (24, 1, 6, 3))
    ),
    "views by strides in a captured program": lambda x: torch.ops.aten.as_strided.default(
        x.transpose(1, 2).contiguous().transpose(1, 2), (2, 3, 3, 4), (24, 1, 6, 3)
    ),
    "stable sort": lambda x: (
        (x > 0).int().sort(stable=True, dim=1).indices.argsort(dim=1, stable=True, descending=True)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_file_computes_the_same(name: str, tmp_path: Path) -> None:
    model = Layer(CASES[name])
    x = torch.randn(2, 3, 6)
    exporters.to_onnx(model, x, tmp_path / "model.onnx")
    other = torch.randn(4, 3, 6)
    given = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"x": other.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(given), model(other).detach(), rtol=1e-4, atol=1e-5)


def product(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    importlib.import_module("transformers.integrations.moe")
    result: Tensor = torch.ops.transformers.grouped_mm_fallback(x, weight, offs)
    return result


class Experts(nn.Module):
    """Each row goes through one of five experts, as a product over groups of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 16, 8))

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        order = experts.argsort()
        ends = (experts[:, None] == torch.arange(5)).sum(0).cumsum(0).int()
        return product(x[order], self.weight.transpose(1, 2), ends)[order.argsort()]


def test_grouped_products_follow_their_offsets(tmp_path: Path) -> None:
    model, path = Experts(), tmp_path / "experts.onnx"
    exporters.to_onnx(model, (torch.randn(9, 8), torch.randint(0, 5, (9,))), path)
    session = onnxruntime.InferenceSession(path)
    for chosen in ([0, 1, 2, 3, 4, 0, 3, 1, 1], [3] * 9, [4, 1, 1, 4, 4, 1, 0, 0, 0]):
        experts, x = torch.tensor(chosen), torch.randn(9, 8)
        given = session.run(None, {"x": x.numpy(), "experts": experts.numpy()})[0]
        wanted = torch.stack([model.weight[e] @ row for e, row in zip(chosen, x, strict=True)]).detach()
        torch.testing.assert_close(torch.from_numpy(given), wanted, rtol=1e-4, atol=1e-5)


def test_rows_past_the_last_group_are_zero(tmp_path: Path) -> None:
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8, 4))

        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return product(x, self.weight, ends)

    x, ends, path = torch.randn(6, 8), torch.tensor([2, 2, 5]), tmp_path / "ends.onnx"
    exporters.to_onnx(Ends(), (x, ends), path)
    for other in (ends, torch.tensor([0, 1, 1]), torch.tensor([0, 0, 0])):
        given = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy(), "ends": other.numpy()})[0]
        assert not given[int(other[-1]) :].any()
        assert given[: int(other[-1])].any() == bool(other[-1])


def padded(x: Tensor) -> Tensor:
    """Attention in which the first token looks at nothing, as padding on the left does under a causal mask."""
    heads = x.view(*x.shape[:-1], 2, 4).transpose(1, 2)
    looks = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() & (torch.arange(x.shape[1]) > 0)
    return nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=looks).transpose(1, 2)


@pytest.mark.parametrize("opset", [20, 23])
def test_queries_that_look_at_nothing_give_zeros(opset: int, tmp_path: Path) -> None:
    model, x = Layer(padded), torch.randn(2, 3, 6)
    assert not model(x)[:, 0].any()
    exporters.to_onnx(model, x, tmp_path / "model.onnx", options=exporters.OnnxOptions(opset=opset))
    given = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"x": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(given), model(x).detach(), rtol=1e-4, atol=1e-5)


def styled(x: Tensor) -> Tensor:
    rows, scale, shift = x[:, None, :4].expand(-1, 3, -1), x[:, :3].reshape(-1), x[:, 4:7].reshape(-1)
    mean, variance = torch.zeros(3).repeat(len(x)), torch.ones(3).repeat(len(x))
    joined = (rows * torch.arange(1.0, 4)[:, None]).reshape(1, -1, 4)
    return F.batch_norm(joined, mean, variance, scale, shift, training=True).view(len(x), 3, 4)


@pytest.mark.parametrize(
    "rest",
    [lambda x: torch.clamp(x, 0, 0.5), lambda x: x.clamp(-0.25, 1), lambda x: x.clip(max=1), styled],
    ids=["whole and not", "not and whole", "one bound", "statistics of the batch"],
)
def test_numbers_of_two_kinds_and_statistics_of_the_batch(rest: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, path = Layer(rest).eval(), torch.randn(3, 6), tmp_path / "m.onnx"
    exporters.to_onnx(model, x, path)
    given = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(given), model(x).detach(), rtol=1e-4, atol=1e-5)
