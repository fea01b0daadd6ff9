"""`depgraph sweep`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from depgraph import interruption
from depgraph.cli import options as o
from depgraph.cli.app import app
from depgraph.cli.data import Amount
from depgraph.cli.file_points import FileMaker, refuse_gradients
from depgraph.cli.models import Loading
from depgraph.cli.onnx_files import is_onnx, refuse_options
from depgraph.cli.output import Steps, print_json, printing, say, showing
from depgraph.cli.points import Maker, check_names
from depgraph.errors import TargetError
from depgraph.files import written
from depgraph.plain import plain
from depgraph.story.figures import tradeoff_svg
from depgraph.story.tables import number
from depgraph.target import METRICS, Target

if TYPE_CHECKING:
    from depgraph.story.parts import TradeOff
    from importance.sweeping import Outcome

Shares = Annotated[
    str, typer.Option("--keep", help="shares of one metric to keep: params=0.9,0.7,0.5", show_default=False)
]
Recipes = Annotated[str, typer.Option(help="recipes or scores by name, with commas: magnitude,obs,best")]
Folder = Annotated[
    Path, typer.Option("--out", help="a folder for the points; one of an earlier run goes on", show_default=False)
]
Jobs = Annotated[
    int,
    typer.Option(help="processes at most; 0: as processors and memory allow, one on other devices than the CPU", min=0),
]

LOG, TABLE, PICTURE = "points.jsonl", "sweep.json", "front.svg"


@app.command()
def sweep(  # noqa: PLR0913  (the options of a command)
    model: o.Model,
    keep: Shares,
    out: Folder,
    recipes: Recipes = "magnitude",
    data: o.Data = None,
    scope: o.Scope = "auto",
    round_to: o.RoundTo = "1",
    floor: o.Floor = 0.0,
    protect: o.Protect = None,
    only: o.Only = None,
    batches: o.Batches = 16,
    length: o.Length = None,
    device: o.Device = "cpu",
    dtype: o.Dtype = "auto",
    seed: o.Seed = 0,
    base: o.Base = "",
    size: o.Size = None,
    jobs: Jobs = 0,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Prune at several budgets in several ways, measure each, and show which are worth having; goes on where it was stopped."""
    names = parse_names(recipes)
    shares = parse_shares(keep)
    loading, sizes = Loading(device, dtype, seed, base), o.parse_sizes(size)
    refuse_options(model, loading, sizes)
    check_names(names, data=data is not None or ".py:" in model)
    options: dict[str, Any] = {"scope": scope, "round_to": o.rounding(round_to), "floor": floor}
    options |= {"protect": tuple(protect or ()), "only": tuple(only or ())}
    maker: Maker | FileMaker = Maker(model, loading, data, Amount(batches, length, seed), options)
    if is_onnx(model):
        refuse_gradients(names)
        maker = FileMaker(model, sizes, data, seed, options)
    with printing() as console:
        made, trade = _swept(maker, (names, *shares), out, jobs)
    with showing():
        if as_json:
            print_json(_data(made, trade), console)
        else:
            print_sweep(made, trade, out, console)


def parse_names(text: str) -> list[str]:
    """`a,b` as names, each once; raises typer.BadParameter."""
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    if not all(names):
        raise typer.BadParameter(f"--recipes {text!r}: give names with commas between, such as magnitude,obs")
    return names


def parse_shares(text: str) -> tuple[str, list[float]]:
    """`params=0.9,0.7` as a metric and shares, the largest first; raises typer.BadParameter."""
    metric, equals, rest = text.partition("=")
    if not equals or metric.strip() not in METRICS:
        raise typer.BadParameter(f"--keep {text!r}: give shares of one of {', '.join(METRICS)}, such as params=0.9,0.7")
    shares = []
    for part in rest.split(","):
        try:
            shares.append(Target(**{metric.strip(): float(part)}).shares[metric.strip()])  # type: ignore[arg-type]
        except ValueError:
            raise typer.BadParameter(f"--keep {text!r}: {part!r} is not a number between 0 and 1") from None
        except TargetError as error:
            raise typer.BadParameter(str(error)) from error
    return metric.strip(), sorted(set(shares), reverse=True)


