"""The options of the command, and what `prune` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from depgraph.cli.data import Amount
from depgraph.cli.models import Loading
from depgraph.errors import PlanError, TargetError
from depgraph.options import matches
from depgraph.target import METRICS, Target

Precision = Literal["auto", "float32", "bfloat16", "float16"]
Scopes = Literal["auto", "global", "axis", "uniform", "depth", "both"]
Forms = Literal["auto", "module", "graph"]

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="a folder, an ONNX file, or file.py:function", show_default=False)
]
Device = Annotated[str, typer.Option(help="where to compute: cpu, cuda, cuda:1; inspect also takes meta")]
Dtype = Annotated[Precision, typer.Option(help="of the weights; auto: as stored")]
Base = Annotated[str, typer.Option(help="file.py:function of the unpruned module, if MODEL was saved and is your own")]
Seed = Annotated[int, typer.Option(help="of random scores, windows of text and made-up inputs")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]

Long = Annotated[bool, typer.Option("--long", help="members of all axes, and why what is fixed is fixed")]
HtmlFile = Annotated[
    Path | None, typer.Option("--html", help="write a page with a picture of the model there, to open in a browser")
]
Strict = Annotated[bool, typer.Option("--strict", help="an operator without a rule is an error")]

Keep = Annotated[str, typer.Option(help="shares to keep: params=0.7, or macs=0.6,bytes=0.5", show_default=False)]
Depth = Annotated[
    int | None, typer.Option(help="blocks or branches to leave out, before groups go (or alone, without --keep)", min=1)
]
DepthScore = Annotated[
    str,
    typer.Option(help="how they are found: sleb, finercut, shortgpt, pairs, loss, taylor, ...; shortgpt:branches"),
]
ByDepth = Annotated[
    bool, typer.Option("--depth", help="blocks and branches by depth, and why others can't be left out")
]
Plot = Annotated[Path | None, typer.Option(help="draw there which branches go, by depth (needs matplotlib)")]
Score = Annotated[str, typer.Option(help="what a group is worth: taylor, magnitude, random, ...")]
Allocation = Annotated[
    str,
    typer.Option(help="how the budget is spread over the axes: uniform, kind, al-am, owl, ...; empty: as --scope says"),
]
Recipe = Annotated[
    str,
    typer.Option(help="a published method with all its parts, in place of --score: flap, obs, best, ...; see recipes"),
]
Data = Annotated[Path | None, typer.Option(help="a text file to score with; its end is held out to measure on")]
Out = Annotated[
    Path | None, typer.Option(help="a new folder for the pruned model and its plan; a new file for an ONNX model")
]
Onnx = Annotated[bool, typer.Option("--onnx", help="write model.onnx there too, and check it")]
Scope = Annotated[
    Scopes,
    typer.Option(
        help="one ranking, the same share of each axis or kind of axis, depth alone, both at once; auto: as the score asks"
    ),
]
RoundTo = Annotated[int, typer.Option(help="keep a multiple of this many groups (not of axes that have fewer)", min=1)]
Floor = Annotated[float, typer.Option(help="the least share of every axis that stays", min=0, max=1)]
Protect = Annotated[list[str] | None, typer.Option(help="leave alone axes of this pattern (repeatable)")]
Only = Annotated[list[str] | None, typer.Option(help="touch only axes of this pattern (repeatable)")]
Form = Annotated[Forms, typer.Option(help="the model's own class, a graph module, or what can be had")]
Batches = Annotated[int, typer.Option(help="batches of four windows to score with", min=1)]
Length = Annotated[int | None, typer.Option(help="tokens in a window (128, or what the model takes)", min=2)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the plan, cut and write nothing")]

OnnxFile = Annotated[Path | None, typer.Option(help="the file to write; MODEL/model.onnx by default")]
Opset = Annotated[int, typer.Option(help="version of the ONNX operator set")]


@dataclass(frozen=True)
class Wish:
    """What `prune` is asked for."""

    model: str
    target: Target
    loading: Loading
    score: str
    allocation: str
    recipe: str
    data: Path | None
    amount: Amount
    out: Path | None
    onnx: bool
    options: dict[str, Any]
    json: bool
    depth_score: str = ""
    plot: Path | None = None

    @property
    def scope(self) -> str:
        """How the plan spreads its budget."""
        return str(self.options["scope"])


def parse_keep(text: str, left_out: int | None = None) -> Target:
    """`params=0.7,macs=0.6` as a target, with how many blocks are left out; raises typer.BadParameter."""
    shares: dict[str, float] = {}
    if not text and left_out is None:
        raise typer.BadParameter(
            "give the shares to keep, --keep params=0.7, or a number of blocks to leave out, --depth 2"
        )
    for part in text.split(",") if text else ():
        name, equals, value = part.strip().partition("=")
        if not equals or name not in METRICS:
            raise typer.BadParameter(f"--keep {text!r}: give shares such as params=0.7 or macs=0.6,bytes=0.5")
        if name in shares:
            raise typer.BadParameter(f"--keep {text!r} gives {name} twice: give one share of each")
        try:
            shares[name] = float(value)
        except ValueError:
            raise typer.BadParameter(f"--keep {text!r}: {value!r} is not a number between 0 and 1") from None
    try:
        return Target(**shares, left_out=left_out)
    except TargetError as error:
        raise typer.BadParameter(str(error)) from error


def check_patterns(graph: Any, options: dict[str, Any]) -> None:
    """Raise PlanError for a pattern that names nothing: it is a slip, and going on would protect nothing."""
    for option in ("protect", "only"):
        for pattern in options[option]:
            if not any(matches(axis, (pattern,)) for axis in graph.axes):
                raise PlanError(f"--{option} {pattern!r} names no axis and no parameter of one: see depgraph inspect")
