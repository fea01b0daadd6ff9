"""What makes way for nothing where branches are left out: modules that compute nothing else, and parameters beside them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from torch import nn

from depgraph.cutting.passing import Layout, layout_of
from depgraph.errors import CutError

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph
    from depgraph.residual import Branch


def passed_of(graph: DependencyGraph, names: list[str]) -> tuple[dict[str, Layout], list[str]]:
    """The outermost modules that compute nothing but what of the branches goes, with the layouts of their outputs.

    And the parameters that only such code reads as is a module's that stays, such as the scale of a layer.
    """
    branches = {branch.name: branch for branch in graph.branches}
    gone = {node for name in names for node in branches[name].nodes}
    if not gone:
        return {}, []
    flow = graph.residual.flow
    within: dict[str, set[str]] = {}
    for node in flow.nodes:
        path = graph.residual.module(node)
        while path and node.op == "call_function":
            within.setdefault(path, set()).add(node.name)
            path = path.rpartition(".")[0]
    idle = {node.name for node in flow.nodes if graph.residual.idle(node)}
    fits = {path for path, nodes in within.items() if nodes & gone and nodes <= gone | idle}
    outer = [p for p in sorted(fits) if not any(p.startswith(f"{q}.") for q in fits)]
    layouts = _layouts(graph, outer)
    weights = graph.residual.parameters({node for node in flow.nodes if node.name in gone})
    blank = [w for w in weights if not any(w.startswith(f"{p}.") for p in outer)]
    _require_nothing(graph, [branches[name] for name in names], {n for path in layouts for n in within[path]}, blank)
    return layouts, blank


def _require_nothing(graph: DependencyGraph, going: list[Branch], passed: set[str], blank: list[str]) -> None:
    """Raise CutError where code of modules that stay would go on computing a branch, or adding it.

    What is computed with what is `passed`, or with the parameters `blank`, is nothing.
    """
    values, nothing = graph.capture.program.values, set(passed)
    targets = {graph.capture.program.ties.get(name, name) for name in blank}
    for branch in going:
        own, works = {*branch.nodes, branch.add}, list[str]()
        for node in graph.residual.flow.nodes:
            value = values.get(node.name) if node.op == "placeholder" else None
            target = value.target if value is not None and value.kind == "parameter" else ""
            if (
                target
                and graph.capture.program.ties.get(target, target) in targets
                or node.name in own
                and any(n.name in nothing for n in node.all_input_nodes)
            ):
                nothing.add(node.name)
            elif node.name in own and node.name not in nothing and graph.residual.works(node):
                works.append(node.name)
        left = works or [operand for operand in branch.operands if operand not in nothing]
        if left:
            raise CutError(
                f"{branch.name} can't be left out of {type(graph.model).__name__}: {left[0]} is computed by the code of a module "
                "that does other things too; leave its whole block out"
            )


def _layouts(graph: DependencyGraph, paths: list[str]) -> dict[str, Layout]:
    """What the modules return when the model runs on the example."""
    from depgraph.cutting.rerunning import rerun

    found: dict[str, Layout] = {}
    calls: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        for path in paths:
            module = graph.model.get_submodule(path)

            def noted(module: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
                calls[path] = calls.get(path, 0) + 1
                found[path] = layout_of(output, args, kwargs)

            stack.callback(module.register_forward_hook(noted, with_kwargs=True).remove)
        rerun(graph, graph.model)
    for path, count in calls.items():
        if count > 1 and not any(True for _ in graph.model.get_submodule(path).parameters()):
            del found[path]  # it passes nothing on as it is
        elif count > 1:
            raise CutError(
                f"{path} runs {count} times, so that one of them can't be left out: leave out its whole block"
            )
    return {path: found[path] for path in paths if path in found}
