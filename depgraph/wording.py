"""Words of messages."""

from __future__ import annotations


def counted(number: int, one: str, more: str) -> str:
    """`1 axis`, `2 axes`."""
    return f"{number:,} {one if number == 1 else more}"
