"""`depgraph recipes`."""

from __future__ import annotations

from rich.console import Console

from depgraph.cli import options as o
from depgraph.cli.app import app
from depgraph.cli.output import print_json
from depgraph.cli.tables import recipes_table


@app.command()
def recipes(as_json: o.Json = False) -> None:
    """List the recipes: published methods with all their parts, what they need, and what they cost."""
    from importance.recipes import RECIPES

    if as_json:
        print_json({name: entry.described() for name, entry in RECIPES.items()}, Console())
        return
    Console().print(recipes_table(RECIPES))
