"""`depgraph inspect`."""

from __future__ import annotations

import depgraph
from depgraph.cli import options as o
from depgraph.cli.app import app
from depgraph.cli.depth import depth_json, print_depth
from depgraph.cli.models import Loading, load_model
from depgraph.cli.onnx_files import is_onnx, refuse_options
from depgraph.cli.output import Steps, print_json, printing, showing
from depgraph.cli.tables import graph_json, print_axes
from depgraph.files import written
from depgraph.inspecting import Inspection
from depgraph.page import html_page
from depgraph.plotting import plot_depth
from depgraph.storage import check_free


@app.command()
def inspect(  # noqa: PLR0913  (the options of a command)
    model: o.Model,
    long: o.Long = False,
    strict: o.Strict = False,
    device: o.Device = "cpu",
    dtype: o.Dtype = "auto",
    seed: o.Seed = 0,
    base: o.Base = "",
    size: o.Size = None,
    free: o.Free = None,
    html: o.HtmlFile = None,
    depth: o.ByDepth = False,
    plot: o.Plot = None,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Show the axes of a model: what can be removed together, what it would save, what is fixed."""
    if html is not None:
        check_free(html, "--html")
    sizes = o.parse_sizes(size)
    with printing() as out:
        steps = Steps()
        with steps("loading"):
            refuse_options(model, Loading(device, dtype, seed, base), sizes)
            loaded = None if is_onnx(model) else load_model(model, Loading(device, dtype, seed, base))
        with steps("tracing"):
            given = (model, sizes) if loaded is None else (loaded.model, loaded.args, loaded.kwargs)
            graph = depgraph.trace(*given, strict=strict, free=free or ())
            found = Inspection(graph)
        if plot is not None:
            with steps("drawing"):
                plot_depth(graph, (), plot)
        if html is not None:
            with steps("drawing"):
                written(html, html_page(found))
    with showing():
        if as_json:
            print_json(depth_json(graph) if depth else graph_json(found), out)
        elif depth:
            print_depth(graph, out)
        elif long:
            out.print(graph.show(), markup=False, highlight=False, soft_wrap=True)
        else:
            print_axes(found, out)
            if graph.note:
                out.print(graph.note, markup=False, highlight=False)
