"""The options of the command, and what `prune` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from depgraph.cli.data import Amount
from depgraph.cli.keeping import Keep as Kept
from depgraph.cli.models import Loading
from depgraph.errors import PlanError
from depgraph.options import Options
from depgraph.patterns import unnamed
from depgraph.rounding import BLOCKS

if TYPE_CHECKING:
    from depgraph.cutting.report import CutReport
    from depgraph.dependency import DependencyGraph
    from depgraph.plan import Plan
    from depgraph.target import Target

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

Keep = Annotated[
    str,
    typer.Option(
        help="what to keep: shares such as params=0.7 or macs=0.6,bytes=0.5; size=30MB; latency=20ms or latency=0.5",
        show_default=False,
    ),
]
DeviceProfile = Annotated[
    Path | None,
    typer.Option(
        "--profile", help="the device that latency is of, as depgraph profile wrote it; this machine by default"
    ),
]
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
Score = Annotated[
    str, typer.Option(help="what a group is worth: taylor, magnitude, random, ...", show_default="magnitude")
]
Allocation = Annotated[
    str,
    typer.Option(help="how the budget is spread over the axes: uniform, kind, al-am, owl, ...; empty: as --scope says"),
]
Recipe = Annotated[
    str,
    typer.Option(help="a published method with all its parts, in place of --score: flap, obs, best, ...; see recipes"),
]
Data = Annotated[
    Path | None,
    typer.Option(help="a text file to score with, its end held out to measure on; for an ONNX file a folder of .npz"),
]
Size = Annotated[
    list[str] | None, typer.Option(help="a size that an ONNX file leaves open, such as height=320 (repeatable)")
]
Free = Annotated[
    list[str] | None, typer.Option(help="an input (of a file) or output whose size may change: 'output 0' (repeatable)")
]
Out = Annotated[
    Path | None, typer.Option(help="a new folder for the pruned model and its plan; a new file for an ONNX model")
]
Onnx = Annotated[bool, typer.Option("--onnx", help="write model.onnx there too, and check it")]
Report = Annotated[
    bool,
    typer.Option("--report", help="write report.html and report.json there too: what went, where, and how it was made"),
]
Scope = Annotated[
    Scopes,
    typer.Option(
        help="one ranking, the same share of each axis or kind of axis, depth alone, both at once; auto: as the score asks"
    ),
]
RoundTo = Annotated[
    str,
    typer.Option(
        help="keep a multiple of this many groups (not of axes that have fewer); or gguf, gguf-k: rows in blocks"
    ),
]
Floor = Annotated[float, typer.Option(help="the least share of every axis that stays", min=0, max=1)]
Protect = Annotated[list[str] | None, typer.Option(help="leave alone axes of this pattern (repeatable)")]
Only = Annotated[list[str] | None, typer.Option(help="touch only axes of this pattern (repeatable)")]
Form = Annotated[Forms, typer.Option(help="the model's own class, a graph module, or what can be had")]
Batches = Annotated[int, typer.Option(help="batches of four windows to score with", min=1)]
Length = Annotated[int | None, typer.Option(help="tokens in a window (128, or what the model takes)", min=2)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the plan, cut and write nothing")]

Opset = Annotated[int, typer.Option(help="version of the ONNX operator set")]


@dataclass(frozen=True)
class Wish:
    """What `prune` is asked for."""

    model: str
    keep: Kept
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
    sizes: dict[str, int]
    free: tuple[str, ...]
    depth_score: str = ""
    plot: Path | None = None
    report: bool = False

    @property
    def scope(self) -> str:
        """How the plan spreads its budget."""
        return str(self.options["scope"])

    def made_by(self, recipe: Any, graph: DependencyGraph, target: Target) -> tuple[Plan, CutReport | None]:
        """The plan of a recipe, and the report of its cut, unless nothing is to be written."""
        given = Options.changed(self.options)
        if self.out is None:
            return recipe.plan(graph, target, **given), None
        return recipe.reported(graph, target, **given)


def parse_sizes(given: list[str] | None, option: str = "--size") -> dict[str, int]:
    """`height=320` and the like as sizes by name, which an option gives; raises typer.BadParameter."""
    sizes: dict[str, int] = {}
    for text in given or ():
        name, _, value = text.rpartition("=")
        if not name or not value.isdigit() or not int(value):
            raise typer.BadParameter(
                f"{option} {text!r}: give the name of an open size and a whole number, as height=320"
            )
        sizes[name] = int(value)
    return sizes


def rounding(text: str) -> int | str:
    """`8` or `gguf` as a rounding; raises typer.BadParameter."""
    if text in BLOCKS:
        return text
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"--round-to {text!r} is no whole number from 1, nor one of {', '.join(BLOCKS)}")
    return int(text)


def check_patterns(graph: Any, options: dict[str, Any]) -> None:
    """Raise PlanError for a pattern that names nothing: it is a slip, and going on would protect nothing."""
    for option in ("protect", "only"):
        for name in unnamed(graph, options[option]):
            raise PlanError(f"--{option} {name!r} names no axis and no parameter of one: see depgraph inspect")
