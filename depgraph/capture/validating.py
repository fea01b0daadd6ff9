"""torch's distributions check what they are given by a decision on its values, which only ever raises: none of a capture's business."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from torch.distributions import Distribution

_lock = Lock()
_before: list[bool] = []
"""What was set when the first of those that are within began, once for each of them: they may end in any order."""


@contextmanager
def unvalidated() -> Iterator[None]:
    """Distributions that weren't told to check their values don't: as under ``python -O``."""
    with _lock:
        _before.append(_before[0] if _before else Distribution._validate_args)
        Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        with _lock:
            was = _before.pop()
            if not _before:
                Distribution.set_default_validate_args(was)
