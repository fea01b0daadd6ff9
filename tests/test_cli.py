"""The command from outside: what it prints, what it leaves, and the exit code and one sentence of every error."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import depgraph
import importance
from depgraph import cli
from depgraph.cli import prune
from depgraph.cli.data import Amount, measured, perplexity, text_data
from depgraph.cli.inputs import make_inputs
from depgraph.cli.models import Loaded
from depgraph.cli.output import CODES
from depgraph.errors import CaptureError, DataError, ModelError

from .zoo import ZOO

ROOT = Path(__file__).resolve().parent.parent

UNIFORM = ("--allocation", "uniform")
MODELS = '''
import torch
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(14, 44), nn.ReLU(), nn.Linear(44, 28), nn.GELU(), nn.Linear(28, 5))

def pair(): return mlp(), torch.randn(2, 14)
def triple(): return mlp(), (), {"input": torch.randn(2, 14)}
def no_batches(): return {"model": mlp(), "args": (torch.randn(2, 14),)}

def loud():
    print("a word on stdout")
    return pair()

class Loss(nn.Module):
    """Returns its own loss."""
    def __init__(self):
        super().__init__()
        self.body = mlp()
    def forward(self, x, labels=None):
        y = self.body(x)
        return {"loss": nn.functional.cross_entropy(y, labels), "logits": y} if labels is not None else {"logits": y}

def with_batches():
    batch = {"x": torch.randn(8, 14), "labels": torch.randint(5, (8,))}
    return {"model": Loss(), "args": (torch.randn(2, 14),), "batches": [batch, batch]}

def misfit(): return mlp(), torch.randn(2, 13)
def too_many(): return mlp(), (torch.randn(2, 14), torch.randn(2, 14))
def no_axes(): return nn.Linear(14, 5), torch.randn(2, 14)
def no_parameters(): return nn.ReLU(), torch.randn(2, 14)

def with_nan():
    model = mlp()
    with torch.no_grad():
        model[0].weight[3, 2] = float("nan")
    return model, torch.randn(2, 14)

def sparse():
    model = mlp()
    model[2].weight = nn.Parameter(model[2].weight.detach().to_sparse())
    return model, torch.randn(2, 14)

def quantised():
    model = mlp()
    model[2].weight = nn.Parameter(torch.zeros(28, 44, dtype=torch.int8), requires_grad=False)
    return model, torch.randn(2, 14)

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(14, 20), nn.Linear(20, 5)
    def forward(self, x):
        y = self.first(x)
        if y.sum() > 0:  # here
            y = y * 2
        return self.second(y)

def branching(): return Branching(), torch.randn(2, 14)

class Literal(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(14, 20), nn.Linear(20, 5)
    def forward(self, x):
        return self.second(self.first(x).view(-1, 20))

def literal(): return Literal(), torch.randn(2, 14)

def broken(): return undefined
def leaving(): raise SystemExit
def odd(): return 3
def with_loss():
    def loss(output, batch):
        return nn.functional.cross_entropy(output, batch[1])
    batch = (torch.randn(8, 14), torch.randint(5, (8,)))
    return {"model": mlp(), "args": (batch[0],), "batches": [batch], "loss": loss}

def without_loss():
    batch = torch.randn(8, 14)
    return {"model": mlp(), "args": (batch,), "batches": [batch]}

def wrong_loss(): return {**with_loss(), "loss": 3}

def wrong_batches(): return {**with_loss(), "batches": 3}

def noisy():
    import os
    os.write(1, b"noise")
    return pair()

def without_inputs(): return {"model": mlp()}
'''


@dataclass(frozen=True)
class Done:
    """What a run of the command left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def sentence(self) -> str:
        """The error: exactly one line on stderr, and nothing on stdout."""
        assert self.out == ""
        (line,) = self.err.splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: ")