def _swept(
    maker: Maker | FileMaker, what: tuple[list[str], str, list[float]], out: Path, jobs: int
) -> tuple[list[Outcome], TradeOff]:
    """The outcomes of names at shares of a metric and the trade-off, both written to `out`."""
    from importance.side_by_side import processors
    from importance.sweeping import DENSE, Log, Point, sweep, trade_off

    names, metric, shares = what
    points = [Point(DENSE, metric, 1.0), *(Point(name, metric, share) for name in names for share in shares)]
    log = Log(out / LOG, maker.settings())
    earlier = sum(point in log.outcomes for point in points)
    if earlier:
        say(f"{earlier} of {len(points)} points are there already")
    with (
        interruption.keeping(out / LOG, f"what was made is kept in {out / LOG}, and the same command goes on"),
        Steps()("sweeping"),
    ):
        made = sweep(points, maker, log, jobs or (processors() if maker.device == "cpu" else 1), _tell)
    trade = trade_off(made, metric)
    written(out / TABLE, json.dumps(_data(made, trade), indent=1) + "\n")
    written(out / PICTURE, tradeoff_svg(trade))
    return made, trade


def _tell(outcome: Outcome) -> None:
    """A line on stderr for a point that is made."""
    interruption.check()
    said = outcome.refused or f"{outcome.figure.name if outcome.figure else 'quality'} {number(outcome.quality)}"
    say(f"{outcome.point}: {said} ({outcome.seconds:.1f} s)")


def _data(made: list[Outcome], trade: TradeOff) -> dict[str, Any]:
    return {"trade_off": plain(trade), "points": [plain(outcome) for outcome in made]}


def print_sweep(made: list[Outcome], trade: TradeOff, out: Path, console: Console) -> None:
    """A line for each point, what was refused, and where the files are."""
    dense = made[0]
    table = Table(box=None, pad_edge=False, header_style="bold")
    timed = ("time",) if any(outcome.ms for outcome in made) else ()
    heads = ("", "asked", *METRICS, *timed, trade.quality, "check", "seconds", "front")
    for name in heads:
        table.add_column(name, justify="left" if name in ("", "front") else "right", overflow="fold")
    for outcome in made:
        if outcome.cost is not None and dense.cost is not None:
            cells = _cells(outcome, outcome.cost.share_of(dense.cost), trade)
            place = heads.index("time") if timed else 0
            table.add_row(*cells[:place], *(_time(outcome) for _ in timed), *cells[place:])
    console.print(table)
    better = "higher" if trade.higher_is_better else "lower"
    on = f" on {dense.figure.data}" if dense.figure else ""
    plain_text: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
    said = f"{trade.quality}{on}, {better} is better; on the front (*) is what no other beats in {trade.metric} and {trade.quality}"
    console.print(said, style="dim", **plain_text)
    for outcome in made:
        if outcome.figure and (bad := outcome.figure.warning(outcome.quality)):
            console.print(f"{outcome.point}: {bad}", **plain_text)
        if outcome.refused:
            again = " (tried again the next time)" if outcome.again else ""
            console.print(f"{outcome.point}: {outcome.refused}{again}", **plain_text)
    console.print(f"wrote {out}: {', '.join((LOG, TABLE, PICTURE))}", **plain_text)


def _time(outcome: Outcome) -> str:
    """The share of the dense file's time."""
    return f"{outcome.ms / outcome.dense_ms:.1%}" if outcome.ms and outcome.dense_ms else ""


def _cells(outcome: Outcome, shares: dict[str, float], trade: TradeOff) -> list[str]:
    point = outcome.point
    asked = "" if outcome.error is None and point.share == 1 else f"{point.metric}={point.share:g}"
    front = any(t.on_front for t in trade.trials if (t.name, t.quality) == (point.name, outcome.quality))
    check = "" if outcome.error is None else f"{outcome.error:.0e}"
    kept = (f"{shares[metric]:.1%}" for metric in METRICS)
    return [
        escape(point.name),
        asked,
        *kept,
        number(outcome.quality),
        check,
        f"{outcome.seconds:.1f}",
        "*" if front else "",
    ]
