"""What a group is worth: estimators that give every group of every axis one number, the lowest to go first.

An estimator is called with a `depgraph.DependencyGraph` and returns a dict from axis name to a float64 array [groups].
`Allocated` makes an estimator of another one and of a way to spread the budget over the axes, see `importance.allocations`.
"""

from importance import allocations
from importance.accumulators import Absolutes, Gram, Moments, Norms, SampleMeans, Weights
from importance.activation import CRITERIA, Activation, Criterion
from importance.allocations import Allocated
from importance.column_norms import ColumnNorm
from importance.compensation import Compensated, Compensation, compensate
from importance.contributions import Contributions
from importance.curvature import SecondOrder
from importance.experts import ExpertClusters, Mixture, averaged_experts, expert_clusters, mixtures, representatives
from importance.geometric_median import GeometricMedian
from importance.gradient_norms import Calibration, GradientNorm, gradient_norms
from importance.lora import Adapter, LoRAPrune, adapters_of
from importance.losses import next_token
from importance.magnitude import Magnitude
from importance.norm_scales import NormScale
from importance.normalisation import Normalisation
from importance.obs import OptimalBrain
from importance.randomly import Random
from importance.reduction import Reduction
from importance.registry import named, names, needs_data
from importance.schedule import Schedule, Scheduled, Step
from importance.statistics import Consumer, Gathering, Statistics, collect, consumers_of
from importance.surgeon import Surgeon, surgeon_update
from importance.taylor import Taylor

__all__ = [
    "Absolutes",
    "Activation",
    "Adapter",
    "Allocated",
    "CRITERIA",
    "Calibration",
    "ColumnNorm",
    "Compensated",
    "Compensation",
    "Consumer",
    "Contributions",
    "Criterion",
    "ExpertClusters",
    "Gathering",
    "GeometricMedian",
    "GradientNorm",
    "Gram",
    "LoRAPrune",
    "Magnitude",
    "Mixture",
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
    "SecondOrder",
    "Statistics",
    "Step",
    "Surgeon",
    "Taylor",
    "Weights",
    "adapters_of",
    "allocations",
    "averaged_experts",
    "collect",
    "compensate",
    "consumers_of",
    "expert_clusters",
    "gradient_norms",
    "mixtures",
    "named",
    "names",
    "needs_data",
    "next_token",
    "representatives",
    "surgeon_update",
]
