"""Recipes that prune experts of mixtures and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from importance.expert_outputs import ExpertOutputs
from importance.experts import ExpertClusters
from importance.recipe import Recipe

Batches = Iterable[Any]


def minitron_experts(batches: Batches) -> Recipe:
    """Compact language models (2.9) for experts: the mean length of share x output, over the tokens routed to each.

    The same share of every layer's experts goes; a model without experts has nothing to prune.
    """
    return Recipe("minitron_experts", ExpertOutputs(batches), units="experts", scope="axis")


def stun() -> Recipe:
    """STUN's first step (2.27): experts in clusters by the rows of the router, of each of which one stays, nearest to the mean.

    The same share of every layer's experts goes; a model without experts has nothing to prune. The paper's second step takes single
    weights; co-activation is `ExpertClusters(batches, coactivation=...)`.
    """
    return Recipe("stun", ExpertClusters(), units="experts", scope="axis")


__all__ = ["minitron_experts", "stun"]
