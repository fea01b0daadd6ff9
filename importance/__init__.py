"""What a group is worth: estimators that give every group of every axis one number, the lowest to go first.

An estimator is called with a `depgraph.DependencyGraph` and returns a dict from axis name to a float64 array [groups].
"""

from importance.losses import next_token
from importance.magnitude import Magnitude
from importance.normalisation import Normalisation
from importance.randomly import Random
from importance.reduction import Reduction
from importance.registry import named, names, needs_data
from importance.taylor import Taylor

__all__ = [
    "Magnitude",
    "Normalisation",
    "Random",
    "Reduction",
    "Taylor",
    "named",
    "names",
    "needs_data",
    "next_token",
]
