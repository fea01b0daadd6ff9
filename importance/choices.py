"""Looking a name up in a table of choices, with an error that offers the nearest ones."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

from depgraph.errors import ScoreError

T = TypeVar("T")


def pick(table: Mapping[str, T], name: str, what: str) -> T:
    """The entry of that name; raises ScoreError with the nearest names when there is none."""
    if isinstance(name, str) and name in table:
        return table[name]
    near = difflib.get_close_matches(str(name).lower(), table, n=3, cutoff=0.5)
    meant = f"did you mean {' or '.join(map(repr, near))}? Choose" if near else "choose"
    raise ScoreError(f"unknown {what} {name!r}: {meant} one of {', '.join(table)}")
