"""Folds that say the same of equal dims make further dims equal: heads split off twice from one width are the same heads.

Two dims that are the product of the same parts go together index by index, and so do the parts, one by one, of one dim
that is split twice into the same sizes. Congruence closure (Downey, Sethi, Tarjan 1980) finds all that follows from this,
so that a chain of views has as many classes of dims as it has different foldings, however long it is. A dim that can't go
is kept apart from one that can, which leaves the reason to be found by what reaches it.
"""

from __future__ import annotations

from collections import defaultdict, deque

from depgraph.graph import Relations


def merge_congruent(relations: Relations) -> None:
    """Align the dims that folds make equal, until nothing more follows; a fold is looked at again when a dim of it was merged."""
    stuck = {relations.find(dim) for dim, indices, _ in relations.fixed if indices is None}
    users: dict[int, list[int]] = defaultdict(list)
    for k, fold in enumerate(relations.folds):
        for dim in {relations.find(d) for d in (fold.flat, *fold.parts)}:
            users[dim].append(k)
    made_of: dict[tuple[int, ...], int] = {}
    split_into: dict[tuple[int, ...], tuple[int, ...]] = {}
    queue, waiting = deque(range(len(relations.folds))), set(range(len(relations.folds)))

    def merge(a: int, b: int) -> None:
        ra, rb = relations.find(a), relations.find(b)
        if ra == rb or (ra in stuck) != (rb in stuck):
            return
        relations.align(ra, rb)
        kept, lost = min(ra, rb), max(ra, rb)
        again = users.pop(lost, [])
        users[kept] += again
        queue.extend(k for k in again if k not in waiting)
        waiting.update(again)

    while queue:
        k = queue.popleft()
        waiting.discard(k)
        fold = relations.folds[k]
        flat, parts = relations.find(fold.flat), tuple(map(relations.find, fold.parts))
        merge(flat, made_of.setdefault(parts, flat))
        known = split_into.setdefault((relations.find(flat), *(relations.sizes[p] for p in parts)), parts)
        for part, other in zip(parts, known, strict=True):
            merge(part, other)
