"""Where an operator stands in the code that it was exported from, as far as the file says."""

from __future__ import annotations

import ast

import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"


def module_of(node: ir.Node, made: ir.Value | None = None) -> str:
    """A dotted path such as `layers.0.attention`: exporters leave it in metadata or in names with slashes.

    Fusions give operators other names, but leave those of values: where an operator's says nothing, that of what it `made` does.
    """
    scopes = node.metadata_props.get(_SCOPES)
    if scopes:
        try:
            listed = [str(part) for part in ast.literal_eval(scopes)]
        except (ValueError, SyntaxError):
            listed = []
        return listed[-2] if len(listed) > 1 else ""
    names = (node.name, *(value.name for value in ([made] if made is not None else node.outputs)))
    return path_of(next((name for name in names if name and "/" in name), ""))


def path_of(name: str) -> str:
    """The dotted path in a name with slashes, without the last part."""
    parts = [part for part in name.split("/") if part][:-1]
    inner = [one for one, after in zip(parts, [*parts[1:], ""], strict=False) if not after.startswith(f"{one}.")]
    return ".".join(inner)
