"""`depgraph export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from depgraph.cli import options as o
from depgraph.cli.app import app
from depgraph.cli.formats import FOLDERS, Asked, check_destination, export_file, export_model, file_name, reports_json
from depgraph.cli.models import Loading, load_model, require_model
from depgraph.cli.onnx_files import is_onnx, refuse_options
from depgraph.cli.output import Steps, check_vacant, print_json, printing, showing
from depgraph.errors import ModelError
from depgraph.storage import check_free

Format = Annotated[
    Literal["onnx", "decoder", "encoder-decoder", "genai", "openvino", "executorch", "gguf"],
    typer.Option(
        help="one graph of a forward; of a language model with its cache; two graphs; a folder for onnxruntime-genai; or for "
        "other runtimes, each with an extra: OpenVINO (.xml), ExecuTorch (.pte), GGUF (.gguf)"
    ),
]
Quantise = Annotated[
    Literal["", "float16", "int8-dynamic", "int8-static", "int4"],
    typer.Option(help="write fewer bits, compared with the float file; int8-static is calibrated on --data"),
]
Tolerance = Annotated[
    float | None, typer.Option(help="the quantised file's error that is allowed, as a share of the output", min=0)
]
Data = Annotated[
    Path | None,
    typer.Option(help="text to calibrate on; for an ONNX file .npz files with an array for each input"),
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="the file to write, such as MODEL/model.onnx by default, .ort for that format; a folder for two of them"
    ),
]


@app.command()
def export(  # noqa: PLR0913  (the options of a command)
    model: o.Model,
    out: Out = None,
    format: Format = "onnx",
    quantise: Quantise = "",
    data: Data = None,
    tolerance: Tolerance = None,
    opset: o.Opset = 20,
    device: o.Device = "cpu",
    dtype: o.Dtype = "auto",
    seed: o.Seed = 0,
    base: o.Base = "",
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Write a model as a file or folder for another runtime, and check it there."""
    if not is_onnx(model):
        require_model(model)
    asked = Asked(_where(model, out, format), opset, quantise, tolerance, data, seed)
    with printing() as console:
        steps = Steps()
        if is_onnx(model):
            if format != "onnx":
                raise ModelError(
                    f"--format {format} needs a PyTorch model, and {model} is an ONNX file: give the model"
                )
            refuse_options(model, Loading(device, dtype, seed, base), {})
            with steps("converting"):
                reports = export_file(Path(model), asked)
        else:
            check_destination(format, asked)
            with steps("loading"):
                loaded = load_model(model, Loading(device, dtype, seed, base))
            with steps("exporting"):
                reports = export_model(format, loaded, asked)
    with showing():
        if as_json:
            print_json(reports_json(reports), console)
            return
        for report in reports:
            wrote = f"Wrote {report.path} "
            text = str(report) if report is reports[-1] else str(report).replace(wrote, "On the way: ", 1)
            console.print(text, markup=False, highlight=False, soft_wrap=True)


def _where(model: str, out: Path | None, format: str) -> Path:
    """The file or folder to write, which isn't there yet."""
    if format in FOLDERS:
        if out is None:
            raise typer.BadParameter(f"--out FOLDER says where --format {format} goes")
        check_vacant(out)
        return out
    if out is None and not Path(model).is_dir():
        raise typer.BadParameter(f"--out FILE says where the file goes, such as {file_name(format)}")
    file = out or Path(model) / file_name(format)
    check_free(file, "--out")
    return file
