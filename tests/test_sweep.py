"""`depgraph sweep` from outside: its table and files, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest

from depgraph import cli, interruption
from depgraph.cli.points import Maker
from depgraph.plain import rebuilt
from depgraph.story import TradeOff
from tests.onnx_door.building import mlp

from .test_page import Reader

MODEL = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))

def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)

def loss(output, batch): return nn.functional.cross_entropy(output, batch[1])
def share(output, batch): return (output.argmax(-1) == batch[1]).float().mean()

def bare(): return net(), torch.randn(2, 6)
def scored(): return {"model": net(), "args": torch.randn(2, 6), "batches": [batch(0), batch(1)], "loss": loss}
def measured(): return {**scored(), "held_out": [batch(2)], "accuracy": share}
def odd(): return {**scored(), "accuracy": 0.5}
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "nets.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    return "nets.py:scored"


def run(capfd: pytest.CaptureFixture[str], *given: str) -> tuple[int, str, str]:
    code = cli.main(["sweep", *given, "--jobs", "1"])
    printed = capfd.readouterr()
    return code, printed.out, printed.err


def test_points_are_made_once_and_shown_with_the_front(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    given = [model, "--out", "out", "--recipes", "magnitude,obs,taylor"]
    code, shown, said = run(capfd, *given, "--keep", "macs=0.8,0.5")
    assert code == 0, said
    assert len(re.findall(r"^(?:magnitude|obs|taylor) +macs=0\.[85]", shown, re.M)) == 6
    assert "loss on the batches that scores are from, lower is better" in shown
    assert said.count("loss ") == 7 and "there already" not in said
    code, shown, said = run(capfd, *given, "--keep", "macs=0.8,0.5,0.3", "--json")
    assert code == 0 and "7 of 10 points are there already" in said and said.count("loss ") == 3
    found = json.loads(shown)
    assert found == json.loads(Path("out/sweep.json").read_text())
    trade = rebuilt(TradeOff, found["trade_off"])
    assert (
        len(trade.trials) == 9 and any(t.on_front for t in trade.trials) and not all(t.on_front for t in trade.trials)
    )
    assert all(t.share <= 0.8 for t in trade.trials) and trade.metric == "macs"
    picture = Reader(Path("out/front.svg").read_text())
    assert [attributes["xmlns"] for tag, attributes in picture.found if tag == "svg"] == ["http://www.w3.org/2000/svg"]
    assert len(picture.of_class("dot")) == 9


def test_accuracy_on_held_out_batches_is_what_is_measured_where_it_is_given(
    model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code, shown, said = run(capfd, "nets.py:measured", "--out", "out", "--keep", "params=0.5", "--json")
    assert code == 0, said
    found = json.loads(shown)["trade_off"]
    assert (found["quality"], found["higher_is_better"]) == ("accuracy", True)
    assert 0 <= found["dense"] <= 1 and (8 * found["dense"]).is_integer()


def test_what_a_recipe_refuses_is_told_and_the_others_go_on(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, shown, said = run(capfd, model, "--out", "out", "--keep", "params=0.5", "--recipes", "cfsp,magnitude")
    assert code == 0, said
    assert re.search(r"^cfsp at params=0\.5: .*that are repeated", shown, re.M)
    assert re.search(r"^magnitude +params=0\.5", shown, re.M)


def test_a_changed_setting_or_model_is_noticed(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    given = (model, "--out", "out", "--keep", "params=0.5")
    assert run(capfd, *given)[0] == 0
    before = Path("out/points.jsonl").read_bytes()
    code, _, said = run(capfd, *given, "--round-to", "4")
    assert code == 2 and "made with --round-to 1, which is 4 now" in said
    code, _, said = run(capfd, "nets.py:measured", *given[1:])
    assert code == 2 and "a model of content" in said
    Path("nets.py").write_text(MODEL + "\n")
    code, _, said = run(capfd, *given)
    assert code == 2 and "a model of content" in said and said.count("\n") == 1
    assert Path("out/points.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--keep", "params=0.9,1.5"), "params=1.5 is out of range"),
        (("--keep", "params=0.9,0"), "params=0 is out of range"),
        (("--keep", "params=0.9,x"), "'x' is not a number"),
        (("--keep", "params"), "give shares of one of params, macs, bytes"),
        (("--keep", "size=0.5"), "give shares of one of params, macs, bytes"),
        (("--keep", "params=0.5", "--recipes", "magnitud"), "unknown recipe or score 'magnitud': did you mean 'magnitude'"),
        (("--keep", "params=0.5", "--recipes", "magnitude,,obs"), "give names with commas between"),
        (("--keep", "params=0.5", "--only", "nowhere*"), "--only 'nowhere*' names no axis"),
        (("--keep", "params=0.5", "--data", "nowhere.txt"), "nowhere.txt can't be read"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_leaves_nothing(
    given: tuple[str, ...], says: str, model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code, shown, said = run(capfd, model, "--out", "out", *given)
    assert code == (7 if "can't be read" in says else 2) and not shown
    assert says in said and said.count("error:") == 1 and said.count("\n") == 1
    assert not Path("out").exists()


def test_without_data_it_is_how_far_outputs_move(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, shown, said = run(capfd, "nets.py:bare", "--out", "out", "--keep", "params=0.8,0.4")
    assert code == 0, said
    assert (
        "output shift on the example inputs, as no data were given (a share of the outputs' length), lower is better"
        in shown
    )
    dense, mild, strong = (point["quality"] for point in json.loads(Path("out/sweep.json").read_text())["points"])
    assert dense == 0 < mild < strong


@pytest.mark.parametrize(
    ("model_of", "says"),
    [
        ("nets.py:odd", "gives a float as 'accuracy'"),
        ("nets.py:nothing", "has no function 'nothing'"),
        ("nowhere.onnx", "nowhere.onnx"),
        ("nowhere", "nowhere"),
    ],
)
def test_models_that_cannot_be_swept_are_refused(
    model_of: str, says: str, model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code, shown, said = run(capfd, model_of, "--out", "out", "--keep", "params=0.5")
    assert code == (7 if model_of == "nowhere.onnx" else 2) and says in said and not shown and not Path("out").exists()


def test_an_interruption_says_what_is_kept(
    model: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Maker.__call__

    def interrupted(self: Maker, point: object) -> object:
        if "magnitude" in str(point):
            raise KeyboardInterrupt
        return make(self, point)  # type: ignore[arg-type]

    monkeypatch.setattr(Maker, "__call__", interrupted)
    code, _, said = run(capfd, model, "--out", "out", "--keep", "params=0.5")
    assert code == interruption.CODE
    assert "interrupted: what was made is kept in out/points.jsonl" in said
    monkeypatch.undo()
    assert interruption.sentence() == interruption.SENTENCE


@pytest.mark.slow
def test_processes_give_what_one_gives(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    given = ["sweep", str(Path(model).resolve()), "--keep", "params=0.8,0.5", "--recipes", "magnitude,obs", "--json"]
    found = []
    for jobs in ("1", "2"):
        assert cli.main([*given, "--out", f"out{jobs}", "--jobs", jobs]) == 0
        found.append(json.loads(capfd.readouterr().out)["trade_off"])
    assert [(t["name"], t["share"]) for t in found[0]["trials"]] == [
        (t["name"], t["share"]) for t in found[1]["trials"]
    ]
    assert [t["quality"] for t in found[0]["trials"]] == pytest.approx([t["quality"] for t in found[1]["trials"]])


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file, and a folder of batches for it."""
    monkeypatch.chdir(tmp_path)
    onnx.save(mlp(), "model.onnx")
    Path("batches").mkdir()
    (given,) = onnx.load("model.onnx").graph.input
    width = given.type.tensor_type.shape.dim[1].dim_value
    for seed in range(2):
        x = np.random.default_rng(seed).standard_normal((4, width), np.float32)
        np.savez(f"batches/{seed}.npz", **{given.name: x})  # type: ignore[arg-type]
    return "model.onnx"