Run = Callable[..., Done]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs the command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")

    def call(*arguments: object) -> Done:
        capsys.readouterr()
        code = cli.main([str(a) for a in arguments])
        printed = capsys.readouterr()
        return Done(code, printed.out, printed.err)

    return call


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of functions that return models."""
    file = tmp_path_factory.mktemp("given") / "given.py"
    file.write_text(MODELS)
    return file


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder with a small language model and a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return file


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# What works


def test_inspect_prints_a_line_for_axes_alike(run: Run, llama: Path) -> None:
    done = run("inspect", llama)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("LlamaForCausalLM: ")
    lines = done.out.splitlines()
    (k,) = (k for k, line in enumerate(lines) if "gate_proj" in line)
    assert lines[k].strip() == "model.layers.{0-1}.mlp.gate_proj.weight:0"
    what, rest = lines[k - 1].split(", made by 2 layers")
    assert (what, rest.split()[:3]) == ("neurons of model.layers.{0-1}.mlp", ["2", "48", "48"])
    assert len(lines) < 30


def test_inspect_long_is_the_graph_as_text(run: Run, given: Path) -> None:
    done = run("inspect", f"{given}:pair", "--long")
    assert done.out.startswith("Sequential: 2 axes;")
    assert "axis 0.weight:0\n  groups   44, all may go but one\n" in done.out


def test_inspect_json_is_all_that_is_on_stdout(run: Run, given: Path) -> None:
    data = run("inspect", f"{given}:loud", "--json").json
    assert data["model"] == "Sequential"
    assert [(axis["name"], axis["groups"], axis["exact"]) for axis in data["axes"]] == [
        ("0.weight:0", 44, True),
        ("2.weight:0", 28, True),
    ]
    assert data["cost"]["params"] == 14 * 44 + 44 + 44 * 28 + 28 + 28 * 5 + 5
    assert {(fixed["target"], fixed["dim"]) for fixed in data["fixed_dims"]} >= {("0.weight", 1), ("4.weight", 0)}


def test_inspect_json_says_what_axes_are(run: Run, llama: Path) -> None:
    data = run("inspect", llama, "--json").json
    named = {axis["name"]: axis for axis in data["axes"]}
    assert {axis["role"] for axis in named.values()} >= {"residual stream", "KV heads", "neurons"}
    neurons = next(family["axes"] for family in data["families"] if family["what"].startswith("neurons of"))
    assert len(neurons) == 2
    assert all(named[name]["saves"]["params"] == 47 * named[name]["one_saves"]["params"] for name in neurons)
    assert [fixed["heading"].partition(":")[0] for fixed in data["fixed"]] == ["tables looked up by number", "outputs"]
    assert data["layers"][0]["name"] == "model.embed_tokens"


def test_inspect_says_what_stays_and_why(run: Run, given: Path) -> None:
    done = run("inspect", f"{given}:pair")
    assert re.search(r"^inputs: what the model is fed has this size +1 +0\.weight\[1\]", done.out, re.MULTILINE)
    assert re.search(r"^neurons of 0 +1 +44 +44 ", done.out, re.MULTILINE)


def test_inspect_says_how_the_model_was_captured(run: Run, given: Path) -> None:
    said = "captured on the values of the example, as the code depends on values at "
    assert said in run("inspect", f"{given}:branching").out
    assert run("inspect", f"{given}:branching", "--json").json["note"].startswith(said)
    assert "captured" not in run("inspect", f"{given}:pair").out


def test_inspect_writes_a_page_and_overwrites_none(run: Run, given: Path, tmp_path: Path) -> None:
    done = run("inspect", f"{given}:pair", "--html", "model.html")
    assert (done.code, done.err) == (0, "")
    assert "2 axes" in done.out
    page = (tmp_path / "model.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert left_in(tmp_path) == {"model.html"}
    again = run("inspect", f"{given}:pair", "--html", "model.html")
    assert again.code == 7
    assert again.sentence == "model.html exists: name another file with --html"
    assert run("inspect", f"{given}:pair", "--html", "none/model.html").code == 7
    assert left_in(tmp_path) == {"model.html"}


def test_inspect_on_the_meta_device_reads_no_weights(run: Run, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    data = run("inspect", tmp_path, "--device", "meta", "--json").json
    assert data == run("inspect", llama, "--json").json


@pytest.mark.parametrize("function", ["pair", "triple", "no_batches"])
def test_a_function_may_return_its_model_in_three_ways(run: Run, given: Path, function: str) -> None:
    assert len(run("inspect", f"{given}:{function}", "--json").json["axes"]) == 2


def test_prune_writes_a_smaller_model_that_loads(run: Run, llama: Path, text: Path, tmp_path: Path) -> None:
    done = run(
        "prune", llama, "--keep", "params=0.7", "--score", "taylor", "--data", text,
        "--length", 32, "--batches", 2, "--form", "module", "--out", "small",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    assert "check: equal: error" in done.out
    assert re.search(r"perplexity on \d+ held-out tokens: \d+\.\d+ -> \d+\.\d+", done.out)
    files = {"depgraph.json", "config.json", "model.safetensors", "tokenizer.json", "plan.json"}
    assert left_in(tmp_path / "small") >= files
    assert left_in(tmp_path) == {"small", "text.txt"}
    before, after = AutoModelForCausalLM.from_pretrained(llama), depgraph.checkpoint.load(tmp_path / "small")
    assert type(after) is LlamaForCausalLM
    assert 0.6 < after.num_parameters() / before.num_parameters() <= 0.7
    plan = json.loads((tmp_path / "small" / "plan.json").read_text())
    assert sum(len(axis["removed"]) for axis in plan["axes"].values()) > 0


def test_prune_json_tells_what_was_done(run: Run, given: Path, tmp_path: Path) -> None:
    data = run("prune", f"{given}:loud", "--keep", "macs=0.6,params=0.8", "--out", "small", "--json").json
    assert data["kept"]["macs"] <= 0.6
    assert data["after"]["params"] <= 0.8 * data["before"]["params"]
    assert data["check"]["error"] <= data["check"]["tolerance"]
    assert not data["check"]["vacuous"]
    assert any(axis["left"] < axis["groups"] for axis in data["axes"])
    assert set(data["files"]) == left_in(tmp_path / "small")


def test_a_saved_module_of_ones_own_needs_its_base(run: Run, given: Path) -> None:
    run("prune", f"{given}:pair", "--keep", "params=0.5", "--out", "small")
    assert "--base file.py:function" in run("inspect", "small").sentence
    found = run("inspect", "small", "--base", f"{given}:pair", "--json").json
    assert found["cost"]["params"] <= 0.5 * run("inspect", f"{given}:pair", "--json").json["cost"]["params"]


def test_dry_run_writes_nothing(run: Run, given: Path, tmp_path: Path) -> None:
    done = run("prune", f"{given}:pair", "--keep", "params=0.5", "--dry-run", "--out", "small")
    assert done.code == 0
    assert "dry run" in done.out
    assert left_in(tmp_path) == set()


def test_batches_of_a_function_feed_the_score(run: Run, given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    named = importance.named

    def spy(name: str, **options: Any) -> Any:
        sizes.extend(len(batch["x"]) for batch in options["batches"])
        return named(name, **options)

    monkeypatch.setattr(importance, "named", spy)
    done = run("prune", f"{given}:with_batches", "--keep", "params=0.5", "--dry-run", "--score", "taylor")
    assert (done.code, sizes) == (0, [8, 8])


def test_a_function_may_bring_the_loss_of_a_classifier(run: Run, given: Path) -> None:
    wish = ("--keep", "params=0.5", "--dry-run", "--score", "taylor")
    assert run("prune", f"{given}:with_loss", *wish).code == 0
    done = run("prune", f"{given}:without_loss", *wish)
    assert "returns a scalar (to the command: as 'loss' in the dict of file.py:function)" in done.sentence


def test_options_reach_the_plan(run: Run, given: Path) -> None:
    wish = ("prune", f"{given}:pair", "--keep", "params=0.7", "--dry-run", "--json")
    left = {axis["name"]: axis["left"] for axis in run(*wish, "--protect", "0.*", "--round-to", 4).json["axes"]}
    assert left["0.weight:0"] == 44
    assert left["2.weight:0"] < 28
    assert left["2.weight:0"] % 4 == 0
    left = {axis["name"]: axis["left"] for axis in run(*wish, "--only", "0.weight:0").json["axes"]}
    assert left["2.weight:0"] == 28


def test_an_allocation_spreads_the_budget(run: Run, given: Path) -> None:
    wish = ("prune", f"{given}:pair", "--keep", "params=0.6", "--dry-run", "--json")
    plain, uniform, pooled = (run(*wish, *more).json["axes"] for more in ((), UNIFORM, ("--allocation", "cost")))
    assert plain == uniform != pooled
    done = run(*wish, "--allocation", "cfsp")
    assert "allocation 'cfsp' needs importances" in done.sentence
    assert done.code == 2
    done = run("prune", "nowhere", "--keep", "params=0.6", "--out", "small", "--allocation", "unifrom")
    assert "did you mean 'uniform'" in done.sentence


def test_a_base_that_nothing_takes_is_refused(run: Run, given: Path) -> None:
    done = run("inspect", f"{given}:pair", "--base", f"{given}:pair")
    assert done.code == 2 and "--base is the unpruned module of a folder saved by depgraph" in done.sentence


def test_a_recipe_takes_no_score_beside_it(run: Run) -> None:
    done = run("prune", "nowhere", "--keep", "params=0.6", "--dry-run", "--recipe", "flap", "--score", "taylor")
    assert done.code == 2 and "--recipe flap scores by itself: leave out --score taylor" in done.sentence


def test_random_scores_depend_on_the_seed_alone(run: Run, given: Path) -> None:
    wish = ("prune", f"{given}:pair", "--keep", "params=0.5", "--score", "random", "--scope", "global")
    wish += ("--dry-run", "--json", "--seed")
    first, again, other = (run(*wish, seed).json["axes"] for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.slow
def test_prune_and_export_write_onnx(run: Run, given: Path, tmp_path: Path) -> None:
    done = run("prune", f"{given}:pair", "--keep", "params=0.5", "--out", "small", "--onnx", "--json")
    assert done.json["onnx"]["max_rel_error"] < 1e-4
    assert Path(done.json["onnx"]["path"]) == Path("small") / "model.onnx"
    assert (tmp_path / "small" / "model.onnx").is_file()
    done = run("export", "small", "--base", f"{given}:pair", "--out", "again.onnx")
    assert (done.code, done.err) == (0, "")
    assert (tmp_path / "again.onnx").is_file()
    assert "exists: name another file" in run("export", f"{given}:pair", "--out", "again.onnx").sentence
    done = run("export", f"{given}:pair")
    assert ("--out FILE says where" in done.sentence, done.code) == (True, 2)


def test_help_lists_the_exit_codes(run: Run) -> None:
    done = run("--help")
    assert done.code == 0
    assert all(f"{code} " in done.out for code in CODES)
    assert run("prune", "--help").code == 0


def test_debug_shows_the_traceback(run: Run, given: Path) -> None:
    done = run("inspect", f"{given}:misfit", "--debug")
    assert done.code == 3
    assert "Traceback" in done.err
    assert done.err.rstrip().splitlines()[-1].startswith("error: ")


# Bad input: (function, exit code, what the sentence must say)


@pytest.mark.parametrize(
    ("function", "code", "says"),
    [
        ("misfit", 3, r"doesn't run on these example inputs \(float32 \[2, 13\]\)"),
        ("too_many", 3, r"doesn't run on these example inputs \(float32 \[2, 14\], float32 \[2, 14\]\)"),
        ("sparse", 3, r"parameter '2\.weight' is sparse"),
        ("quantised", 3, r"parameter '2\.weight' is quantised"),
        ("no_axes", 3, r"Linear has no axis that could lose a group: .*output 0"),
        ("no_parameters", 3, r"ReLU has no axis that could lose a group: it has no parameters"),
        ("with_nan", 2, r"parameter '0\.weight' .*NaN"),
        ("broken", 2, r"failed with NameError: name 'undefined' is not defined \(at given\.py:\d+\)"),
        ("leaving", 2, r"failed with SystemExit \(at given\.py:\d+\)"),
        ("odd", 2, r"must return \(module, args\).*it returned a int"),
        ("wrong_loss", 2, r"gives a int as 'loss': give a function of output and batch"),
        ("wrong_batches", 2, r"gives a int as 'batches': give a list of batches"),
        ("without_inputs", 2, r"must return .*it returned a dict with 'model'"),
        ("par", 2, r"has no function 'par': did you mean pair"),
    ],
)
def test_models_that_cannot_be_pruned(
    run: Run, given: Path, tmp_path: Path, function: str, code: int, says: str
) -> None:
    done = run("prune", f"{given}:{function}", "--keep", "params=0.5", "--out", "small")
    assert re.search(says, done.sentence), done.sentence
    assert done.code == code
    assert left_in(tmp_path) == set()


def test_weights_that_are_no_numbers_are_never_written(run: Run, given: Path, tmp_path: Path) -> None:
    says = "parameter '0.weight' holds NaN or infinite values: repair or reload the weights"
    wish = ("--keep", "params=0.5", "--score", "random", "--out", "small", "--onnx")
    assert run("prune", f"{given}:with_nan", *wish).sentence == says
    done = run("export", f"{given}:with_nan", "--out", "m.onnx")
    assert (done.sentence, done.code) == (says, 6)
    assert left_in(tmp_path) == set()


def test_data_dependent_control_flow_is_named_with_its_line(run: Run, given: Path) -> None:
    line = 1 + MODELS.splitlines().index("        if y.sum() > 0:  # here")
    done = run("inspect", f"{given}:branching", "--strict")
    assert done.code == 3
    assert f"control flow depends on the values of a tensor at given.py:{line}" in done.sentence
    done = run("inspect", f"{given}:branching")
    assert done.code == 0
    assert f"as the code depends on values at given.py:{line}" in " ".join(done.out.split())


def test_the_api_says_the_same() -> None:
    with pytest.raises(CaptureError, match=r"Linear doesn't run on these example inputs \(float32 \[2, 3\]\)"):
        depgraph.trace(torch.nn.Linear(4, 5), torch.randn(2, 3))


@pytest.mark.parametrize(
    ("keep", "code", "says"),
    [
        ("params=0.001", 4, "can't be met"),
        ("params=1", 2, "params=1 is out of range"),
        ("params=1.2", 2, "params=1.2 is out of range"),
        ("params=0", 2, "params=0 is out of range"),
        ("params=-0.5", 2, "params=-0.5 is out of range"),
        ("params=nan", 2, "is not a number"),
        ("params=most", 2, "'most' is not a number"),
        ("parms=0.5", 2, "give shares such as params=0.7"),
        ("0.5", 2, "give shares such as params=0.7"),
        ("params=0.5,params=0.6", 2, "gives params twice"),
    ],
)
def test_targets_that_cannot_be(run: Run, given: Path, tmp_path: Path, keep: str, code: int, says: str) -> None:
    done = run("prune", f"{given}:pair", "--keep", keep, "--out", "small")
    assert says in done.sentence
    assert done.code == code
    assert left_in(tmp_path) == set()


def test_a_target_below_the_floor_says_what_the_floor_allows(run: Run, given: Path) -> None:
    done = run("prune", f"{given}:pair", "--keep", "params=0.5", "--floor", 0.9, "--out", "small")
    assert re.search(r"allow params=0\.8\d+ at the least", done.sentence)
    assert done.code == 4


def test_an_unknown_score_is_told_before_anything_is_loaded(run: Run) -> None:
    done = run("prune", "nowhere", "--keep", "params=0.5", "--score", "tailor", "--out", "small")
    assert "did you mean 'taylor'" in done.sentence
    assert done.code == 2


def test_scores_that_need_data_say_so(run: Run, llama: Path, given: Path) -> None:
    wish = ("--keep", "params=0.5", "--score", "taylor", "--out", "small")
    assert "needs data: give a text file with --data" in run("prune", llama, *wish).sentence
    assert "return a dict with 'batches'" in run("prune", f"{given}:pair", *wish).sentence
    assert run("prune", f"{given}:pair", *wish).code == 2
    deep = ("--keep", "params=0.5", "--depth", "1", "--scope", "global", "--out", "small")
    assert "--depth-score shortgpt needs data" in run("prune", llama, *deep).sentence


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (None, 7, "can't be read: No such file"),
        (b"", 2, "is empty"),
        (b" \n ", 2, "is empty"),
        (b"\xff\xfe\x00", 2, "isn't UTF-8 text"),
        (b"short", 2, "has 5 tokens, fewer than one window of 64"),
    ],
)
def test_data_files_that_cannot_be_used(
    run: Run, llama: Path, tmp_path: Path, content: bytes | None, code: int, says: str
) -> None:
    file = tmp_path / "data.txt"
    if content is not None:
        file.write_bytes(content)
    done = run("prune", llama, "--keep", "params=0.5", "--score", "taylor", "--data", file, "--out", "small")
    assert says in done.sentence
    assert done.code == code
    assert left_in(tmp_path) <= {"data.txt"}


def test_text_needs_a_tokenizer_and_room(run: Run, llama: Path, given: Path, text: Path, tmp_path: Path) -> None:
    wish = ("--keep", "params=0.5", "--score", "taylor", "--data", text, "--out", "small")
    assert "needs a tokenizer" in run("prune", f"{given}:pair", *wish).sentence
    assert "--length 65 is more than the 64 positions" in run("prune", llama, *wish, "--length", 65).sentence
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((llama / name).read_bytes())
    assert "needs a tokenizer" in run("prune", bare, *wish).sentence


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("nowhere", "nowhere doesn't exist"),
        ("nowhere.py:model", "there is no file nowhere.py"),
        ("nowhere.py", "names no function"),
        (".", ". has no config.json"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "export"])
def test_models_that_are_none(run: Run, command: str, spec: str, says: str) -> None:
    done = run(command, spec)
    assert says in done.sentence
    assert done.code == 2


def test_a_folder_with_broken_weights_is_no_model(run: Run, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    done = run("inspect", ".")
    assert "can't be loaded with transformers" in done.sentence
    assert done.code == 7
    (tmp_path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:1000])
    done = run("inspect", ".")
    assert "can't be loaded with transformers" in done.sentence
    assert done.code == 7


def test_weights_that_do_not_fit_the_config_are_named(run: Run, llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text()) | {"intermediate_size": 40}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    done = run("inspect", ".")
    assert re.search(
        r"'model\.layers\.0\.mlp\.down_proj\.weight' has shape \[32, 48\] there, .*\[32, 40\]", done.sentence
    )
    assert done.code == 2


def test_an_unknown_class_is_named(run: Run, llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text()) | {"architectures": ["NeverHeardOf"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "names 'NeverHeardOf'" in run("inspect", ".").sentence


def test_a_pattern_that_names_nothing_is_a_slip(run: Run, given: Path) -> None:
    for option in ("--protect", "--only"):
        done = run("prune", f"{given}:pair", "--keep", "params=0.5", "--dry-run", option, "nothing.*")
        assert f"{option} 'nothing.*' names no axis" in done.sentence
        assert done.code == 2


def test_a_folder_that_is_not_empty_stays_as_it_is(run: Run, given: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    done = run("prune", "nowhere", "--keep", "params=0.5", "--out", "full")
    assert "the folder full exists and isn't empty" in done.sentence
    assert done.code == 7
    assert "file is a file" in run("prune", "nowhere", "--keep", "params=0.5", "--out", "file").sentence
    assert left_in(tmp_path / "full") == {"mine"}


def test_an_empty_folder_is_filled(run: Run, given: Path, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    assert run("prune", f"{given}:pair", "--keep", "params=0.5", "--out", "small").code == 0
    assert "model.safetensors" in left_in(tmp_path / "small")
    assert left_in(tmp_path) == {"small"}


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 7, "can't be written: No space left on device"),
        (OSError(errno.EROFS, "Read-only file system"), 7, "can't be written: Read-only file system"),
        (depgraph.errors.CheckError("the pruned model differs"), 5, "the pruned model differs"),
        (depgraph.errors.ExportError("ONNX Runtime differs"), 6, "ONNX Runtime differs"),
        (depgraph.errors.CutError("can't be expressed"), 3, "can't be expressed"),
        (ZeroDivisionError("oh"), 1, "unexpected ZeroDivisionError: oh (run again with --debug for the traceback)"),
    ],
)
def test_a_failure_on_the_way_leaves_nothing(  # noqa: PLR0913  (three fixtures, three parameters)
    run: Run, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, says: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(prune, "_write", fail)
    done = run("prune", f"{given}:pair", "--keep", "params=0.5", "--out", "small")
    assert says in done.sentence
    assert done.code == code
    assert left_in(tmp_path) == set()


def test_errors_name_the_folder_that_was_asked_for(run: Run, given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(loaded: object, plan: object, report: object, folder: Path) -> None:
        raise depgraph.errors.CheckpointError(f"{folder / 'plan.json'} can't be written")

    monkeypatch.setattr(prune, "_write", fail)
    done = run("prune", f"{given}:pair", "--keep", "params=0.5", "--out", "small")
    assert done.sentence == "small/plan.json can't be written"


def test_files_can_be_read_by_whom_the_umask_allows(run: Run, given: Path, llama: Path) -> None:
    before = os.umask(0o027)
    try:
        run("prune", f"{given}:pair", "--keep", "params=0.5", "--out", "small")
        run("prune", llama, "--keep", "params=0.8", "--scope", "uniform", "--out", "plain")
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for folder in ("small", "plain") for path in Path(folder).iterdir()}
    assert modes == dict.fromkeys(modes, 0o640)


def test_weights_that_are_cut_short_or_missing_say_what_to_do(run: Run, given: Path) -> None:
    run("prune", f"{given}:pair", "--keep", "params=0.5", "--out", "small")
    weights = Path("small/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    done = run("inspect", "small", "--base", f"{given}:pair")
    assert done.sentence.endswith("; copy the folder again, or save the model anew")
    weights.unlink()
    done = run("inspect", "small", "--base", f"{given}:pair")
    assert done.sentence.endswith(
        "can't be read: No such file or directory; copy the folder again, or save the model anew"
    )


@pytest.mark.parametrize("step", ["load_model", "_scorer", "measured", "_write"])
def test_an_interruption_leaves_nothing(
    run: Run, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prune, step, interrupted)
    done = run("prune", f"{given}:pair", "--keep", "params=0.5", "--out", "small")
    assert (done.code, done.out, done.err) == (130, "", "interrupted: nothing was written\n")
    assert left_in(tmp_path) == set()


def test_without_arguments_there_is_help_and_no_error(run: Run) -> None:
    done = run()
    assert "Usage: depgraph" in done.out
    assert (done.code, done.err) == (2, "")


def in_shell(line: str, given: Path) -> subprocess.CompletedProcess[str]:
    """A line of bash in which $depgraph is the command and $given the file of models."""
    variables = {"depgraph": f"{sys.executable} -m depgraph", "given": str(given), "PYTHONPATH": str(ROOT)}
    line = f"set -o pipefail; {line}"
    return subprocess.run(["bash", "-c", line], env={**os.environ, **variables}, capture_output=True, text=True)


def test_a_reader_that_has_seen_enough_is_no_error(given: Path) -> None:
    done = in_shell("$depgraph inspect $given:pair | true", given)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_results_that_cannot_be_printed_are_one_sentence(given: Path) -> None:
    done = in_shell("$depgraph inspect $given:pair > /dev/full", given)
    assert done.stderr.startswith("error: the results can't be printed: No space left on device; ")
    assert (done.returncode, done.stderr.count("\n")) == (7, 1)


def test_what_is_written_past_python_stays_out_of_the_json(given: Path) -> None:
    done = in_shell("$depgraph inspect $given:noisy --json", given)
    assert json.loads(done.stdout)["model"] == "Sequential"
    assert done.stderr == "noise"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("inspect",), "Missing argument 'MODEL' (see depgraph inspect --help)"),
        (("inspekt",), "No such command 'inspekt'"),
        (("prune", "m", "--out", "x"), "say what to keep, --keep params=0.7"),
        (("prune", "m", "--keep", "params=0.5"), "--out FOLDER says where"),
        (("prune", "m", "--keep", "params=0.5", "--dry-run", "--scope", "all"), "'all' is not one of"),
        (("prune", "m", "--keep", "params=0.5", "--dry-run", *UNIFORM, "--scope", "axis"), "leave out --scope axis"),
    ],
)
def test_wrong_usage(run: Run, arguments: tuple[str, ...], says: str) -> None:
    done = run(*arguments)
    assert says in done.sentence
    assert done.code == 2


# Example inputs of transformers models

MADE = {
    "llama_8_4": {"input_ids": (2, 16)},
    "bert_classifier": {"input_ids": (2, 16)},
    "t5": {"input_ids": (2, 16), "decoder_input_ids": (2, 16)},
    "vit": {"pixel_values": (2, 3, 24, 24)},
    "segformer": {"pixel_values": (2, 3, 224, 224)},
    "whisper": {"input_features": (2, 20, 30), "decoder_input_ids": (2, 16)},
    "clip": {"input_ids": (2, 16), "pixel_values": (2, 3, 24, 24)},
    "mamba": {"input_ids": (2, 16)},
}


@pytest.mark.parametrize("name", MADE)
def test_inputs_are_made_up_from_the_config(name: str, tmp_path: Path) -> None:
    inputs = make_inputs(ZOO[name]().model, tmp_path, seed=0)
    assert {key: tuple(tensor.shape) for key, tensor in inputs.items()} == MADE[name]


def test_the_size_of_images_is_read_beside_the_model(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"height": 40, "width": 48}}')
    assert make_inputs(ZOO["segformer"]().model, tmp_path, 0)["pixel_values"].shape == (2, 3, 40, 48)


def test_inputs_that_cannot_be_made_up_point_to_the_other_way(tmp_path: Path) -> None:
    model = ZOO["vit"]().model
    model.config.num_channels = 4
    with pytest.raises(ModelError, match=r"doesn't run on made-up inputs \(pixel_values; .*give file\.py:function"):
        make_inputs(model, tmp_path, 0)


# Text as batches of the kinds of language models


class Letters:
    """A tokenizer of which token is a letter."""

    mask_token_id = 3

    def encode(self, text: str, **_: object) -> list[int]:
        return [4 + ord(letter) % 90 for letter in text]


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("llama_8_4", {"input_ids"}),
        ("bert_masked_lm", {"input_ids", "labels"}),
        ("t5", {"input_ids", "labels", "decoder_input_ids"}),
    ],
)
def test_text_becomes_batches_that_have_a_loss(name: str, keys: set[str]) -> None:
    loaded = Loaded(ZOO[name]().model, tokenizer=Letters())
    data = text_data(loaded, Path("text"), "abcdefghijk lmnop " * 40, Amount(batches=2, length=16))
    assert all(batch.keys() == keys for batch in (*data.calibration, *data.held_out))
    assert [len(batch["input_ids"]) for batch in data.calibration] == [4, 4]
    assert data.held_out
    assert 1 < perplexity(loaded.model, data.held_out, loaded.model) < 1e6


def test_held_out_text_is_no_calibration_text() -> None:
    loaded = Loaded(ZOO["llama_8_4"]().model, tokenizer=Letters())
    text = "".join(chr(97 + i % 26) for i in range(450)) + "~" * 50
    data = text_data(loaded, Path("text"), text, Amount(batches=99, length=10))
    last = Letters().encode("~")[0]
    assert all((batch["input_ids"] == last).all() for batch in data.held_out)
    assert not any((batch["input_ids"] == last).any() for batch in data.calibration)


def test_a_recipe_prunes_and_says_what_made_up_for_what_went(run: Run, given: Path) -> None:
    assert "flap" in run("recipes").out
    done = run("prune", f"{given}:pair", "--keep", "params=0.5", "--recipe", "magnitude", "--out", "small")
    assert done.code == 0 and "check: equal" in done.out
    as_graph = run(
        "prune", f"{given}:pair", "--keep", "params=0.5", "--recipe", "magnitude", "--form", "graph", "--out", "g"
    )
    assert as_graph.code == 0 and "form: graph" in as_graph.out
    whole = run(
        "prune", f"{given}:pair", "--keep", "params=0.5", "--recipe", "magnitude", "--floor", "1.0", "--dry-run"
    )
    assert whole.code != 0 and "floor" in whole.err
    refused = run("prune", f"{given}:pair", "--keep", "params=0.5", "--recipe", "nope", "--dry-run")
    assert refused.code != 0 and "unknown recipe 'nope'" in refused.err


def test_a_graph_that_takes_no_such_text_says_so_in_a_line() -> None:
    class Picky(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return torch.reshape(input_ids, (3,))

    loaded = Loaded(ZOO["llama_8_4"]().model, tokenizer=Letters())
    data = text_data(loaded, Path("text"), "abcdefghijk lmnop " * 40, Amount(batches=2, length=16))
    graph = torch.fx.symbolic_trace(Picky())
    found = measured(loaded.model, graph, data)
    assert found.figures is None
    assert "4x16 tokens" in found.why and "shape '[3]' is invalid" in found.why and found.lines == [found.why]
    assert measured(loaded.model, loaded.model, data).lines[0].startswith("perplexity on 64 held-out tokens: ")
    with pytest.raises(DataError, match="is invalid"):
        measured(loaded.model, Picky(), data)
