"""Axis equations: a rule said in one line, such as ``... i, o i, o -> ... o``.

Terms stand for the tensors of an operator in the order of its schema, those after the arrow for its results. In a term,
a letter names one dim; the same letter in two terms aligns them; ``(g i)`` is a dim that is the row-major product of
letters; ``...`` is any run of dims aligned from the right with broadcasting; ``x!`` fixes the dim; ``x~`` says that the
operator mixes all indices of the dim. A letter in two inputs and in no result is contracted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

_TOKEN = re.compile(r"\.\.\.|\(\s*[A-Za-z_][\w]*(?:\s+[A-Za-z_][\w]*)+\s*\)|[A-Za-z_]\w*[!~]?")


@dataclass(frozen=True)
class Token:
    """One dim of a term (its letters, one unless bracketed), or the run ``...``."""

    letters: tuple[str, ...]
    mark: str = ""

    @property
    def is_run(self) -> bool:
        return self.letters == ("...",)


Term = tuple[Token, ...]


@dataclass(frozen=True)
class Equation:
    """A parsed axis equation."""

    text: str
    inputs: tuple[Term, ...]
    outputs: tuple[Term, ...]

    @property
    def contracted(self) -> frozenset[str]:
        """Letters that stand in two or more inputs and in no output."""
        seen = [{letter for token in term for letter in token.letters} for term in self.inputs]
        out = {letter for term in self.outputs for token in term for letter in token.letters}
        twice = {a for i, s in enumerate(seen) for a in s if any(a in t for t in seen[i + 1 :])}
        return frozenset(twice - out - {"..."})


@cache
def parse(text: str) -> Equation:
    """Parse an equation; raises ValueError with the offending term when it isn't one."""
    left, arrow, right = text.partition("->")
    if not arrow:
        raise ValueError(f"axis equation {text!r} has no arrow")
    return Equation(text, _terms(left, text), _terms(right, text))


def _terms(side: str, text: str) -> tuple[Term, ...]:
    return tuple(_term(part, text) for part in side.split(","))


def _term(part: str, text: str) -> Term:
    leftover = _TOKEN.sub("", part).strip()
    if leftover:
        raise ValueError(f"axis equation {text!r}: can't read {leftover!r} in term {part.strip()!r}")
    return tuple(_token(match.group()) for match in _TOKEN.finditer(part))


def _token(text: str) -> Token:
    if text.startswith("("):
        return Token(tuple(text[1:-1].split()))
    if text[-1] in "!~":
        return Token((text[:-1],), text[-1])
    return Token((text,))
