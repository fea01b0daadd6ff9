"""Random scores: the baseline that every other score has to beat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from depgraph import DependencyGraph


@dataclass(frozen=True)
class Random:
    """A score for every group, uniform in [0, 1); an axis's scores depend on the seed and its name alone.

    A number drawn for a neuron says nothing beside one drawn for a head sixty times its size: by default a plan takes the
    same share of every axis.
    """

    comparable: ClassVar[bool] = False

    seed: int = 0

    def __call__(self, graph: DependencyGraph, /) -> dict[str, np.ndarray]:
        return {axis.name: drawn(self.seed, axis.name, axis.size) for axis in graph.axes}


def drawn(seed: int, name: str, size: int) -> np.ndarray:
    """Numbers in [0, 1) that depend on a seed and a name alone."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little")).random(size)
