"""`depgraph export`."""

from __future__ import annotations

from pathlib import Path

import typer

from depgraph.cli import options as o
from depgraph.cli.app import app
from depgraph.cli.models import Loading, load_model
from depgraph.cli.output import Steps, print_json, printing, showing
from depgraph.cli.tables import onnx_json
from depgraph.storage import check_free


@app.command()
def export(  # noqa: PLR0913  (the options of a command)
    model: o.Model,
    out: o.OnnxFile = None,
    opset: o.Opset = 20,
    device: o.Device = "cpu",
    dtype: o.Dtype = "auto",
    seed: o.Seed = 0,
    base: o.Base = "",
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Write a model as an ONNX file, and check it in ONNX Runtime."""
    from exporters import OnnxOptions, to_onnx

    if out is None and not Path(model).is_dir():
        raise typer.BadParameter("--out FILE says where the ONNX file goes")
    file = out or Path(model) / "model.onnx"
    check_free(file, "--out")
    with printing(as_json) as console:
        steps = Steps()
        with steps("loading"):
            loaded = load_model(model, Loading(device, dtype, seed, base))
        with steps("exporting"):
            options = OnnxOptions(opset=opset, dtype="float32")
            report = to_onnx(loaded.model, loaded.args, file, loaded.kwargs, options=options)
    with showing():
        if as_json:
            print_json(onnx_json(report), console)
        else:
            console.print(str(report), markup=False, highlight=False, soft_wrap=True)
