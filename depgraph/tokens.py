"""Old and new numbers of the tokens of a model whose vocabulary was trimmed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from torch import nn

from depgraph.cutting.record import cuts
from depgraph.errors import PlanError


@dataclass(frozen=True)
class TokenMap:
    """Token `kept[i]` of the `size` tokens before all cuts is token i now."""

    size: int
    kept: np.ndarray

    @classmethod
    def of(cls, model: nn.Module, name: str = "") -> TokenMap:
        """The map of a model that the library cut or loaded, all its cuts together.

        `name` is an input of the model that holds ids; it may be left out when one vocabulary was trimmed.

        Raises PlanError when none was trimmed, or several and none is named.
        """
        trimmed = [c["vocabulary"] for c in cuts(getattr(model, "depgraph_record", None)) if c.get("vocabulary")]
        found = [v for v in trimmed if name in v["inputs"]] if name else trimmed
        inputs = sorted({v["inputs"][0] for v in found})
        if not found:
            raise PlanError(
                f"no vocabulary{f' of input {name!r}' if name else ''} of this {type(model).__name__} was trimmed"
            )
        if len(inputs) > 1:
            raise PlanError(
                f"several vocabularies of this {type(model).__name__} were trimmed: name one of {', '.join(inputs)}"
            )
        kept = np.arange(found[0]["size"])
        for one in found:
            kept = kept[np.array(one["kept"], dtype=np.int64)]
        return cls(found[0]["size"], kept)

    @overload
    def to_new(self, ids: torch.Tensor) -> torch.Tensor: ...
    @overload
    def to_new(self, ids: Iterable[int]) -> list[int]: ...
    def to_new(self, ids: torch.Tensor | Iterable[int]) -> torch.Tensor | list[int]:
        """Old ids (a tensor of any shape, or a list) as new ones; raises PlanError for a token that went."""
        new = np.full(self.size, -1)
        new[self.kept] = np.arange(len(self.kept))
        return _looked_up(new, ids, "was trimmed")

    @overload
    def to_old(self, ids: torch.Tensor) -> torch.Tensor: ...
    @overload
    def to_old(self, ids: Iterable[int]) -> list[int]: ...
    def to_old(self, ids: torch.Tensor | Iterable[int]) -> torch.Tensor | list[int]:
        """New ids as old ones; raises PlanError for an id that the model doesn't have."""
        return _looked_up(self.kept, ids, "is not there")


def _looked_up(table: np.ndarray, ids: torch.Tensor | Iterable[int], missing: str) -> torch.Tensor | list[int]:
    given = ids.cpu().numpy() if isinstance(ids, torch.Tensor) else np.array(list(ids), dtype=np.int64)
    outside = given[(given < 0) | (given >= len(table))]
    if outside.size:
        raise PlanError(f"token {int(outside.flat[0])} is none of 0 to {len(table) - 1}")
    found = table[given]
    if (found < 0).any():
        raise PlanError(f"token {int(given[found < 0].flat[0])} {missing}")
    return torch.from_numpy(found).to(ids) if isinstance(ids, torch.Tensor) else [int(i) for i in found]
