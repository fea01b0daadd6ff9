"""Depth: which blocks and branches of a model can be left out, by published methods and by a search of our own.

A `DepthScorer` is called with a graph and gives every block or branch, by name, a number; a `Search` is called with a graph and
how many are to go, and gives an `Order`: which go, with the value at each step and the layer evaluations that it took. Nothing
here changes the model.
"""

from importance.depth.angular import AngularDrop, AngularSpan, BeforeLast
from importance.depth.batches import windows
from importance.depth.comparing import InLoss, LossIncrease
from importance.depth.engine import Effort, Engine
from importance.depth.exhaustive import Exhaustive
from importance.depth.greedy import FinerCut, Sleb
from importance.depth.influence import BlockInfluence
from importance.depth.merging import Laco, Merge, Merging, merged
from importance.depth.metrics import Distance, LossMetric, Measured, Metric
from importance.depth.names import depth_named, depth_names, depth_needs_data
from importance.depth.order import DepthScorer, Order, Search, Step
from importance.depth.pairs import PairSearch
from importance.depth.ranking import OneShot
from importance.depth.shift import OutputShift
from importance.depth.weights import DepthMagnitude, DepthRandom, DepthTaylor
from importance.depth.without import Perplexity, Without

__all__ = [
    "AngularDrop",
    "AngularSpan",
    "BeforeLast",
    "BlockInfluence",
    "DepthMagnitude",
    "DepthRandom",
    "DepthScorer",
    "DepthTaylor",
    "Distance",
    "Effort",
    "Engine",
    "Exhaustive",
    "FinerCut",
    "InLoss",
    "Laco",
    "LossIncrease",
    "LossMetric",
    "Measured",
    "Merge",
    "Merging",
    "Metric",
    "OneShot",
    "Order",
    "OutputShift",
    "PairSearch",
    "Perplexity",
    "Search",
    "Sleb",
    "Step",
    "Without",
    "depth_named",
    "depth_names",
    "depth_needs_data",
    "merged",
    "windows",
]
