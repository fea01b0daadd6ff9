"""Depth in the command and in pictures."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import depgraph
from depgraph.cli import app
from depgraph.errors import DataError, ScoreError
from importance import depth

MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(16), nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    def forward(self, x): return x + self.mlp(self.norm(x))

def deep():
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    model = nn.Sequential(nn.Linear(8, 16), *[Block() for _ in range(4)], nn.Linear(16, 4))
    return {"model": model, "args": (x,), "batches": [x], "loss": lambda output, batch: output.square().mean()}

def plain(): return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "models.py"
    path.write_text(MODEL)
    return path


def run(*words: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        return CliRunner().invoke(app, list(words))


def test_a_number_of_blocks_is_left_out(model: Path, tmp_path: Path) -> None:
    done = run("prune", f"{model}:deep", "--depth", "2", "--depth-score", "sleb", "--out", str(tmp_path / "small"))
    assert done.exit_code == 0 and "left out: " in done.output
    assert len(json.loads((tmp_path / "small" / "plan.json").read_text())["branches"]) == 2


@pytest.mark.parametrize(
    ("words", "most"),
    [
        (("--keep", "params=0.6", "--depth", "1"), 0.6),
        (("--keep", "params=0.5", "--depth-score", "shortgpt:branches"), 0.5),
        (("--keep", "macs=0.6", "--scope", "depth", "--depth-score", "finercut"), 0.6),
        (("--keep", "params=0.6", "--scope", "both", "--score", "taylor"), 0.6),
    ],
)
def test_depth_and_width_meet_a_share(model: Path, words: tuple[str, ...], most: float) -> None:
    done = run("prune", f"{model}:deep", *words, "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    metric = words[1].partition("=")[0]
    assert found["after"][metric] <= most * found["before"][metric]


def test_inspect_lists_branches_by_depth(model: Path) -> None:
    done = run("inspect", f"{model}:deep", "--depth", "--json")
    found = json.loads(done.stdout)
    assert [branch["name"] for branch in found["branches"]] == ["1.mlp", "2.mlp", "3.mlp", "4.mlp"]
    assert [block["branches"] for block in found["blocks"]] == [["1.mlp"], ["2.mlp"], ["3.mlp"], ["4.mlp"]]
    assert "4 blocks and 4 branches can be left out" in run("inspect", f"{model}:deep", "--depth").output


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


def test_a_picture_needs_matplotlib_or_is_drawn(tmp_path: Path) -> None:
    graph = depgraph.trace(nn.Sequential(Branch(), Branch(), nn.Linear(4, 2)), torch.randn(2, 4))
    order = depth.OneShot({"0.inner": 0.0, "1.inner": 1.0})(graph, 2)
    pictures = {"plan.png": graph.cut_plan(branches=["0.inner"]).plot, "order.png": order.plot}
    for name, draw in pictures.items():
        if importlib.util.find_spec("matplotlib") is None:
            with pytest.raises(DataError, match=r"pip install 'depgraph\[plot\]'"):
                draw(tmp_path / name)
            assert not any(tmp_path.iterdir())
        else:
            draw(tmp_path / name)
            assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("slab", "slab"),
        ("sleb:branches", "sleb ranks blocks"),
        ("shortgpt:layers", "no kind of part"),
        ("loss", "batches"),
    ],
)
def test_a_wrong_name_of_a_depth_score_is_said(name: str, text: str) -> None:
    with pytest.raises(ScoreError, match=text):
        depth.depth_named(name)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "--depth 2"),
        (("--depth", "9"), "can't be left out: 4 of those"),
        (("--depth", "1", "--recipe", "best", "--keep", "params=0.5"), "chooses groups only"),
        (("--depth", "1", "--scope", "both", "--keep", "params=0.5"), "leave out --depth"),
    ],
)
def test_what_contradicts_is_refused(model: Path, words: tuple[str, ...], text: str) -> None:
    done = run("prune", f"{model}:deep", *words, "--dry-run")
    shown = f"{done.output} {done.exception}"
    assert done.exit_code != 0 and text in " ".join(shown.replace("│", " ").split())


def test_a_model_without_branches_is_refused(model: Path) -> None:
    done = run("prune", f"{model}:plain", "--depth", "1", "--depth-score", "magnitude", "--dry-run")
    assert done.exit_code != 0 and "no branches or blocks that could be left out" in f"{done.output} {done.exception}"


def test_a_recipe_in_steps_has_a_report_with_its_steps(model: Path, tmp_path: Path) -> None:
    given = ["prune", f"{model}:deep", "--recipe", "adapt_pruner", "--keep", "params=0.88", "--report"]
    done = run(*given, "--out", str(tmp_path / "out"), "--json")
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    before, after = told["before"]["params"], told["after"]["params"]
    assert [step["number"] for step in told["steps"]] == [1, 2, 3] and told["making"]["recipe"] == "adapt_pruner"
    shares = [step["left"]["params"] for step in told["steps"]]
    assert sorted(shares, reverse=True) == shares and shares[-1] == after / before <= 0.88
    assert all(step["left"]["params"] <= step["keep"]["params"] for step in told["steps"])
    assert all(step["error"] < 1e-4 for step in told["steps"])
    narrowed = [layer for layer in told["layers"] if layer["out"][1] < layer["out"][0]]
    assert narrowed and sum(layer["params"][1] for layer in told["layers"]) < sum(
        layer["params"][0] for layer in told["layers"]
    )
    assert sum(axis["removed"] for axis in told["axes"]) == sum(o[0] - o[1] for o in (y["out"] for y in narrowed))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>Steps</h2>" in page and page.count("to keep at most") == 1
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert sum(len(axis["removed"]) for axis in plan["axes"].values()) == sum(axis["removed"] for axis in told["axes"])
    assert run(*given[:-1], "--dry-run").exit_code == 2


def test_the_report_of_one_shot_says_what_was_left_out(model: Path, tmp_path: Path) -> None:
    given = [
        "prune",
        f"{model}:deep",
        "--keep",
        "params=0.6",
        "--depth",
        "1",
        "--report",
        "--out",
        str(tmp_path / "out"),
    ]
    assert run(*given).exit_code == 0
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert not told["steps"] and len([part for part in told["dropped"] if part["gone"]]) == 1
    assert told["making"]["target"] == "params=0.6, left_out=1"
    assert "left out" in (tmp_path / "out" / "report.html").read_text()
