"""Where an operator stands in the code that it was exported from, as far as the file says."""

from __future__ import annotations

import ast

import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"


def module_of(node: ir.Node) -> str:
    """A dotted path such as `layers.0.attention`: exporters leave it in metadata or in names with slashes."""
    scopes = node.metadata_props.get(_SCOPES)
    if scopes:
        try:
            listed = [str(part) for part in ast.literal_eval(scopes)]
        except (ValueError, SyntaxError):
            listed = []
        return listed[-2] if len(listed) > 1 else ""
    parts = [part for part in (node.name or "").split("/") if part][:-1]
    inner = [one for one, after in zip(parts, [*parts[1:], ""], strict=False) if not after.startswith(f"{one}.")]
    return ".".join(inner)
