"""`depgraph export` from outside: formats, fewer bits, and what it says when it can't."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from depgraph import cli

ROWS, COLUMNS = 48, 20


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    """A file with one product by a constant matrix."""
    helper = onnx.helper
    weight = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    made = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", 1, ["batch", ROWS])],
        [helper.make_tensor_value_info("y", 1, ["batch", COLUMNS])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    file = tmp_path / "matrix.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), file)
    return file


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a language model of one layer and a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "</s>"]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=len(alphabet), num_hidden_layers=1, max_position_embeddings=64, eos_token_id=256, **sizes
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def run(*arguments: object) -> int:
    return cli.main(["export", *map(str, arguments)])


def test_a_file_is_quantised_and_becomes_ort(matrix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.random.default_rng(1).standard_normal((5, ROWS)).astype(np.float32)
    np.savez(tmp_path / "a.npz", x=x)
    out = tmp_path / "small.ort"
    assert run(matrix, "--quantise", "int8-static", "--data", tmp_path / "a.npz", "--out", out) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("On the way: (int8-static, ") and second.startswith(f"Wrote {out} (")
    small, large = (onnxruntime.InferenceSession(str(file)).run(None, {"x": x})[0] for file in (out, matrix))
    assert 0 < np.abs(small - large).max() < 0.1 * np.abs(large).max()


@pytest.mark.parametrize("name", ["small.onnx", "small.ort"])
def test_errors_on_the_way_name_the_file_that_was_asked_for(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import torch\ndef build():\n    return torch.nn.Linear(40, 40), (torch.randn(2, 40),)\n"
    (tmp_path / "one.py").write_text(code)
    options = ("--quantise", "int8-dynamic", "--tolerance", "1e-9", "--out", tmp_path / name)
    assert run(f"{tmp_path / 'one.py'}:build", *options) != 0
    assert "small.onnx as int8-dynamic has an error of" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / name).exists()


def test_the_report_is_json_where_asked(matrix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(matrix, "--quantise", "float16", "--out", tmp_path / "half.onnx", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kind"] == "float16" and report["path"] == str(tmp_path / "half.onnx")
    assert 0 < report["distance"]["error"] < 1e-3


@pytest.mark.parametrize(
    ("arguments", "says", "code"),
    [
        (("--out", "b.onnx"), "is an ONNX file already: give --quantise KIND, or --out FILE.ort", 2),
        (("--quantise", "int8-static", "--out", "b.onnx"), "calibrated on real inputs", 6),
        (("--quantise", "int3", "--out", "b.onnx"), "'int3' is not one of", 2),
        (("--quantise", "int4", "--tolerance", "0.0001", "--out", "b.onnx"), "where 0.0001 is allowed", 6),
        (("--quantise", "int4", "--out", "b.onnx", "--data", "none.npz"), "can't be read as .npz", 7),
        (("--quantise", "int4", "--out", "matrix.onnx"), "exists: name another file", 7),
        (("--quantise", "int4", "--device", "cuda", "--out", "b.onnx"), "--device cuda is for PyTorch models", 2),
        (("--format", "genai"), "--out FOLDER says where --format genai goes", 2),
        (("--format", "gguf", "--out", "b.gguf"), "--format gguf needs a PyTorch model", 2),
    ],
)
def test_wrong_usage_leaves_nothing(
    arguments: tuple[str, ...],
    says: str,
    code: int,
    matrix: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(matrix.parent)
    assert run(matrix, *arguments) == code
    assert says in capsys.readouterr().err
    assert [path.name for path in matrix.parent.iterdir()] == ["matrix.onnx"]


def test_every_destination_is_a_format_with_its_own_file(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from exporters import destinations
    from exporters.destinations import DESTINATIONS, Cargo
    from exporters.verifying import FileReport

    cargoes: list[Cargo] = []

    def write(cargo: Cargo, path: Path) -> FileReport:
        cargoes.append(cargo)
        path.write_text("written")
        return FileReport((path,), "a format", "a runtime", 7, 0.0, 0.0, ("1x3",))

    for name, destination in DESTINATIONS.items():
        made = replace(destination, module="json", write=write)
        monkeypatch.setattr(destinations, "DESTINATIONS", {**DESTINATIONS, name: made})
        file = tmp_path / f"m{destination.suffix}"
        assert run(llama, "--format", name, "--out", file) == 0
        assert file.read_text() == "written" and capsys.readouterr().out.startswith(f"Wrote {file} (a format, 7 bytes)")
        assert run(llama, "--format", name, "--quantise", "int4", "--out", tmp_path / "n") == 2
        assert f"--format {name} writes another" in capsys.readouterr().err
    assert [set(cargo.kwargs or ()) for cargo in cargoes] == [{"input_ids"}] * 3
    assert {cargo.tokenizer for cargo in cargoes} == {llama}


def test_a_missing_extra_is_said_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    (tmp_path / "broken.py").write_text("raise RuntimeError\n")
    assert run(f"{tmp_path / 'broken.py'}:build", "--format", "openvino", "--out", tmp_path / "m.xml") == 6
    assert "pip install 'depgraph[openvino]'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_decoder_is_quantised_on_a_text(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    wish = ("--format", "decoder", "--quantise", "int8-dynamic", "--data", text, "--json")
    assert run(llama, *wish, "--out", tmp_path / "decoder.onnx") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["batches"] == 8 and report["before"][0]["agreement"]["tokens"] == 60
    names = [value.name for value in onnxruntime.InferenceSession(str(tmp_path / "decoder.onnx")).get_inputs()]
    assert names[:3] == ["input_ids", "attention_mask", "position_ids"]


@pytest.mark.slow
def test_a_folder_for_genai(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(llama, "--format", "genai", "--quantise", "int4", "--out", tmp_path / "folder") == 0
    assert capsys.readouterr().out.startswith(f"Wrote {tmp_path / 'folder'} (")
    settings: Any = json.loads((tmp_path / "folder" / "genai_config.json").read_text())
    assert settings["model"]["vocab_size"] == 257 and settings["model"]["eos_token_id"] == 256
