"""Ridge regression of utilities on masks, its strength chosen by how well it ranks what it hasn't seen."""

from __future__ import annotations

import numpy as np

STRENGTHS = (1e-4, 1e-2, 1.0, 1e2)
"""Of the penalty, as shares of the mean of X X' on its diagonal."""


def kendall(one: np.ndarray, other: np.ndarray) -> float:
    """Kendall's tau-b of two arrays [n]: 1 where they rank alike, -1 where they rank the other way; 0 where one is constant."""
    first, second = (np.sign(values[:, None] - values[None]) for values in (one, other))
    pairs = np.sqrt((first**2).sum() * (second**2).sum())
    return float((first * second).sum() / pairs) if pairs else 0.0


def ridge(inputs: np.ndarray, outputs: np.ndarray, strength: float) -> tuple[np.ndarray, float]:
    """Coefficients [columns] and intercept of the least ||inputs @ c + b - outputs||^2 + penalty ||c||^2.

    `inputs` are [rows, columns], `outputs` [rows]; the penalty is `strength` times the mean diagonal of the centred X X'.
    """
    middle, level = inputs.mean(axis=0), outputs.mean()
    centred = inputs - middle
    products = centred @ centred.T
    penalty = strength * (np.trace(products) / len(products) or 1.0)
    found = centred.T @ np.linalg.solve(products + penalty * np.eye(len(products)), outputs - level)
    return found, float(level - middle @ found)


def fitted(inputs: np.ndarray, outputs: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """The coefficients [columns] of the ridge regression whose strength ranks best the rows that it wasn't fitted to.

    `folds` [rows] says which rows are left out together. The strongest of equally good ones is taken.
    """
    best = max(reversed(STRENGTHS), key=lambda strength: _agreement(inputs, outputs, folds, strength))
    return ridge(inputs, outputs, best)[0]


def _agreement(inputs: np.ndarray, outputs: np.ndarray, folds: np.ndarray, strength: float) -> float:
    """The mean over folds of Kendall's tau between their outputs and those of a regression on the other folds."""
    taus = []
    for fold in np.unique(folds):
        out = folds == fold
        if out.all():
            continue
        coefficients, intercept = ridge(inputs[~out], outputs[~out], strength)
        taus.append(kendall(inputs[out] @ coefficients + intercept, outputs[out]))
    return float(np.mean(taus)) if taus else 0.0
