"""OpenVINO files run in OpenVINO as the pruned modules do in PyTorch."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from depgraph.errors import ExportError
from exporters import OpenVinoOptions, to_openvino
from tests.exporters import pruned

openvino = pytest.importorskip("openvino")

Made = Callable[[], tuple[nn.Module, Tensor]]


def run(file: Path, **inputs: Tensor) -> dict[str, np.ndarray]:
    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    made = compiled({name: tensor.numpy() for name, tensor in inputs.items()})
    return {name: made[compiled.output(name)] for port in compiled.outputs for name in port.names}


@pytest.mark.parametrize("made", [pruned.cnn, pytest.param(pruned.vit, marks=pytest.mark.slow)])
def test_a_pruned_model_runs_at_a_batch_that_the_export_did_not_see(made: Made, tmp_path: Path) -> None:
    model, example = made()
    report = to_openvino(model, example, tmp_path)
    assert report.files == (tmp_path / "model.xml", tmp_path / "model.bin")
    other = torch.randn(5, *example.shape[1:])
    with torch.no_grad():
        output = model(other)
    (name,) = (name for name in run(report.path, **{_input(report.path): other}))
    got = run(report.path, **{_input(report.path): other})[name]
    expected = output if isinstance(output, Tensor) else output.logits
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert report.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())


def _input(file: Path) -> str:
    return str(openvino.Core().read_model(file).inputs[0].get_any_name())


@pytest.mark.slow
def test_a_language_model_keeps_its_names_and_takes_other_lengths(tmp_path: Path) -> None:
    model = pruned.llama(0.7)
    report = to_openvino(model, pruned.IDS, tmp_path / "llama.xml")
    ids = torch.arange(15)[None].repeat(3, 1)
    with torch.no_grad():
        expected = model(ids).logits
    np.testing.assert_allclose(run(report.path, input_ids=ids)["logits"], expected.numpy(), rtol=1e-4, atol=1e-5)


def test_float16_weights_take_half_the_space(tmp_path: Path) -> None:
    model, example = pruned.cnn()
    full = to_openvino(model, example, tmp_path / "full.xml")
    half = to_openvino(model, example, tmp_path / "half.xml", options=OpenVinoOptions(weights="float16"))
    assert half.files[1].stat().st_size < 0.6 * full.files[1].stat().st_size
    assert full.max_rel_error < 1e-5 < half.max_rel_error < 1e-2


def test_what_differs_is_not_written_and_what_was_there_stays(tmp_path: Path) -> None:
    model, example = pruned.cnn()
    before = to_openvino(model, example, tmp_path).path.read_bytes()
    with pytest.raises(ExportError, match=r"OpenVINO and PyTorch differ"):
        options = OpenVinoOptions(weights="float16", rtol=1e-9, atol=1e-6)
        to_openvino(model, example, tmp_path, options=options)
    assert (tmp_path / "model.xml").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["model.bin", "model.xml"]


def test_other_suffixes_and_weights_are_refused(tmp_path: Path) -> None:
    model, example = pruned.cnn()
    with pytest.raises(ExportError, match=r"model\.onnx doesn't end in \.xml: name a file such as .*model\.xml"):
        to_openvino(model, example, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="weights='int8' is not one of"):
        to_openvino(model, example, tmp_path, options=OpenVinoOptions(weights="int8"))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
