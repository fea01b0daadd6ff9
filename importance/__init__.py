"""What a group is worth: estimators that give every group of every axis one number, the lowest to go first.

An estimator is called with a `depgraph.DependencyGraph` and returns a dict from axis name to a float64 array [groups].
`importance.depth` ranks blocks and branches, and searches which can be left out.
`Allocated` makes an estimator of another one and of a way to spread the budget over the axes, see `importance.allocations`.
"""

from importance import allocations, depth
from importance.accumulators import Absolutes, Gram, Moments, Norms, SampleMeans, Weights
from importance.activation import CRITERIA, Activation, Criterion
from importance.allocations import Allocated
from importance.column_magnitude import ColumnMagnitude
from importance.compensation import Compensated, Compensation, compensate
from importance.contributions import Contributions
from importance.experts import ExpertClusters, clusters_below, clusters_of, merges
from importance.fisher import Fisher
from importance.fpgm import FilterDistance
from importance.gblm import GradientBlend
from importance.lora import LoraPrune
from importance.losses import next_token
from importance.magnitude import Magnitude
from importance.normalisation import Normalisation
from importance.obs import OptimalBrain
from importance.randomly import Random
from importance.reduction import Reduction
from importance.registry import named, names, needs_data
from importance.scales import NormScale
from importance.schedule import Schedule, Scheduled, Step
from importance.statistics import Consumer, Gathering, Statistics, collect, consumers_of
from importance.surgeon import Surgeon, column_costs, row_costs, surgeon_update
from importance.taylor import Taylor

__all__ = [
    "Absolutes",
    "Activation",
    "Allocated",
    "CRITERIA",
    "ColumnMagnitude",
    "Compensated",
    "Compensation",
    "Consumer",
    "Contributions",
    "Criterion",
    "ExpertClusters",
    "FilterDistance",
    "Fisher",
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
    "Random",
    "Reduction",
    "SampleMeans",
    "Schedule",
    "Scheduled",
    "Statistics",
    "Step",
    "Surgeon",
    "Taylor",
    "Weights",
    "allocations",
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
    "next_token",
    "row_costs",
    "surgeon_update",
]
