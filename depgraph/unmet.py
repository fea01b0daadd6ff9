"""What is said of a target that can't be met: the least that can be reached, in the words and units that were asked in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from depgraph.errors import TargetError

if TYPE_CHECKING:
    from depgraph.target import Target
    from depgraph.widths import Cost

LATENCY = "latency"
_UNITS = ((10**9, "GB"), (10**6, "MB"), (1000, "kB"))
_FEW = 0.01  # a share below it says little: the number is told with it


@dataclass(frozen=True)
class Unmet:
    """The least that can be reached, by measure: counts, and milliseconds under "latency".

    `where` comes before these in a sentence, `allow` says what allows them, `held` what holds them.
    """

    allow: str
    least: Mapping[str, float]
    held: str = ""
    where: str = ""

    def sentence(self, target: Target, dense: Cost) -> str:
        """The refusal of a target on a model that costs so much."""
        least = told(self.least, target, dense)
        return f"{self.where}a target of {target} can't be met: {self.allow} {least} at the least{self.held}"


def sized(count: float) -> str:
    """Bytes as a person says them: "388 B", "27.9 kB", "30 MB"."""
    for unit, name in _UNITS:
        if count >= unit:
            return f"{count / unit:.4g} {name}"
    return f"{count:.0f} B"


def told(spent: Mapping[str, float], target: Target, dense: Cost) -> str:
    """What is spent by measure, each as the target asks for it: bytes as a number where it gives a number, else as a share."""
    return ", ".join(f"{measure}={_told(measure, value, target, dense)}" for measure, value in spent.items())


def _told(measure: str, value: float, target: Target, dense: Cost) -> str:
    if measure == LATENCY:
        return f"{value:.3g} ms"
    if measure == "bytes" and target.most_bytes is not None:
        return f"{value:,.0f}" + (f" ({sized(value)})" if value >= _UNITS[-1][0] else "")
    whole = max(getattr(dense, measure), 1)
    share = value / whole
    return f"{share:.3f}" if share >= _FEW else f"{share:.2g} ({value:,.0f} of {whole:,})"


@contextmanager
def in_words_of(target: Target, dense: Cost, where: str = "") -> Iterator[None]:
    """Refusals of what `target` was made into, on the way, are said of the target itself and of the model that it is of."""
    try:
        yield
    except TargetError as error:
        if error.unmet is None:
            raise
        unmet = Unmet(error.unmet.allow, error.unmet.least, error.unmet.held, where + error.unmet.where)
        raise TargetError(unmet.sentence(target, dense), error.above, unmet) from error
