"""How a budget is spread over the axes: allocations, which make the scores of different axes compare.

`Allocated(scorer, allocation)` is a scorer, so that `graph.plan(Allocated(Magnitude(), Owl()), target)` is all it takes.
"""

from importance.allocations.adapt import AdaptPruner
from importance.allocations.allocated import Allocated, Allocation
from importance.allocations.blocks import axis_blocks, blocks, first_and_last
from importance.allocations.cfsp import Cfsp
from importance.allocations.floors import least_shares
from importance.allocations.lamp import Lamp
from importance.allocations.owl import Owl, outlier_ratio, weight_outliers
from importance.allocations.registry import ALLOCATIONS, named, names, needs
from importance.allocations.sap import Sap, pq_index
from importance.allocations.spread import ByCost, Global, PerKind, Uniform, group_costs
from importance.allocations.standardised import Standardised

__all__ = [
    "ALLOCATIONS",
    "AdaptPruner",
    "Allocated",
    "Allocation",
    "ByCost",
    "Cfsp",
    "Global",
    "Lamp",
    "Owl",
    "PerKind",
    "Sap",
    "Standardised",
    "Uniform",
    "axis_blocks",
    "blocks",
    "first_and_last",
    "group_costs",
    "least_shares",
    "named",
    "names",
    "needs",
    "outlier_ratio",
    "pq_index",
    "weight_outliers",
]
