"""Random programs out of small steps: every axis alone, and all at once, in both forms."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import depgraph
from depgraph.errors import CutError, PlanError
from tests.random_programs import PICTURES, SEQUENCES, VALUES, Program, program


def _cuts(graph: depgraph.DependencyGraph) -> list[dict[str, list[int]]]:
    """A group of each axis that can lose one, and half of all."""
    free = {axis.name: np.flatnonzero(axis.prunable).tolist() for axis in graph.axes if axis.prunable.any()}
    half = {name: groups[::2][: graph[name].size // 2] for name, groups in free.items()}
    return [
        *({name: groups[:1]} for name, groups in free.items()),
        {name: groups for name, groups in half.items() if groups},
    ]


def _zeroed(model: nn.Module, plan: depgraph.Plan) -> nn.Module:
    whole = copy.deepcopy(model)
    held = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    for removed in plan.removed():
        held[removed.target].data.index_fill_(removed.dim, torch.as_tensor(removed.indices), 0)
    return whole


def _applied(plan: depgraph.Plan, form: str) -> Any:
    """What comes of a plan, checked; None where it has no such form."""
    try:
        return plan.apply(form=form)
    except CutError:
        return None


def require_right(net: Program, x: Tensor, forms: tuple[str, ...]) -> int:
    """How many cuts of a program there were, all of them right."""
    graph, count = depgraph.trace(net, x), 0
    for removal in _cuts(graph):
        try:
            plan = graph.cut_plan(removal)
        except PlanError:  # the axes of a dim would together leave nothing
            continue
        for made in [made for form in forms if (made := _applied(plan, form)) is not None]:
            count += 1
            if all(graph[name].exact for name in removal):
                with torch.no_grad():
                    expected = _zeroed(net, plan)(x)
                    torch.testing.assert_close(
                        made(x), expected, rtol=1e-3, atol=1e-4 * max(1.0, float(expected.abs().max()))
                    )
    return count


TABLES = pytest.mark.parametrize("steps", [SEQUENCES, PICTURES, VALUES], ids=["sequences", "pictures", "values"])


def _all_right(steps: Any, seeds: range, *forms: str) -> int:
    """How many cuts of the programs of these seeds there were."""
    count = 0
    for seed in seeds:
        net, x = program(steps, seed)
        try:
            count += require_right(net, x, forms)
        except Exception as error:
            raise AssertionError(f"{net} (seed {seed})") from error
    return count


@TABLES
def test_what_is_cut_from_a_random_program_is_what_is_zeroed(steps: Any) -> None:
    assert _all_right(steps, range(12), "module") > 20


@pytest.mark.slow
@TABLES
def test_both_forms_of_many_random_programs_are_right(steps: Any) -> None:
    assert _all_right(steps, range(12, 36), "module", "graph") > 80
