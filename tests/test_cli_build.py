"""`depgraph build` from outside: what it takes, what it leaves, and what it says when it can't."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from depgraph import cli
from depgraph.cli.data import Amount, text_data
from depgraph.cli.models import Loaded, in_float32
from depgraph.cli.quality import shift_of
from exporters import to_onnx
from exporters.building.file_model import FileModel

MODELS = """
import torch
from torch import nn

def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(14, 64), nn.ReLU(), nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 5))

def pair(): return mlp(), torch.randn(2, 14)
def half(): return mlp().bfloat16(), torch.randn(2, 14).bfloat16()
def fixed(): return nn.Linear(14, 5), torch.randn(2, 14)
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("models.py").write_text(MODELS)
    return tmp_path


def build(*arguments: str) -> int:
    return cli.main(["build", *arguments])


def test_a_model_without_data_in_bfloat16_is_built_in_float32(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build("models.py:half", "--size", "12kB", "--out", "small", "--json") == 0
    said = capsys.readouterr()
    assert "built in float32" in said.err
    (tried,) = json.loads(said.out)["tried"]
    assert tried["recipe"] == "magnitude" and tried["precision"] == "float32"
    assert 9_000 < Path("small/model.onnx").stat().st_size == tried["bytes"] <= 12_000
    session = onnxruntime.InferenceSession("small/model.onnx")
    with np.load("small/example.npz") as arrays:
        (made,) = session.run(None, dict(arrays))
    assert made.dtype == np.float32 and made.shape == (2, 5)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("models.py:pair",), 2, "give a budget: --latency 20ms, --size 30MB, or both"),
        (("models.py:pair", "--latency", "1.5"), 2, "--latency '1.5' is no share: give one above 0 and below 1 (100%)"),
        (
            ("models.py:pair", "--size", "100%"),
            2,
            "--size '100%' is no share: give one above 0 and below 1 (100%) of the dense model's",
        ),
        (("models.py:pair", "--size", "101%"), 2, "such as 0.5 or 50%, or a size such as 30MB"),
        (("models.py:pair", "--latency", "0ms"), 2, "--latency '0ms' is no time"),
        (("models.py:pair", "--size", "10q"), 2, "--size '10q' is no size: give a number and a unit"),
        (("models.py:pair", "--size", "1.2.3MB"), 2, "--size '1.2.3MB' is no size"),
        (("models.py:pair", "--size", "9kB", "--recipes", "taylor"), 2, "'taylor' needs data"),
        (("models.py:pair", "--size", "9kB", "--quantise", "int3"), 2, "'int3' is no precision"),
        (
            ("models.py:pair", "--size", "9kB", "--scope", "both"),
            2,
            "--scope both compares changes of the loss: give a text",
        ),
        (("models.py:pair", "--size", "9kB", "--scope", "depth", "--recipes", "obs"), 2, "leave out --recipes obs"),
        (("models.py:pair", "--size", "9kB", "--depth-score", "sleb"), 2, "--depth-score sleb needs data"),
        (("models.py:pair", "--size", "9kB", "--depth-score", "slep"), 2, "sleb"),
        (("models.py:pair", "--size", "9kB", "--scope", "depth"), 3, "has no blocks that could be left out"),
        (("models.py:fixed", "--size", "400B"), 4, "has no axis that may lose a group"),
    ],
)
def test_what_can_not_be_built_leaves_nothing(
    arguments: tuple[str, ...], code: int, says: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(*arguments, "--out", "small") == code
    assert says in capsys.readouterr().err
    assert not Path("small").exists()


@pytest.mark.ci
def test_limits_may_be_shares_of_the_dense_file(models: Path) -> None:
    assert build("models.py:pair", "--size", "60%", "--out", "small") == 0
    story = json.loads(Path("small/report.json").read_text())
    (file,) = story["files"]
    assert 0.4 < file["bytes"] / file["dense_bytes"] <= 0.6
    assert story["making"]["target"] == f"{int(0.6 * file['dense_bytes']):,} bytes"


def test_batches_follow_a_model_to_float32() -> None:
    model = torch.nn.Linear(2, 2).bfloat16()
    batch = (torch.ones(1, 2, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.long))
    found = in_float32(Loaded(model, (batch[0],), batches=[batch], held_out=[{"x": batch[0]}]))
    assert found.args[0].dtype == found.batches[0][0].dtype == found.held_out[0]["x"].dtype == torch.float32
    assert found.batches[0][1].dtype == torch.long and found.model(found.args[0]).dtype == torch.float32
    assert in_float32(found) is found


def test_a_text_for_an_encoder_and_decoder_can_be_run_without_its_labels() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    class Words:
        mask_token_id = None

        def encode(self, text: str, **_: object) -> list[int]:
            return [ord(letter) % 30 + 2 for letter in text]

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=40, decoder_start_token_id=0, pad_token_id=0, **sizes)
    ).eval()
    loaded = Loaded(model, tokenizer=Words())
    (batch,) = text_data(loaded, Path("text"), "a few words " * 8, Amount(1, 16)).calibration
    labels = batch.pop("labels")
    assert torch.equal(batch["decoder_input_ids"][:, 1:], labels[:, :-1])
    assert model(**batch).logits.shape == (*labels.shape, 40)


def test_an_output_that_became_narrower_is_left_out_of_the_shift() -> None:
    class Two(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, width), nn.Linear(width, 2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            states = self.body(x)
            return states, self.head(states)

    torch.manual_seed(0)
    wide, narrow = Two(8).eval(), Two(5).eval()
    measure = shift_of(Loaded(wide, (torch.randn(3, 4),)))
    assert measure.of(wide) == 0 < measure.of(narrow) < float("inf")


def test_how_far_outputs_move_is_measured_of_a_file_in_the_models_place_too(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.head(x), "count": torch.ones(2, dtype=torch.long), "states": x * 2}

    model, given = Named().eval(), (torch.randn(3, 4),)
    to_onnx(model, given, tmp_path / "named.onnx")
    measure = shift_of(Loaded(model, given))
    assert measure.of(FileModel(tmp_path / "named.onnx", model)) < 1e-6 and "no data were given" in measure.figure.data
    model.head.weight.data *= 2
    assert measure.of(model) > 0.1
