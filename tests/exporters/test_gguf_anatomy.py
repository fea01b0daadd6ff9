"""What a Llama-like model is made of is found by what its parts do; what isn't Llama's is refused by name."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
from depgraph.errors import ExportError
from exporters.gguf_anatomy import Attention, Decoder, Norm, decoder
from exporters.gguf_gaps import Gaps
from exporters.gguf_tensors import contents
from tests.exporters import pruned
from tests.exporters.pruned import IDS, LLAMA


def found(model: nn.Module) -> Decoder:
    with torch.no_grad():
        return decoder(Gaps(depgraph.trace(model.eval(), IDS)))


def test_every_matrix_of_a_llama_has_its_role() -> None:
    model = pruned.llama()
    for number, part in enumerate(found(model).sublayers):
        layer = f"model.layers.{number // 2}"
        if isinstance(part, Attention):
            names = [m.name.rsplit(".", 2)[1][0] for m in (part.q, part.k, part.v, part.out)]
            assert names == ["q", "k", "v", "o"] and (part.heads, part.kv_heads, part.width) == (8, 4, 8)
            assert part.turning.pairs == ((0, 4), (1, 5), (2, 6), (3, 7)) and part.scale == 1 / math.sqrt(8)
            assert torch.equal(part.norm.weight, model.get_parameter(f"{layer}.input_layernorm.weight"))
        else:
            named = [f"{layer}.mlp.{n}_proj.weight" for n in ("gate", "up", "down")]
            assert [part.gate.name, part.up.name, part.down.name] == named
            assert part.norm.eps == 1e-6


class Renamed(nn.Module):
    """One layer of the same arithmetic under other names, in another order, with queries turned in neighbouring pairs."""

    def __init__(self, value_width: int = 4) -> None:
        super().__init__()
        self.z = nn.Embedding(50, 16)
        self.b, self.c = (nn.Linear(16, 16, bias=False) for _ in range(2))
        self.a, self.d = nn.Linear(16, 4 * value_width), nn.Linear(4 * value_width, 16)
        self.up, self.gate, self.back = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.last = nn.Linear(16, 50, bias=False)
        self.scales = nn.Parameter(torch.rand(3, 16) + 0.5)

    def norm(self, x: Tensor, which: int) -> Tensor:
        return self.scales[which] * F.rms_norm(x, (16,), eps=1e-3)

    def turned(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1])[:, None, None] * torch.tensor([0.9, 0.2])
        turned = torch.view_as_complex(x.unflatten(-1, (4, 2, 2))) * torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(turned).flatten(-2).transpose(1, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.z(ids)
        read = self.norm(x, 0)
        values = self.a(read).unflatten(-1, (4, -1)).transpose(1, 2)
        keys, queries = self.turned(self.b(read)), self.turned(self.c(read))
        seen = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=0.7)
        x = x + self.d(seen.transpose(1, 2).flatten(2))
        read = self.norm(x, 1)
        x = x + self.back(self.up(read) * F.silu(self.gate(read)))
        return self.last(self.norm(x, 2))


def test_roles_do_not_depend_on_names_or_order() -> None:
    model = Renamed()
    attention, gated = found(model).sublayers
    assert isinstance(attention, Attention) and not isinstance(gated, Attention)
    assert [m.name for m in (attention.q, attention.k, attention.v, attention.out)] == [f"{n}.weight" for n in "cbad"]
    assert (gated.gate.name, gated.up.name, gated.down.name) == ("gate.weight", "up.weight", "back.weight")
    assert attention.turning.pairs == ((0, 1), (2, 3)) and attention.turning.angles == pytest.approx((0.9, 0.2))
    assert attention.scale == pytest.approx(0.7, rel=1e-4) and attention.norm.eps == pytest.approx(1e-3)
    assert torch.allclose(attention.norm.weight, model.scales[0], rtol=1e-5)


def test_pruned_layers_that_differ_give_sizes_per_layer() -> None:
    model = pruned.without(pruned.llama(0.7, scope="global"), "model.layers.1.self_attn")
    shape = contents(found(model)).shape
    assert shape.architecture == "deci" and len(shape.heads) == 2
    assert shape.heads[1] == shape.kv_heads[1] == 0 and shape.heads[0] == 2 * shape.kv_heads[0] > 0
    assert shape.neurons == tuple(layer.mlp.gate_proj.out_features for layer in model.model.layers)


def test_whole_layers_left_out_leave_a_uniform_model() -> None:
    model = pruned.without(pruned.llama(), "model.layers.0.self_attn", "model.layers.0.mlp")
    made = contents(found(model))
    assert (made.shape.architecture, made.shape.heads, made.notes) == ("llama", (8,), ())


@pytest.mark.parametrize("value_width", [3, 6])
def test_heads_of_different_widths_are_filled_up(value_width: int) -> None:
    model = Renamed(value_width)
    made = contents(found(model))
    wider = max(4, value_width)
    assert made.shape.head_width == wider and f"filled up with zeros to {wider}" in made.notes[0]
    filled = made.weights["blk.0.attn_v.weight"].values.unflatten(0, (4, wider))
    assert torch.equal(filled[:, :value_width].flatten(0, 1), model.a.weight) and not filled[:, value_width:].any()
    assert "rope_freqs.weight" in made.weights


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "norms of queries": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**LLAMA, head_dim=8), "o_proj.*something else"),
    "LayerNorm": (transformers.StableLmForCausalLM, transformers.StableLmConfig(**LLAMA), "q_proj.*isn't an RMS norm"),
    "one matrix for all": (transformers.Phi3ForCausalLM, transformers.Phi3Config(**LLAMA, pad_token_id=0), "gets.*qkv_proj"),
    "parallel branches": (transformers.CohereForCausalLM, transformers.CohereConfig(**LLAMA, bos_token_id=1, eos_token_id=2), "parallel"),
    "no language model": (transformers.ViTModel, None, "looks nothing up"),
    "GELU": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**LLAMA, hidden_act="gelu"), "gate_proj.weight' gates by GELU"),
    "scaled logits": (transformers.GraniteForCausalLM, transformers.GraniteConfig(**LLAMA, logits_scaling=4.0), "changed .scaled"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_llama_like_is_refused_with_the_place(case: str) -> None:
    kind, config, message = REFUSED[case]
    if config is None:
        model, example = pruned.vit()
        with pytest.raises(ExportError, match=message):
            decoder(Gaps(depgraph.trace(model, example)))
        return
    with pytest.raises(ExportError, match=message):
        found(kind(config))


def test_attention_that_looks_ahead_is_refused() -> None:
    model = Renamed()
    model.forward = lambda ids: _looking_ahead(model, ids)  # type: ignore[method-assign]
    with pytest.raises(ExportError, match="look back only"):
        found(model)


def _looking_ahead(model: Renamed, ids: Tensor) -> Tensor:
    x = model.z(ids)
    read = model.norm(x, 0)
    values = model.a(read).unflatten(-1, (4, 4)).transpose(1, 2)
    seen = F.scaled_dot_product_attention(model.turned(model.c(read)), model.turned(model.b(read)), values)
    return model.last(model.norm(x + model.d(seen.transpose(1, 2).flatten(2)), 2))


def test_what_one_file_cannot_hold_is_refused() -> None:
    whole = found(pruned.llama())
    first, *rest = whole.sublayers
    assert isinstance(first, Attention)
    other = replace(first, turning=replace(first.turning, angles=(1.0, 0.3, 0.02, 0.001)))
    with pytest.raises(ExportError, match="one list of rotary frequencies for all layers"):
        contents(replace(whole, sublayers=(other, *rest)))
    with pytest.raises(ExportError, match="one eps for all norms, this model has 1e-06, 0.001"):
        contents(replace(whole, norm=Norm(whole.norm.weight, 1e-3)))
    with pytest.raises(ExportError, match="none left"):
        contents(replace(whole, sublayers=(rest[0],)))
