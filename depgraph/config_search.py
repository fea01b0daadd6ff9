"""Finding the config of a model's class that builds certain shapes, by edits that each bring the shapes nearer.

Nothing is known of any architecture: models are built without weights. What an edit does to dims that no edit has changed since
is known from before, so that of all configs only those that look nearest are built again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from depgraph.configs import Place, edited, shapes_of
from depgraph.cutting.building import undisturbed

_MOST_STEPS = 12
Dims = dict[tuple[str, int], int]
"""Sizes by the name of what a checkpoint holds and the number of a dim."""
Change = tuple[Place, int]
Edits = dict[Place, int]
Key = frozenset[Change]


def dims_of(model: nn.Module) -> Dims:
    """The sizes of all dims of all that a checkpoint of a model holds."""
    return {(name, d): size for name, shape in shapes_of(model).items() for d, size in enumerate(shape)}


@dataclass
class ConfigSearch:
    """For edits of `start` by which `kind` builds the sizes `wanted`.

    `became` says what sizes became: an integer of the config takes what became of its value, one that isn't set any size that
    there is now. `late` is when to give up, on the monotonic clock.
    """

    kind: type
    start: Any
    wanted: Dims
    became: dict[int, set[int]]
    late: float
    _built: dict[Key, Dims | None] = field(default_factory=dict, init=False)
    _guessed: dict[Key, Dims] = field(default_factory=dict, init=False)

    @property
    def builds(self) -> int:
        """How many configs were built so far."""
        return len(self._built)

    def apart(self, edits: Edits) -> float:
        """How far what the edited config builds is from what is wanted; infinite where it builds other tensors, or nothing."""
        return self._distance(self._dims(frozenset(edits.items())))

    def found(self, ban: Change | None = None) -> Edits | None:
        """The edits, in the order in which they brought the sizes nearer, and without `ban`; None where there are none."""
        edits: Edits = {}
        apart = self.apart(edits)
        for _ in range(_MOST_STEPS):
            if apart == 0:
                return edits
            change = self._nearest(edits, ban)
            if change is None or not (nearer := self.apart({**edits, change[0]: change[1]})) < apart:
                return None
            self._guess(edits, change)
            edits[change[0]], apart = change[1], nearer
        return None

    def _nearest(self, edits: Edits, ban: Change | None) -> Change | None:
        """The change that brings the sizes nearest, the first of several: built, whatever was thought of it before."""
        changes = [change for change in self._changes(edits) if change != ban]
        while True:
            apart: dict[Change, float] = {}
            for change in changes:
                if time.monotonic() > self.late:
                    return None
                key = frozenset({**edits, change[0]: change[1]}.items())
                guess = self._guessed.get(key) if key not in self._built else None
                apart[change] = self._distance(guess if guess is not None else self._dims(key))
            best = min(apart, key=apart.__getitem__, default=None)
            if best is None or self.apart({**edits, best[0]: best[1]}) == apart[best]:
                return best

    def _guess(self, edits: Edits, taken: Change) -> None:
        """What other changes will build once `taken` is an edit too, where it changes other dims than they do."""
        before, after = (self._built.get(frozenset(e.items())) for e in (edits, {**edits, taken[0]: taken[1]}))
        if before is None or after is None or before.keys() != self.wanted.keys():
            return
        touched = {dim for dim, size in after.items() if before.get(dim) != size}
        for place, new in self._changes(edits):
            key = frozenset({**edits, place: new}.items())
            alone = self._built.get(key) or self._guessed.get(key)
            if place == taken[0] or alone is None:
                continue
            both = frozenset({**edits, taken[0]: taken[1], place: new}.items())
            if alone.keys() != before.keys():
                self._guessed[both] = alone  # other tensors, now as then
                continue
            own = {dim: size for dim, size in alone.items() if before[dim] != size}
            if touched.isdisjoint(own):
                self._guessed[both] = {**after, **own}

    def _dims(self, key: Key) -> Dims | None:
        if key not in self._built:
            try:
                with undisturbed("meta", torch.get_default_dtype()):
                    self._built[key] = dims_of(self.kind(edited(self.start, dict(key))))
            except Exception:  # what the config or the class refuses, in whatever way
                self._built[key] = None
        return self._built[key]

    def _distance(self, dims: Dims | None) -> float:
        if dims is None or dims.keys() != self.wanted.keys():
            return math.inf
        return sum(abs(size - self.wanted[dim]) for dim, size in dims.items())

    def _changes(self, edits: Edits) -> Iterator[Change]:
        """An integer changed from an old size to a new one, or one that isn't set given a new one."""
        fresh = sorted({new for options in self.became.values() for new in options})
        for place, was in _integers(self.start, ()):
            value = edits.get(place, was)
            for new in fresh if value is None else sorted(self.became.get(value, ())):
                if new != value:
                    yield place, new


def _integers(config: Any, before: Place) -> Iterator[tuple[Place, int | None]]:
    for name, value in sorted(vars(config).items()):
        if name.startswith("_") or isinstance(value, bool):
            continue
        if isinstance(value, int):
            yield (*before, name), value
        elif value is None and name.startswith(("n_", "num_")) or value is None and name.endswith(("_dim", "_size")):
            yield (*before, name), None
        elif type(value).__name__.endswith("Config"):
            yield from _integers(value, (*before, name))
