"""What a group is worth: estimators that give every group of every axis one number, the lowest to go first.

An estimator is called with a `depgraph.DependencyGraph` and returns a dict from axis name to a float64 array [groups].
`importance.depth` ranks blocks and branches, and searches which can be left out.
`Allocated` makes an estimator of another one and of a way to spread the budget over the axes, see `importance.allocations`.

Names are imported when they are first used: who ranks by magnitude needs neither the methods for files nor those for depth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from depgraph.lazily import importing

if TYPE_CHECKING:
    from depgraph.npz import NpzFolder
    from importance import allocations, depth, recipes
    from importance.accumulators import Absolutes, Gram, Moments, Norms, SampleMeans, Weights
    from importance.activation import CRITERIA, Activation, Criterion
    from importance.allocations import Allocated
    from importance.averaging import averaged
    from importance.blockwise import BlockChange, OutlierRatios
    from importance.bonsai import Bonsai
    from importance.collector import Gathering
    from importance.column_magnitude import ColumnMagnitude
    from importance.compensation import Compensated, Compensation, compensate
    from importance.consumers import Consumer, consumers_of
    from importance.contributions import Contributions
    from importance.expert_outputs import ExpertOutputs
    from importance.experts import ExpertClusters, clusters_below, clusters_of, merges
    from importance.fisher import Fisher
    from importance.fisher_brain import FisherBrain
    from importance.fpgm import FilterDistance
    from importance.gblm import GradientBlend
    from importance.lora import LoraPrune
    from importance.losses import next_token
    from importance.magnitude import Magnitude
    from importance.noisy import noise
    from importance.normalisation import Normalisation
    from importance.obs import OptimalBrain
    from importance.propagation import sequential
    from importance.randomly import Random
    from importance.recipe import Pruned, Recipe
    from importance.reduction import Reduction
    from importance.reestimation import Reestimation, reestimate
    from importance.refitting import refit
    from importance.registry import named, names, needs_data, needs_gradients
    from importance.rotation import Principal, Rotation, rotate
    from importance.row_update import RowUpdate
    from importance.scales import NormScale
    from importance.schedule import Pace, Schedule, Scheduled, Step
    from importance.statistics import Statistics, collect
    from importance.surgeon import Surgeon, column_costs, row_costs, surgeon_update
    from importance.taylor import Taylor
    from importance.weight_shares import WeightShares

__all__ = [
    "NpzFolder",
    "Absolutes",
    "Activation",
    "Allocated",
    "BlockChange",
    "Bonsai",
    "CRITERIA",
    "ColumnMagnitude",
    "Compensated",
    "Compensation",
    "Consumer",
    "Contributions",
    "Criterion",
    "ExpertClusters",
    "ExpertOutputs",
    "FilterDistance",
    "Fisher",
    "FisherBrain",
    "Gathering",
    "GradientBlend",
    "Gram",
    "LoraPrune",
    "Magnitude",
    "Moments",
    "NormScale",
    "Normalisation",
    "Norms",
    "OptimalBrain",
    "OutlierRatios",
    "Pace",
    "Principal",
    "Pruned",
    "Random",
    "Recipe",
    "Reduction",
    "Reestimation",
    "Rotation",
    "RowUpdate",
    "SampleMeans",
    "Schedule",
    "Scheduled",
    "Statistics",
    "Step",
    "Surgeon",
    "Taylor",
    "WeightShares",
    "Weights",
    "allocations",
    "averaged",
    "clusters_below",
    "clusters_of",
    "collect",
    "column_costs",
    "compensate",
    "consumers_of",
    "depth",
    "merges",
    "named",
    "names",
    "needs_data",
    "needs_gradients",
    "next_token",
    "noise",
    "recipes",
    "reestimate",
    "refit",
    "rotate",
    "row_costs",
    "sequential",
    "surgeon_update",
]
_MODULES = {
    "depgraph.npz": "NpzFolder",
    "importance.accumulators": "Absolutes Gram Moments Norms SampleMeans Weights",
    "importance.activation": "CRITERIA Activation Criterion",
    "importance.allocations": "Allocated",
    "importance.averaging": "averaged",
    "importance.blockwise": "BlockChange OutlierRatios",
    "importance.bonsai": "Bonsai",
    "importance.column_magnitude": "ColumnMagnitude",
    "importance.compensation": "Compensated Compensation compensate",
    "importance.contributions": "Contributions",
    "importance.expert_outputs": "ExpertOutputs",
    "importance.experts": "ExpertClusters clusters_below clusters_of merges",
    "importance.fisher": "Fisher",
    "importance.fisher_brain": "FisherBrain",
    "importance.fpgm": "FilterDistance",
    "importance.gblm": "GradientBlend",
    "importance.lora": "LoraPrune",
    "importance.losses": "next_token",
    "importance.magnitude": "Magnitude",
    "importance.noisy": "noise",
    "importance.normalisation": "Normalisation",
    "importance.obs": "OptimalBrain",
    "importance.randomly": "Random",
    "importance.recipe": "Pruned Recipe",
    "importance.reduction": "Reduction",
    "importance.reestimation": "Reestimation reestimate",
    "importance.refitting": "refit",
    "importance.registry": "named names needs_data needs_gradients",
    "importance.rotation": "Principal Rotation rotate",
    "importance.row_update": "RowUpdate",
    "importance.scales": "NormScale",
    "importance.schedule": "Pace Schedule Scheduled Step",
    "importance.propagation": "sequential",
    "importance.collector": "Gathering",
    "importance.consumers": "Consumer consumers_of",
    "importance.statistics": "Statistics collect",
    "importance.surgeon": "Surgeon column_costs row_costs surgeon_update",
    "importance.taylor": "Taylor",
    "importance.weight_shares": "WeightShares",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}
__getattr__ = importing(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
