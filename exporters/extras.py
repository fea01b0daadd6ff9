"""Packages that only some exports need: asked for when they are, with the command that installs them."""

from __future__ import annotations

import importlib
from typing import Any

from depgraph.errors import ExportError


def required(extra: str, *modules: str) -> Any:
    """The first of these modules, after all of them were imported.

    Raises:
        ExportError: One can't be imported; the message has the command that installs the extra.
    """
    try:
        return [importlib.import_module(name) for name in modules][0]
    except ImportError as error:
        missing = error.name or modules[0]
        why = "isn't installed" if isinstance(error, ModuleNotFoundError) else f"can't be imported ({error})"
        raise ExportError(f"This export needs {missing}, which {why}: pip install 'depgraph[{extra}]'.") from error
