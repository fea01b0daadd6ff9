"""Exported files run in ONNX Runtime as the modules do in PyTorch, and bad cases leave nothing behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
import transformers
from torch import Tensor, nn

import exporters
from depgraph.errors import ExportError
from exporters import OnnxOptions, onnx_check, onnx_file, to_onnx
from exporters.calls import named_outputs
from exporters.opsets import supported

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
FORBIDDEN = (b"site-packages", b".py", b"/work", b"/tmp", b"/home", b"/root", os.getcwd().encode())


class Cnn(nn.Sequential):
    """Convolution, batch norm with statistics of its own, and a head."""

    def __init__(self) -> None:
        norm = nn.BatchNorm2d(6)
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        pool = nn.AdaptiveAvgPool2d(2)
        super().__init__(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.Dropout(0.5), pool, nn.Flatten(), nn.Linear(24, 5))


class Affine(nn.Module):
    """The smallest model worth exporting."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class FixedBatch(Affine):
    """A model whose code knows its batch size."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).reshape(2, 2, 2).sum(1)


class Branching(Affine):
    """A model whose path depends on the values it sees."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else x[:, :4]


class Settings:
    """A configuration as transformers has them, in little."""

    def __init__(self) -> None:
        self._attn_implementation = "fused"
        self.use_cache = True

    def to_dict(self) -> dict[str, Any]:
        return vars(self)


class TwoKernels(Affine):
    """A model with one implementation that doesn't export and one that does."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Settings()

    def set_attn_implementation(self, name: str) -> None:
        self.config._attn_implementation = name

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        out = self.inner(x)
        if self.config._attn_implementation == "fused" and torch.compiler.is_exporting():
            raise NotImplementedError("this kernel is for one machine only")
        return out, object() if self.config.use_cache else None


class TwoInputs(nn.Module):
    """Two inputs, one with a length of its own, a constant, and outputs in a dictionary with awkward names."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, tokens: Tensor, image: Tensor, scale: float = 1.0) -> dict[str, Any]:
        text = self.table(tokens).mean(1)
        both = torch.cat([text, image.flatten(1)], 1) * scale
        logits = self.head(text)
        return {"add": both, "image": logits, "nothing": None, "best": logits.argmax(-1), "deep": (logits + 1, text)}


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 20, shape)


def run_file(path: Path, inputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {k: v.numpy() for k, v in inputs.items()}), strict=True))


def assert_agrees(path: Path, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Independent of the library's own check."""
    with torch.no_grad():
        expected = named_outputs(model.eval()(**inputs))[0]
    actual = run_file(path, inputs)
    for got, want in zip(actual.values(), expected.values(), strict=False):
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=2e-5)


def assert_anonymous(path: Path) -> None:
    content = path.read_bytes()
    assert [word for word in FORBIDDEN if word in content] == []


def test_cnn_with_a_batch_of_one(tmp_path: Path) -> None:
    model = Cnn().train()
    model[1].eval()
    image = torch.randn(1, 3, 12, 12)
    report = to_onnx(model, image, tmp_path / "cnn.onnx")
    assert report.dynamic == {"input": {0: "batch"}}
    assert [m.training for m in model] == [True, False, True, True, True, True, True] and model.training
    assert report.max_abs_error < 1e-5 and report.bytes == (tmp_path / "cnn.onnx").stat().st_size
    assert report.shapes_checked[0] == "input (1, 3, 12, 12)" and len(report.shapes_checked) == 3
    assert os.listdir(tmp_path) == ["cnn.onnx"]
    assert_anonymous(report.path)
    assert_agrees(report.path, model, {"input": torch.randn(5, 3, 12, 12)})
    assert "cnn.onnx" in str(report) and "input[0] = batch" in str(report)


def test_two_inputs_and_a_dictionary(tmp_path: Path) -> None:
    model = TwoInputs()
    model.depgraph_record = {"cut": {"head": [1, 2]}}
    report = to_onnx(model, (ids(3, 7),), tmp_path / "m.onnx", {"image": torch.randn(3, 2, 2), "scale": 0.5})
    assert report.dynamic == {"tokens": {0: "batch", 1: "sequence"}, "image": {0: "batch"}}
    inputs = {"tokens": ids(2, 11), "image": torch.randn(2, 2, 2)}
    actual = run_file(report.path, inputs)
    assert list(actual) == ["add", "image_out", "best", "deep.0", "deep.1"]
    expected = model(**inputs, scale=0.5)
    np.testing.assert_allclose(actual["add"], expected["add"].detach().numpy(), rtol=1e-5, atol=1e-6)
    stored = onnx_ir.load(report.path)
    assert stored.producer_name == "depgraph" and stored.metadata_props[onnx_file.VERSION_KEY]
    assert json.loads(stored.metadata_props[onnx_file.RECORD_KEY]) == {"cut": {"head": [1, 2]}}
    assert {"table.weight", "head.bias"} <= set(stored.graph.initializers)
    assert_anonymous(report.path)


