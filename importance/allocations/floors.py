"""GlobalMP's minimum threshold: one global ranking that leaves every axis a least part of the model."""

from __future__ import annotations

import math

import numpy as np

from depgraph import DependencyGraph
from depgraph.errors import ScoreError
from depgraph.target import METRICS
from importance.allocations.spread import group_costs
from importance.choices import pick


def least_shares(graph: DependencyGraph, least: float = 0.0005, metric: str = "params") -> dict[str, float]:
    """The share of every axis that stays, for `graph.plan(..., floor=...)`, so that it keeps a part of the whole model.

    GlobalMP (METHODS.md 2.22) leaves each layer `least` of all weights, 0.05% by default, and layers smaller than that whole.
    Here an axis keeps as many groups as cost that much, rounded up and one at the least, or all it has. What they don't give,
    the other axes do, and a target that these floors don't allow is a TargetError of the plan. (GlobalMP's own loop doesn't
    end then.)

    Raises ScoreError: `least` isn't between 0 and 1, or `metric` none of params, macs and bytes.
    """
    pick(dict.fromkeys(METRICS), metric, "measure of cost")
    if not 0 <= least < 1:
        raise ScoreError(f"the least part of the model that an axis keeps is {least!r}: give a share from 0 to below 1")
    wanted = least * getattr(graph.dense_cost, metric)
    costs = group_costs(graph, metric)
    stay = {name: np.clip(math.ceil(wanted / cost - 1e-9), 1, graph[name].size) for name, cost in costs.items()}
    return {name: float(groups / graph[name].size) for name, groups in stay.items()}
