"""What tilted axes are worth in accuracy: the digits models cut to a share of their time, then trained for a moment.

Magnitude, `scope="axis"`: every axis loses the same share, or up to 1.25 times more where its milliseconds cost fewer parameters
(`depgraph/rankings.py`; here at any share of the time). Called by `latency_targets.py --accuracy`.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import digits  # noqa: E402

import depgraph  # noqa: E402
import exporters  # noqa: E402
import importance  # noqa: E402
from depgraph import rankings  # noqa: E402

WIDE = 64  # channels: two stairs of 16 at least on every axis
CASES = {"cnn-64": (0.70, 0.50, 0.35, 0.25), "cnn": (0.70, 0.50), "vit": (0.70, 0.50)}
TILTS = {"equal shares": 1.0, "tilted by up to 1.25": 1.25}
HEAD = f"| model | time | {' | '.join(TILTS)} |\n|{'---|' * (2 + len(TILTS))}"
BATCHES, DRAWS, RATE = 22, 4, 1e-3


@contextmanager
def tilted(most: float) -> Iterator[None]:
    """Meanwhile axes are tilted by up to `most` at any share of the time."""
    with patch.multiple(rankings, _MOST_TILT=most, _TILTED=(0.0, 1e-9)):
        yield


def recovered(model: nn.Module, data: digits.Digits, draw: int) -> nn.Module:
    """A copy of a pruned model after some batches of training."""
    model = copy.deepcopy(model).train()
    optimiser = torch.optim.AdamW(model.parameters(), RATE)
    for batch in data.batches(100 + draw, BATCHES):
        optimiser.zero_grad()
        digits.loss(model(batch["images"]), batch).backward()
        optimiser.step()
    return model.eval()


def rows(name: str, shares: tuple[float, ...]) -> Iterator[str]:
    """A line for each share of a model's time: parameters kept, and accuracy (the mean of the draws), in both ways."""
    data, test = digits.digits()
    model = digits.trained(name, digits.OUT, data)
    graph = depgraph.trace(model, (test.images[:32],))
    latency = exporters.MeasuredLatency.of(graph)
    for share in shares:
        target, cells = depgraph.Target(latency_ms=share * latency.dense_ms, latency=latency), []
        for most in TILTS.values():
            with tilted(most):
                plan = graph.plan(importance.Magnitude(), target, scope="axis")
            right = [digits.accuracy(recovered(plan.apply(), data, draw), test) for draw in range(DRAWS)]
            cells.append(f"{plan.cost().params / graph.dense_cost.params:.3f}: {sum(right) / DRAWS:.3f}")
        yield f"| {name} | {share:.2f} | {' | '.join(cells)} |"


def table() -> Iterator[str]:
    """The whole table, line by line."""
    digits.MODELS["cnn-64"] = lambda: digits.Cnn(WIDE)
    digits.EPOCHS["cnn-64"] = digits.EPOCHS["cnn"]
    warnings.filterwarnings("ignore")
    yield HEAD
    for name, shares in CASES.items():
        yield from rows(name, shares)