def test_causal_decoder_with_grouped_queries(tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, vocab_size=64, num_key_value_heads=2))
    assert model.config.use_cache
    example = {"input_ids": ids(1, 6), "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    report = to_onnx(model, (), tmp_path / "m.onnx", example)
    assert model.config.use_cache and not report.notes
    assert report.dynamic == {name: {0: "batch", 1: "sequence"} for name in example}
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    assert_agrees(report.path, model.eval(), {"input_ids": ids(2, 9), "attention_mask": mask})
    assert list(run_file(report.path, {"input_ids": ids(1, 1), "attention_mask": mask[:1, :1]})) == ["logits"]
    assert_anonymous(report.path)


def test_encoder_up_to_its_longest_text(tmp_path: Path) -> None:
    config = transformers.BertConfig(**SMALL, vocab_size=64, max_position_embeddings=8)
    model = transformers.BertModel(config)
    example = {"input_ids": ids(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    report = to_onnx(model, (), tmp_path / "m.onnx", example)
    assert report.dynamic["input_ids"] == {0: "batch", 1: "sequence"}
    inputs = {"input_ids": ids(3, 5), "attention_mask": torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1] * 5])}
    assert list(run_file(report.path, inputs)) == ["last_hidden_state", "pooler_output"]
    assert_agrees(report.path, model, inputs)


def test_vision_transformer(tmp_path: Path) -> None:
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, image_size=16, patch_size=8))
    report = to_onnx(model, torch.randn(1, 3, 16, 16), tmp_path / "m.onnx")
    assert report.dynamic == {"pixel_values": {0: "batch"}}
    assert_agrees(report.path, model, {"pixel_values": torch.randn(3, 3, 16, 16)})


@pytest.mark.ci
def test_encoder_decoder_with_two_lengths(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config)
    before = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    cached = [model.encoder.config.use_cache, model.decoder.config.use_cache]
    example = {"input_ids": ids(2, 6), "decoder_input_ids": ids(2, 6)}
    report = to_onnx(model, (), tmp_path / "m.onnx", example)
    assert [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")] == before
    assert [model.encoder.config.use_cache, model.decoder.config.use_cache] == cached
    assert report.dynamic["input_ids"][1] != report.dynamic["decoder_input_ids"][1], "two texts, two lengths"
    assert_agrees(report.path, model, {"input_ids": ids(3, 9), "decoder_input_ids": ids(3, 4)})


def test_another_implementation_is_tried_and_put_back(tmp_path: Path) -> None:
    model = TwoKernels()
    report = to_onnx(model, torch.randn(2, 8), tmp_path / "m.onnx")
    assert any("eager" in note for note in report.notes)
    assert model.config.to_dict() == {"_attn_implementation": "fused", "use_cache": True}


class TwoTexts(Affine):
    """Two texts; `strict` demands equal lengths in a way that a trace doesn't see."""

    def __init__(self, strict: bool = False) -> None:
        super().__init__()
        self.strict = strict

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if self.strict and not torch.compiler.is_exporting() and a.shape[1] != b.shape[1]:
            raise ValueError("lengths differ")
        return a + 1, b * a.sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("strict", "lengths", "dynamic", "expected"),
    [
        (False, (3, 5), None, ["sequence", "b_sequence"]),
        (False, (4, 4), None, ["sequence", "b_sequence"]),
        (True, (4, 4), None, ["sequence", "sequence"]),
        (False, (4, 4), {"a": {1: "sequence"}, "b": {1: "sequence"}}, ["sequence", "sequence"]),
    ],
)
def test_names_of_two_lengths(
    tmp_path: Path, strict: bool, lengths: tuple[int, int], dynamic: Any, expected: list[str]
) -> None:
    examples = tuple(ids(2, length) for length in lengths)
    report = to_onnx(TwoTexts(strict), examples, tmp_path / "m.onnx", dynamic=dynamic)
    assert [report.dynamic[name][1] for name in "ab"] == expected
    stored = onnx_ir.load(report.path).graph
    assert [str(value.shape[1].value) for value in (*stored.inputs, *stored.outputs)] == expected * 2


