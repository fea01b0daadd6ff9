"""`depgraph profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import depgraph
from depgraph.cli import options as o
from depgraph.cli.app import app
from depgraph.cli.models import Loading, load_model
from depgraph.cli.onnx_files import is_onnx
from depgraph.cli.output import Steps, check_vacant, new_folder, print_json, printing, say, showing
from depgraph.storage import check_free

ProfileFile = Annotated[
    Path | None, typer.Option("--out", help="measure this machine and write the profile there, as JSON")
]
Kit = Annotated[
    Path | None,
    typer.Option(
        help="write a folder to copy to a device: run measure.py there, with onnxruntime and numpy, for its profile"
    ),
]
Threads = Annotated[int, typer.Option(help="threads that ONNX Runtime computes with", min=1)]
Runs = Annotated[int, typer.Option(help="runs of every operator, at the most", min=1)]


@app.command()
def profile(  # noqa: PLR0913  (the options of a command)
    model: o.Model,
    out: ProfileFile = None,
    kit: Kit = None,
    threads: Threads = 1,
    runs: Runs = 30,
    seed: o.Seed = 0,
    base: o.Base = "",
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Measure a model's operators at many widths, here or by a kit on another device, for `prune --keep latency=20ms`."""
    from exporters import measured_profile, onnx_graph, write_kit

    if (out is None) == (kit is None):
        raise typer.BadParameter("give --out FILE to measure this machine, or --kit FOLDER to measure another")
    if kit is not None:
        check_vacant(kit)
    if out is not None:
        check_free(out, "--out")
    steps = Steps()
    with printing() as console, new_folder(kit) as folder:
        with steps("loading"):
            if is_onnx(model):
                graph = depgraph.trace(model)
            else:
                loaded = load_model(model, Loading("cpu", "auto", seed, base))
                graph = depgraph.trace(loaded.model, loaded.args, loaded.kwargs)
        with steps("exporting"):
            file = onnx_graph(graph)
        if folder is not None:
            with steps("writing"):
                write_kit(file, folder)
            result: dict[str, object] = {"kit": str(kit), "model": file.name}
            line = f"wrote {kit}: copy it to the device, run `python measure.py` in it, and bring profile.json back"
        else:
            assert out is not None
            with steps("measuring operators"):
                found = measured_profile(file, runs, threads)
            found.save(out)
            for warning in found.warnings:
                say(f"warning: {warning}")
            result = {
                "profile": str(out),
                "model": file.name,
                "dense_ms": found.dense_ms,
                "machine": dict(found.machine),
            }
            line = f"wrote {out}: {found.machine['cpu']}, {found.dense_ms:.3g} ms"
    with showing():
        if as_json:
            print_json(result, console)
        else:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
