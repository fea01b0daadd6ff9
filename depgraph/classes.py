"""The dims of a program in classes: those that are aligned as a whole are one, so that whatever flows reaches them once."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from depgraph.congruence import merge_congruent
from depgraph.graph import Fold, Program, Reason

NONE = -1


@dataclass
class Classes:
    """The dims of a program, merged where they are aligned as a whole; what is known of each class by its number."""

    of_dim: np.ndarray
    size: list[int]
    pushes: dict[int, list[tuple[np.ndarray, int, np.ndarray]]]
    folds: list[Fold]
    folds_of: dict[int, list[int]]
    fixed: dict[int, dict[int, Reason]]
    fixed_whole: dict[int, Reason]
    mixed: dict[int, str]

    @classmethod
    def of(cls, program: Program, lifted: frozenset[str] = frozenset()) -> Classes:
        """Number the classes of dims and sort the relations by class; reasons named in `lifted` are left out."""
        relations = program.relations
        merge_congruent(relations)
        roots = np.array([relations.find(d) for d in range(len(relations.sizes))], dtype=np.int64)
        used, of_dim = np.unique(roots, return_inverse=True)
        size = [relations.sizes[r] for r in used]
        found = cls(of_dim, size, defaultdict(list), [], defaultdict(list), defaultdict(dict), {}, {})
        found._alignments(program)
        found._folds(program)
        for dim, indices, reason in relations.fixed:
            if not reason.lift or reason.lift not in lifted:
                found._fix(int(of_dim[dim]), indices, reason)
        for dim, why in relations.mixed:
            found.mixed.setdefault(int(of_dim[dim]), why)
        return found

    def _alignments(self, program: Program) -> None:
        seen = set()
        for a in program.relations.alignments:
            left, right = int(self.of_dim[a.a]), int(self.of_dim[a.b])
            key = (left, right, a.ia.tobytes(), a.ib.tobytes())
            if key not in seen:
                seen.add(key)
                self.pushes[left].append((a.ia, right, a.ib))
                self.pushes[right].append((a.ib, left, a.ia))

    def _folds(self, program: Program) -> None:
        seen = set()
        for fold in program.relations.folds:
            mapped = Fold(int(self.of_dim[fold.flat]), tuple(int(self.of_dim[p]) for p in fold.parts))
            if mapped in seen:
                continue
            seen.add(mapped)
            for member in {mapped.flat, *mapped.parts}:
                self.folds_of[member].append(len(self.folds))
            self.folds.append(mapped)

    def _fix(self, number: int, indices: np.ndarray | None, reason: Reason) -> None:
        if indices is None:
            self.fixed_whole.setdefault(number, reason)
            return
        for i in indices:
            self.fixed[number].setdefault(int(i), reason)
