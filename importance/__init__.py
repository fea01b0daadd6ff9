"""What a group is worth: estimators that give every group of every axis one number, the lowest to go first.

An estimator is called with a `depgraph.DependencyGraph` and returns a dict from axis name to a float64 array [groups].
`Allocated` makes an estimator of another one and of a way to spread the budget over the axes, see `importance.allocations`.
"""

from importance import allocations
from importance.allocations import Allocated
from importance.losses import next_token
from importance.magnitude import Magnitude
from importance.normalisation import Normalisation
from importance.randomly import Random
from importance.reduction import Reduction
from importance.registry import named, names, needs_data
from importance.schedule import Schedule, Scheduled, Step
from importance.taylor import Taylor

__all__ = [
    "Allocated",
    "Magnitude",
    "Normalisation",
    "Random",
    "Reduction",
    "Schedule",
    "Scheduled",
    "Step",
    "Taylor",
    "allocations",
    "named",
    "names",
    "needs_data",
    "next_token",
]
