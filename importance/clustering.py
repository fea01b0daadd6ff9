"""Clusters of units by their distances: STUN's greedy merging (METHODS.md 2.27), which approximates complete linkage."""

from __future__ import annotations

import math

import numpy as np

from depgraph.errors import DataError, ScoreError

Clusters = tuple[tuple[int, ...], ...]
"""Disjoint groups of units, each ascending, in the order of their first members."""


def row_distances(rows: np.ndarray, relative: bool = False) -> np.ndarray:
    """||row_i - row_j||_2 of rows [units, width], infinite on the diagonal; `relative` to the Frobenius norm of all rows."""
    wide = np.asarray(rows, dtype=np.float64)
    found = np.sqrt(np.square(wide[:, None] - wide[None]).sum(axis=-1)) if len(wide) < 64 else _long_distances(wide)
    size = float(np.linalg.norm(wide))
    return _without_itself(found / size if relative and size else found)


def coactivation_distances(counts: np.ndarray, relative: bool = True) -> np.ndarray:
    """Minus how often two units were chosen together, [units, units]; `relative` to the mean size of such a count.

    Raises DataError unless `counts` is a square, symmetric matrix of finite numbers from 0.
    """
    wide = np.asarray(counts, dtype=np.float64)
    if wide.ndim != 2 or wide.shape[0] != wide.shape[1] or not np.isfinite(wide).all() or (wide < 0).any():
        raise DataError(f"co-activation counts must be a square matrix of numbers from 0, they have shape {wide.shape}")
    if not np.allclose(wide, wide.T):
        raise DataError("co-activation counts must be symmetric: how often two units were chosen for one token")
    apart = ~np.eye(len(wide), dtype=bool)
    size = float(wide[apart].mean()) if apart.any() else 0.0
    return _without_itself(-wide / size if relative and size else -wide)


def merged(distances: np.ndarray, threshold: float = math.inf, at_least: int = 1) -> Clusters:
    """Clusters of units: the closest pairs are merged first, until `at_least` clusters are left.

    Two clusters join over the pair (i, j) if i is nearer than `threshold` to every member of j's, and j to every one of i's.

    Raises ScoreError unless `distances` is a symmetric matrix [units, units] without NaN.
    """
    check_distances(distances)
    size = len(distances)
    cluster_of = {unit: [unit] for unit in range(size)}
    left, upper = size, np.triu_indices(size, 1)
    for at in np.argsort(distances[upper], kind="stable"):
        i, j = int(upper[0][at]), int(upper[1][at])
        one, two = cluster_of[i], cluster_of[j]
        if left <= at_least or not distances[i, j] < threshold:
            break
        if one is two or not ((distances[i, two] < threshold).all() and (distances[j, one] < threshold).all()):
            continue
        one.extend(two)
        cluster_of |= dict.fromkeys(two, one)
        left -= 1
    return ordered(cluster_of.values())


def linkage(distances: np.ndarray) -> list[tuple[int, int, float]]:
    """The merges of complete linkage, nearest first: two clusters by their first members, and how far apart they were.

    All merges below a threshold together give clusters whose members are nearer than that to each other.
    """
    check_distances(distances)
    apart = np.array(distances, dtype=np.float64)
    np.fill_diagonal(apart, np.inf)
    alive = list(range(len(apart)))
    found = []
    while len(alive) > 1:
        here = apart[np.ix_(alive, alive)]
        np.fill_diagonal(here, np.inf)
        a, b = sorted(np.unravel_index(int(here.argmin()), here.shape))
        one, two = alive[a], alive[b]
        found.append((one, two, float(here[a, b])))
        apart[one] = np.maximum(apart[one], apart[two])
        apart[:, one] = apart[one]
        alive.remove(two)
    return found


def ordered(clusters: object) -> Clusters:
    """Clusters without repeats, each ascending, by their first members."""
    return tuple(sorted({tuple(sorted(cluster)) for cluster in clusters}))  # type: ignore[attr-defined]


def check_distances(distances: np.ndarray) -> None:
    """Raise ScoreError unless this is a symmetric matrix without NaN; the diagonal doesn't matter."""
    square = distances.ndim == 2 and distances.shape[0] == distances.shape[1]
    upper = np.triu_indices(len(distances), 1) if square else None
    if upper is None or np.isnan(distances[upper]).any() or not np.allclose(distances[upper], distances.T[upper]):
        raise ScoreError(f"distances must be a symmetric matrix without NaN, they have shape {distances.shape}")


def _long_distances(rows: np.ndarray) -> np.ndarray:
    squares = np.square(rows).sum(axis=1)
    return np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * rows @ rows.T, 0))


def _without_itself(distances: np.ndarray) -> np.ndarray:
    np.fill_diagonal(distances, np.inf)
    return distances