@pytest.mark.slow
def test_speech_encoder_decoder(tmp_path: Path) -> None:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(
        **sizes, **special, vocab_size=64, d_model=16, num_mel_bins=8, max_source_positions=20, max_target_positions=16
    )
    model = transformers.WhisperForConditionalGeneration(config)
    example = {"input_features": torch.randn(1, 8, 40), "decoder_input_ids": ids(1, 5)}
    report = to_onnx(model, (), tmp_path / "m.onnx", example)
    assert report.dynamic == {"input_features": {0: "batch"}, "decoder_input_ids": {0: "batch", 1: "sequence"}}
    assert_agrees(report.path, model, {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": ids(2, 9)})


@pytest.mark.slow
def test_mixture_of_experts_keeps_its_grouped_products(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(**SMALL, vocab_size=64, num_key_value_heads=2, num_local_experts=4)
    model = transformers.MixtralForCausalLM(config)
    before = model.config._experts_implementation
    report = to_onnx(model, (ids(2, 6),), tmp_path / "m.onnx")
    assert model.config._experts_implementation == before
    assert not report.notes
    assert_agrees(report.path, model, {"input_ids": ids(3, 9)})


@pytest.mark.slow
def test_experts_in_a_loop_become_one_batched_product(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(**SMALL, vocab_size=64, num_key_value_heads=2, num_local_experts=4)
    model = transformers.MixtralForCausalLM(config)
    model.set_experts_implementation("eager")
    report = to_onnx(model, (ids(2, 6),), tmp_path / "m.onnx")
    assert model.config._experts_implementation == "eager"
    assert any("one batched product" in note for note in report.notes)
    assert_agrees(report.path, model, {"input_ids": ids(3, 9)})


def test_a_fixed_batch_goes_static_and_says_so(tmp_path: Path) -> None:
    report = to_onnx(FixedBatch(), torch.randn(2, 8), tmp_path / "m.onnx")
    assert report.dynamic == {} and "dim 0 of 'x' (batch)" in report.notes[0]
    assert report.shapes_checked == ("x (2, 8)",)


def test_a_fixed_batch_that_was_asked_free_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"dim 0 of 'x' \(n\).*STATIC"):
        to_onnx(FixedBatch(), torch.randn(2, 8), tmp_path / "m.onnx", dynamic={"x": {0: "n"}})
    assert os.listdir(tmp_path) == []


def test_static_on_request(tmp_path: Path) -> None:
    report = to_onnx(Affine(), torch.randn(1, 8), tmp_path / "m.onnx", dynamic=exporters.STATIC)
    assert report.dynamic == {} and not report.notes
    assert list(onnx_ir.load(report.path).graph.inputs[0].shape) == [1, 8]


@pytest.mark.parametrize("free", ["rows", torch.export.Dim("rows", min=1, max=64), torch.export.Dim.DYNAMIC])
def test_dims_in_the_style_of_torch_export(tmp_path: Path, free: Any) -> None:
    report = to_onnx(Affine(), torch.randn(4, 3, 8), tmp_path / "m.onnx", dynamic={"x": {-2: free}})
    name = "x_1" if free is torch.export.Dim.DYNAMIC else "rows"
    assert report.dynamic == {"x": {1: name}}
    assert [str(getattr(d, "value", d)) for d in onnx_ir.load(report.path).graph.inputs[0].shape] == ["4", name, "8"]


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"y": {0: "batch"}}, "'y', but the inputs are 'x'"),
        ({"x": {2: "n"}}, "dim 2 of 'x'"),
        (False, r'dynamic=False is no such request: give \{"x"'),
        ("batch", r"dynamic='batch' is no such request"),
        ({"x": 3}, "`dynamic` says 3 of 'x', which isn't understood"),
    ],
)
def test_dims_that_do_not_exist(tmp_path: Path, dynamic: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        to_onnx(Affine(), torch.randn(2, 8), tmp_path / "m.onnx", dynamic=dynamic)


def test_control_flow_on_values_names_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ExportError, match=r"Branching branches on the values of 'x' at .*test_to_onnx.py:\d+"):
        to_onnx(Branching(), torch.randn(2, 8), tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("opset", [3, 17, 99, True, "20", 20.0])
def test_opsets_that_cannot_be_had_are_refused_at_once(tmp_path: Path, opset: Any) -> None:
    with pytest.raises(ExportError, match=r"opset .* can't be exported to: give a whole number from 18 to \d+\."):
        to_onnx(Affine(), torch.randn(2, 8), tmp_path / "m.onnx", options=OnnxOptions(opset=opset))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("opset", supported())
def test_the_file_has_the_opset_of_the_report(tmp_path: Path, opset: int) -> None:
    path = tmp_path / "m.onnx"
    assert to_onnx(Affine(), torch.randn(2, 8), path, options=OnnxOptions(opset=opset)).opset == opset
    assert onnx_ir.load(path).opset_imports[""] == opset


def test_a_conversion_of_the_opset_that_failed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporters.opsets.supported", lambda: (18, 99))
    with pytest.raises(ExportError, match=r"could not be brought from opset 18 to 99"):
        to_onnx(Affine(), torch.randn(2, 8), tmp_path / "m.onnx", options=OnnxOptions(opset=99))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [((torch.randn(2, 7),), "doesn't run on the example"), ((3.0,), "no tensor"), ((1, 2), "2 example inputs")],
)
def test_inputs_that_do_not_fit(tmp_path: Path, args: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        to_onnx(Affine(), args, tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 4)), {nn.Linear})


