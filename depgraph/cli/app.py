"""The command `depgraph` itself, which the modules beside this one add their commands to."""

from __future__ import annotations

import typer

from depgraph.cli.output import CODES

app = typer.Typer(
    name="depgraph",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Make a PyTorch or ONNX model smaller: find what is coupled, cut it out, prove the result right, export it.",
    epilog="MODEL is a transformers folder, a folder saved by depgraph, an ONNX file, or file.py:function, which returns "
    "(module, args), (module, args, kwargs) or a dict with model, args, kwargs, batches (to score with) and loss "
    "(a function of the model's output and the batch).\n\n"
    f"Exit codes: {'; '.join(f'{code} {meaning}' for code, meaning in CODES.items())}.",
)