def test_a_file_is_swept_too(file: str, capfd: pytest.CaptureFixture[str]) -> None:
    given = (
        file,
        "--keep",
        "macs=0.8,0.5",
        "--recipes",
        "magnitude,obs",
        "--data",
        "batches",
        "--out",
        "out",
        "--json",
    )
    code, shown, _ = run(capfd, *given)
    assert code == 0
    dense, *points = json.loads(shown)["points"]
    assert (
        dense["quality"] == 0 and dense["figure"]["name"] == "output shift" and "2 batches" in dense["figure"]["data"]
    )
    assert [p["point"]["name"] for p in points] == ["magnitude", "magnitude", "obs", "obs"]
    for one in points:
        assert one["cost"]["macs"] <= one["point"]["share"] * dense["cost"]["macs"]
        assert one["quality"] > 0 and one["error"] < 1e-4 and one["ms"] > 0 and one["dense_ms"] > 0
    assert points[1]["quality"] > points[0]["quality"] > points[2]["quality"]  # more goes; least squares makes up
    code, shown, said = run(capfd, *given[:-1])
    assert code == 0 and "5 of 5 points are there already" in said
    assert "time" in shown and (Path("out") / "front.svg").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--recipes", "taylor", "--data", "batches"), "'taylor' needs gradients, which an ONNX file doesn't give"),
        (("--recipes", "obs"), "'obs' needs data"),
        (("--data", "model.onnx"), "is no folder: an ONNX file takes one of .npz files"),
        (("--device", "cuda"), "--device cuda is for PyTorch models"),
    ],
)
def test_what_a_file_can_not_be_swept_by_is_refused(
    given: tuple[str, ...], says: str, file: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code, shown, said = run(capfd, file, "--keep", "params=0.5", "--out", "out", *given)
    assert code == 2 and says in said and not shown and not Path("out").exists()


CHILDREN = """
import os, time
from pathlib import Path
from importance.side_by_side import made

def work(number):
    Path(f"{os.getpid()}.pid").touch()
    time.sleep(0.1 if not number else 60)
    return 1

if __name__ == "__main__":
    list(made([0, 1, 2], work, lambda result: 1, 2))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
def test_processes_end_with_the_one_that_began_them(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(CHILDREN)
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    began = subprocess.Popen([sys.executable, "work.py"], cwd=tmp_path, env=environment)
    numbers = set[str]()
    until = time.monotonic() + 120
    while len(numbers) < 2 and time.monotonic() < until:
        numbers = {path.stem for path in tmp_path.glob("*.pid")}
        time.sleep(0.2)
    began.kill()
    began.wait()
    assert len(numbers) == 2
    while any(_works(number) for number in numbers) and time.monotonic() < until:
        time.sleep(0.2)
    assert not any(_works(number) for number in numbers)


def _works(number: str) -> bool:
    """Is a process of that number there that hasn't ended?"""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


GUESSING = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 5))
x = torch.randn(100, 4)
def build():
    y = model(x).argmax(1)
    accuracy = lambda output, batch: float((output.argmax(1) == batch[1]).float().mean())
    given = {"model": model, "args": (x[:2],), "batches": [(x, y)], "held_out": [(x, (y + 1) % 5)]}
    return given | {"accuracy": accuracy, "loss": lambda output, batch: nn.functional.cross_entropy(output, batch[1])}
"""


def test_a_model_that_guesses_is_said_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "five.py").write_text(GUESSING)
    command = [
        "sweep",
        f"{tmp_path / 'five.py'}:build",
        "--keep",
        "params=0.5",
        "--out",
        str(tmp_path / "out"),
        "--jobs",
        "1",
    ]
    assert cli.main(command) == 0
    assert "dense: accuracy 0 is no better than guessing, which gets 0.2, give or take 0.08" in capsys.readouterr().out
