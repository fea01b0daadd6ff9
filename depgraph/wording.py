"""Words of messages."""

from __future__ import annotations


def counted(number: int, one: str, more: str) -> str:
    """`1 axis`, `2 axes`."""
    return f"{number:,} {one if number == 1 else more}"


def axis_and_more(names: list[str]) -> str:
    """`axis 'a'`, `axis 'a' (and 2 more)`."""
    return f"axis {names[0]!r}" + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
