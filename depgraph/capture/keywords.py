"""Arguments that a forward takes as **kwargs, by their names: torch.export leaves no size of such ones open."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

_Parameter = inspect.Parameter


@contextmanager
def keywords_named(model: nn.Module, given: Iterable[str]) -> Iterator[None]:
    """Meanwhile the signature of the model's forward has those of the `given` names that it takes as **kwargs."""
    signature = inspect.signature(model.forward)
    declared = signature.parameters.values()
    rest = [one for one in declared if one.kind is _Parameter.VAR_KEYWORD]
    named = [_Parameter(name, _Parameter.KEYWORD_ONLY) for name in given if name not in signature.parameters]
    if not rest or not named:
        yield
        return
    own, before = vars(model), vars(model).get("forward")
    forward = functools.partial(model.forward)
    forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*(one for one in declared if one not in rest), *named]
    )
    own["forward"] = forward
    try:
        yield
    finally:
        own.pop("forward") if before is None else own.update(forward=before)