def sparse() -> nn.Module:
    model = Affine()
    model.register_buffer("adjacency", torch.eye(4).to_sparse())
    return model


def without_numbers() -> nn.Module:
    model = Affine()
    nn.init.constant_(model.inner.bias, float("nan"))
    return model


@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning", "ignore:torch.quantize:UserWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (quantised, "Module '0' is quantised, which can't be exported: give the model in dense form"),
        (sparse, "Buffer 'adjacency' is sparse"),
        (without_numbers, r"parameter 'inner\.bias' holds NaN or infinite values"),
        (lambda: quantised, "to_onnx takes a torch.nn.Module, not a function"),
    ],
)
def test_models_that_cannot_be_exported(tmp_path: Path, make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        to_onnx(make(), torch.randn(2, 8), tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []


def test_a_difference_is_an_error_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "m.onnx"
    target.write_bytes(b"older")
    original: Callable[..., Any] = onnx_check._run_onnx
    monkeypatch.setattr(onnx_check, "_run_onnx", lambda *a: [out + 0.01 for out in original(*a)])
    model = Affine().train()
    with pytest.raises(ExportError, match=r"'output' at the example.*differ by 0\.0"):
        to_onnx(model, torch.randn(2, 8), target)
    assert os.listdir(tmp_path) == ["m.onnx"] and target.read_bytes() == b"older" and model.training
    assert to_onnx(model, torch.randn(2, 8), target, options=OnnxOptions(rtol=1.0)).max_abs_error > 0.009


def test_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx_check, "compare", interrupt)
    model = Affine().train()
    with pytest.raises(KeyboardInterrupt):
        to_onnx(model, torch.randn(2, 8), tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == [] and model.training


@pytest.mark.parametrize("place", ["onnx_ir.save", "os.replace", "tempfile.mkdtemp"])
def test_a_disk_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "m.onnx.data").write_bytes(b"somebody else's")
    monkeypatch.setattr(place, refuse)
    with pytest.raises(ExportError, match=r"m\.onnx could not be written \(No space left on device\); free") as caught:
        to_onnx(
            Affine(), torch.randn(2, 8), tmp_path / "m.onnx", options=OnnxOptions(external_data=place == "os.replace")
        )
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["m.onnx.data"] and (tmp_path / "m.onnx.data").read_bytes() == b"somebody else's"


def test_folders_that_do_not_serve(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="doesn't exist"):
        to_onnx(Affine(), torch.randn(2, 8), tmp_path / "none" / "m.onnx")
    with pytest.raises(ExportError, match="is a folder"):
        to_onnx(Affine(), torch.randn(2, 8), tmp_path)


@pytest.mark.parametrize("limit", [onnx_file.INLINE_LIMIT, 100])
def test_external_data_keeps_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(onnx_file, "INLINE_LIMIT", limit)
    model = nn.Linear(32, 32)
    for _ in range(2):  # the second time over the first
        report = to_onnx(model, torch.randn(2, 32), tmp_path / "m.onnx", options=OnnxOptions(external_data=limit > 100))
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data"]
    assert report.bytes == sum(f.stat().st_size for f in tmp_path.iterdir()) > 4096
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in ("m.onnx", "m.onnx.data"):
        (tmp_path / file).rename(moved / file)
    assert_agrees(moved / "m.onnx", model, {"input": torch.randn(3, 32)})


def test_failed_move_puts_old_data_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = tmp_path / "draft" / "m.onnx"
    draft.parent.mkdir()
    for path, text in (
        (draft, "new"),
        (onnx_file.data_path(draft), "new data"),
        (tmp_path / "m.onnx.data", "old data"),
    ):
        path.write_text(text)
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(target).name == "m.onnx":
            raise OSError(30, "Read-only file system")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ExportError, match="Read-only"):
        onnx_file.publish(draft, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").read_text() == "old data" and not (tmp_path / "m.onnx").exists()


def test_bfloat16_needs_a_float32_copy(tmp_path: Path) -> None:
    model, example = Affine().bfloat16(), torch.randn(2, 8, dtype=torch.bfloat16)
    with pytest.raises(ExportError, match='dtype="float32"'):
        to_onnx(model, example, tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []
    report = to_onnx(model, example, tmp_path / "m.onnx", options=OnnxOptions(dtype="float32"))
    assert model.inner.weight.dtype == torch.bfloat16 and report.max_abs_error < 1e-5
    assert any("bfloat16 in the model is float32 in the file" in note for note in report.notes)
    assert onnx_ir.load(report.path).graph.inputs[0].dtype == onnx_ir.DataType.FLOAT


def test_float16_as_it_is(tmp_path: Path) -> None:
    report = to_onnx(Affine().half(), torch.randn(2, 8).half(), tmp_path / "m.onnx")
    assert onnx_ir.load(report.path).graph.inputs[0].dtype == onnx_ir.DataType.FLOAT16
    assert report.max_rel_error < 1e-2


def test_a_record_that_is_no_json(tmp_path: Path) -> None:
    model = Affine()
    model.depgraph_record = {"cut": {1, 2}}
    with pytest.raises(ExportError, match="no JSON"):
        to_onnx(model, torch.randn(2, 8), tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []


def test_comparison_of_numbers_that_are_none() -> None:
    tolerance = onnx_check.Tolerance()
    expected = torch.tensor([1.0, torch.nan, torch.inf])
    assert onnx_check.compare("y", expected, expected.numpy(), tolerance) == onnx_check.Difference(0.0, 0.0)
    with pytest.raises(ExportError, match="different places"):
        onnx_check.compare("y", expected, np.array([1.0, 0.0, np.inf]), tolerance)
    with pytest.raises(ExportError, match="shape"):
        onnx_check.compare("y", expected, np.ones(2), tolerance)
    with pytest.raises(ExportError, match="differ by 1"):
        onnx_check.compare("y", torch.tensor([100000]), np.array([100001]), tolerance)


def test_latencies_side_by_side(tmp_path: Path) -> None:
    torch.manual_seed(0)
    paths = {"dense": tmp_path / "dense.onnx", "pruned": tmp_path / "pruned.onnx"}
    for width, path in zip((1536, 64), paths.values(), strict=True):
        to_onnx(nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 64)), torch.randn(2, 64), path)
    inputs = {"input": torch.randn(256, 64)}
    both = exporters.compare_latency(paths, inputs, rounds=7)
    assert {len(times.samples_ms) for times in both.values()} == {7}
    assert both["pruned"].speedup_over(both["dense"]) > 2
    alone = exporters.latency(paths["dense"], [inputs["input"].numpy()], runs=5)
    assert 0 < alone.min_ms <= alone.median_ms and "1 thread" in str(alone)
    with pytest.raises(ExportError, match="input is not given"):
        exporters.latency(paths["dense"], {})


def test_an_operator_without_a_translation_is_named_in_one_sentence(tmp_path: Path) -> None:
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.svdvals(self.linear(x))

    with pytest.raises(
        ExportError, match=r"no translation of this use of aten\.\w+\.\w+ in Spectrum; .*\.$"
    ) as refusal:
        exporters.to_onnx(Spectrum().eval(), (torch.rand(4, 4),), tmp_path / "model.onnx")
    assert "num_users" not in str(refusal.value)


def test_a_tensor_that_is_given_twice_is_two_inputs(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x - 2 * y

    x = torch.randn(3, 4)
    to_onnx(Two(), (x, x), tmp_path / "two.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "two.onnx"))
    (made,) = session.run(None, {"x": x.numpy(), "y": 3 * x.numpy()})
    np.testing.assert_allclose(made, -5 * x.numpy(), rtol=1e-5)
