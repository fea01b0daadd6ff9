"""Labels flow until nothing changes: from relations to axes and groups.

An axis is found by giving every index of one dim a label of its own and pushing the labels through the relations in both
directions; where two labels meet on one index they are joined. At the fixpoint, the dims reached are the axis and the
label classes its groups. Aligned dims were merged into classes beforehand, so each class is reached once; an index is
filled once an axis, so the work is linear in what the axis reaches.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field

import numpy as np

from depgraph.classes import NONE, Classes
from depgraph.graph import Fold, Reason

Labels = np.ndarray


@dataclass
class Labelling:
    """What one axis says: for each class reached, the label of every index (`NONE` where it doesn't reach)."""

    labels: dict[int, Labels]
    root: np.ndarray
    seed: int
    reasons: dict[int, Reason] = field(default_factory=dict)

    def groups(self, number: int) -> Labels:
        """Labels of a class after all joins, so that equal numbers mean the same group."""
        raw = self.labels[number]
        return np.where(raw == NONE, NONE, self.root[raw])


class _Flow:
    """One run of the labels, from one seed, to the fixpoint.

    `spent` has, by class, the indices that were labelled by runs that ended as one group, and so as no axis. Once all labels
    of this run are one group too, it needs to go on only from where those weren't.
    """

    def __init__(self, classes: Classes, seed: int, indices: np.ndarray, spent: dict[int, np.ndarray]) -> None:
        self.classes = classes
        self.collapsed = False
        self.root = np.arange(classes.size[seed])
        self.labels: dict[int, Labels] = {}
        self.split_off: list[int] = []
        self.queue: deque[int] = deque()
        self.waiting: set[int] = set()
        start = np.full(classes.size[seed], NONE)
        start[indices] = indices
        self._fill(seed, start)
        while self.queue:
            number = self.queue.popleft()
            self.waiting.discard(number)
            self.collapsed = self.collapsed or bool((self.root[indices] == self.root[indices[0]]).all())
            if not self.collapsed or not self._is_spent(number, spent):
                self._push(number)
        if self.collapsed:
            for number, mine in self.labels.items():
                spent[number] = (mine != NONE) | spent.get(number, False)

    def _is_spent(self, number: int, spent: dict[int, np.ndarray]) -> bool:
        """Did runs that ended as one group go on from all that is labelled here?"""
        return number in spent and bool(spent[number][self.labels[number] != NONE].all())

    def _join(self, a: Labels, b: Labels) -> None:
        while True:
            ra, rb = self.root[a], self.root[b]
            apart = ra != rb
            if not apart.any():
                return
            low, high = np.minimum(ra, rb)[apart], np.maximum(ra, rb)[apart]
            np.minimum.at(self.root, high, low)
            while True:
                jumped = self.root[self.root]
                if (jumped == self.root).all():
                    break
                self.root = jumped

    def _fill(self, number: int, new: Labels) -> None:
        old = self.labels.get(number)
        if old is None:
            self.labels[number] = new
            changed = bool((new != NONE).any())
            if not changed:
                del self.labels[number]
        else:
            both = (old != NONE) & (new != NONE)
            if both.any():
                self._join(old[both], new[both])
            fresh = (old == NONE) & (new != NONE)
            changed = bool(fresh.any())
            if changed:
                self.labels[number] = np.where(fresh, new, old)
        if changed and number not in self.waiting:
            self.waiting.add(number)
            self.queue.append(number)

    def _push(self, number: int) -> None:
        mine = self.labels[number]
        for here, other, there in self.classes.pushes.get(number, ()):
            carried = mine[here]
            has = carried != NONE
            if not has.any():
                continue
            new = np.full(self.classes.size[other], NONE)
            new[there[has]] = carried[has]
            self._join(carried[has], new[there[has]])
            self._fill(other, new)
        for k in self.classes.folds_of.get(number, ()):
            self._through(self.classes.folds[k], number)

    def _through(self, fold: Fold, number: int) -> None:
        shape = tuple(self.classes.size[p] for p in fold.parts)
        if number == fold.flat:
            self._unfold(fold, shape)
        for j, part in enumerate(fold.parts):
            if part == number:
                view = [1] * len(shape)
                view[j] = shape[j]
                self._fill(fold.flat, np.broadcast_to(self.labels[part].reshape(view), shape).reshape(-1).copy())

    def _unfold(self, fold: Fold, shape: tuple[int, ...]) -> None:
        laid_out = self.labels[fold.flat].reshape(shape)
        known = [j for j, part in enumerate(fold.parts) if part in self.labels]
        rows = [np.moveaxis(laid_out, j, 0).reshape(shape[j], -1) for j in range(len(shape))]
        candidates = known or range(len(shape))
        j = max(candidates, key=lambda k: (self._kept_apart(rows[k]), shape[k]))
        self._join_rows(rows[j])
        self._fill(fold.parts[j], rows[j].max(axis=1))
        self.split_off.extend(part for k, part in enumerate(fold.parts) if k != j)

    def _kept_apart(self, rows: np.ndarray) -> int:
        """How many groups stay apart when every row becomes one group; a row that nothing has reached stays by itself."""
        canonical = np.where(rows == NONE, NONE, self.root[rows])
        first = canonical.max(axis=1)
        unreached = int((first == NONE).sum())
        if ((canonical == first[:, None]) | (canonical == NONE)).all():
            return unreached + len(np.unique(first[first != NONE]))
        saved = self.root.copy()
        self._join_rows(rows)
        kept = len(np.unique(self.root[rows[rows != NONE]]))
        self.root = saved
        return unreached + kept

    def _join_rows(self, rows: np.ndarray) -> None:
        first = np.broadcast_to(rows.max(axis=1)[:, None], rows.shape)
        has = rows != NONE
        if has.any():
            self._join(rows[has], first[has])


def find_axes(classes: Classes, seeds: list[int], anchors: set[int]) -> list[Labelling]:
    """All axes that reach a class in `anchors` (those of parameters), seeded from `seeds` and from what folds split off.

    A dim that is made of others (the product of a fold, the parts of a concatenation) is seeded through them. An index
    that is already alone in its group of some axis is explained, and isn't seeded again.
    """
    explained: dict[int, np.ndarray] = {}
    spent: dict[int, np.ndarray] = {}
    found: dict[bytes, Labelling] = {}
    queue, seeded, seen = deque[int](), set[int](), set[int]()
    queue.extend(_pieces_first(classes, seeds, explained, seen))
    while queue:
        seed = queue.popleft()
        if seed in seeded or classes.size[seed] < 2 or seed in classes.fixed_whole:
            continue
        seeded.add(seed)
        done = explained.get(seed)
        indices = np.arange(classes.size[seed]) if done is None else np.flatnonzero(~done)
        if not len(indices):
            continue
        flow = _Flow(classes, seed, indices, spent)
        queue.extend(_pieces_first(classes, flow.split_off, explained, seen))
        labelling = Labelling(flow.labels, flow.root, seed)
        if not anchors & labelling.labels.keys():
            continue
        _explain(labelling, explained)
        found.setdefault(_signature(labelling, anchors), labelling)
    axes = _without_coarser(list(found.values()), anchors)
    for labelling in axes:
        _collect_reasons(classes, labelling)
    return axes


def _pieces_first(classes: Classes, seeds: list[int], explained: dict[int, np.ndarray], seen: set[int]) -> list[int]:
    """Replace every seed that is made of smaller dims by those, and keep it for what they leave over; none in `seen`."""
    ordered: list[int] = []

    def visit(seed: int) -> None:
        if seed in seen:
            return
        seen.add(seed)
        flats = [f for k in classes.folds_of.get(seed, ()) if (f := classes.folds[k]).flat == seed]
        if flats:
            for part in flats[0].parts:
                visit(part)
            return
        before = explained.get(seed)
        covered = np.zeros(classes.size[seed], dtype=bool) if before is None else before.copy()
        for here, other, there in classes.pushes.get(seed, ()):
            if classes.size[other] < classes.size[seed] and len(there) == classes.size[other]:
                visit(other)
                covered[here] = True
        explained[seed] = covered
        ordered.append(seed)

    for seed in seeds:
        visit(seed)
    return ordered


def _without_coarser(axes: list[Labelling], anchors: set[int]) -> list[Labelling]:
    """Drop axes with a single group, and those whose every group is a union of another axis's groups."""
    axes = [a for a in axes if _has_several_groups(a)]
    by_class: dict[int, list[Labelling]] = defaultdict(list)
    for axis in axes:
        for number in anchors & axis.labels.keys():
            by_class[number].append(axis)
    dropped: set[int] = set()
    for axis in axes:
        shared = by_class[min(anchors & axis.labels.keys())]
        if any(other is not axis and id(other) not in dropped and _refines(other, axis, anchors) for other in shared):
            dropped.add(id(axis))
    return [a for a in axes if id(a) not in dropped]


def _has_several_groups(axis: Labelling) -> bool:
    roots = (axis.root[raw[raw != NONE]] for raw in axis.labels.values())
    ends = [(int(found.min()), int(found.max())) for found in roots if len(found)]
    return min(low for low, _ in ends) < max(high for _, high in ends)


def _refines(fine: Labelling, coarse: Labelling, anchors: set[int]) -> bool:
    """Does each group of `fine` that touches `coarse` lie within one group of it, on the same parameter dims?"""
    numbers = anchors & coarse.labels.keys()
    if not numbers <= fine.labels.keys():
        return False
    belongs = np.full(len(fine.root), NONE)
    for number in numbers:
        f, c = fine.groups(number), coarse.groups(number)
        on = c != NONE
        if (f[on] == NONE).any():
            return False
        new = belongs[f[on]]
        if ((new != NONE) & (new != c[on])).any():
            return False
        belongs[f[on]] = c[on]
        if (belongs[f[on]] != c[on]).any():
            return False
    return True


def _explain(labelling: Labelling, explained: dict[int, np.ndarray]) -> None:
    for number in labelling.labels:
        groups = labelling.groups(number)
        counts = np.bincount(groups[groups != NONE], minlength=len(labelling.root))
        alone = (groups != NONE) & (counts[groups] == 1)
        before = explained.get(number)
        explained[number] = alone if before is None else before | alone


def _signature(labelling: Labelling, anchors: set[int]) -> bytes:
    """Equal for two labellings that split the same parameter dims into the same groups."""
    parts = []
    for number in sorted(anchors & labelling.labels.keys()):
        groups, places = labelling.groups(number), np.arange(labelling.labels[number].size)
        first = np.full(len(labelling.root) + 1, NONE)
        first[groups[::-1]] = places[::-1]
        first[NONE] = NONE
        canonical = first[groups]  # a group is known by where it begins
        parts.append(np.array([number, len(groups)]).tobytes() + canonical.tobytes())
    return b"".join(parts)


def _collect_reasons(classes: Classes, labelling: Labelling) -> None:
    """For every group that touches a fixed index, the first reason found."""
    for number in labelling.labels:
        whole = classes.fixed_whole.get(number)
        some = classes.fixed.get(number)
        if whole is None and not some:
            continue
        groups = labelling.groups(number)
        if whole is not None:
            for group in np.unique(groups[groups != NONE]):
                labelling.reasons.setdefault(int(group), whole)
        for i, reason in (some or {}).items():
            if groups[i] != NONE:
                labelling.reasons.setdefault(int(groups[i]), reason)
