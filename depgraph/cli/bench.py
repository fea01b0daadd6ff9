"""`depgraph bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from depgraph.cli import options as o
from depgraph.cli.app import app
from depgraph.cli.output import Steps, print_json, printing, showing
from depgraph.cli.tables import plain_table

if TYPE_CHECKING:
    from exporters.benching import Benched

Paths = Annotated[
    list[Path], typer.Argument(metavar="PATH...", help="ONNX files, or folders that hold some; the dense one first")
]
Rounds = Annotated[int, typer.Option(help="runs of each file, in turn", min=1)]
Threads = Annotated[int, typer.Option(help="threads of the runtime", min=1)]
Dims = Annotated[list[str] | None, typer.Option("--dim", help="NAME=SIZE of a dim that files leave open (repeatable)")]
Batch = Annotated[int, typer.Option(help="size of the first dim, where it is open", min=1)]
Prompt = Annotated[int, typer.Option(help="tokens of a prompt", min=1)]
Memory = Annotated[bool, typer.Option(help="see in a fresh process what memory a file takes")]


@app.command()
def bench(  # noqa: PLR0913  (the options of a command)
    paths: Paths,
    rounds: Rounds = 30,
    threads: Threads = 1,
    dims: Dims = None,
    batch: Batch = 1,
    prompt: Prompt = 128,
    memory: Memory = True,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Measure ONNX files side by side: time, tokens per second (prefill and decode apart), memory."""
    from exporters.benching import Running, bench
    from exporters.workloads import Sizes

    running = Running(rounds, threads, Sizes(parse_dims(dims or ()), batch, prompt), memory)
    with printing() as console, Steps()("measuring"):
        found = bench(paths, running)
    with showing():
        if as_json:
            print_json(found.to_json(), console)
            return
        console.print(runs_table(found))
        console.print(conditions(found), style="dim", markup=False, highlight=False)
        console.print()
        console.print(files_table(found))


def parse_dims(given: list[str] | tuple[()]) -> dict[str, int]:
    """`height=320` as a dict; raises typer.BadParameter."""
    found = {}
    for text in given:
        name, equals, size = text.rpartition("=")
        if not equals or not name or not size.isdecimal() or not int(size):
            raise typer.BadParameter(f"--dim {text!r}: give a name and a size, such as height=320")
        found[name] = int(size)
    return found


def runs_table(found: Benched) -> Table:
    """A line for each way to run each file."""
    table = plain_table("file", "run", "median ms", "90% within", "tokens/s", "times as fast", left="run")
    for one in found.measured:
        speed = "" if one.tokens_per_second is None else f"{one.tokens_per_second:,.0f}"
        faster = "" if one.base == one.file else f"{one.speedup:.2f}"
        table.add_row(escape(one.file), one.kind, f"{one.median_ms:.2f}", f"{one.p90_ms:.2f}", speed, faster)
    return table


def conditions(found: Benched) -> str:
    """On what, and how."""
    shapes = "; ".join(dict.fromkeys(f"{one.kind}: {one.shapes}" for one in found.measured))
    threads = "1 thread" if found.threads == 1 else f"{found.threads} threads"
    return f"{found.runtime}, {threads}, {found.rounds} interleaved rounds; {shapes}"


def files_table(found: Benched) -> Table:
    """What files take, on the disk and in memory."""
    table = plain_table("file", "MB", "memory MB", "of these before it was loaded")
    for one in found.files:
        table.add_row(escape(one.file), *(_megabytes(size) for size in (one.bytes, one.peak_bytes, one.rest_bytes)))
    return table


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:,.2f}" if size < 1e7 else f"{size / 1e6:,.0f}"
