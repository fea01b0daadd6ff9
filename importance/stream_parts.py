"""The words for what meets on a residual stream: norms, writers and readers, and what a value is to the stream."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from torch.fx import Node

from depgraph.capture.places import module_path, place
from depgraph.operators import operator_name

Key = tuple[str, int]


@dataclass(frozen=True)
class Norm:
    """A normalisation that multiplies with `scale` and adds `shift` (nodes that no input reaches; None: it doesn't).

    `of` is the product that writes what is multiplied, where nothing else sees that: then no norm, but a scale of what is written.
    """

    where: str
    scale: Node | None = None
    shift: Node | None = None
    of: Node | None = None


@dataclass(frozen=True)
class Use:
    """Dim `dim` of tensor `target` meets the stream in operator `op`; `norm` made what a reader reads, None for none."""

    target: str
    dim: int
    op: Node
    norm: Norm | None = None

    @property
    def key(self) -> Key:
        return self.target, self.dim


@dataclass
class Stream:
    """One residual stream: an axis of a graph, and the dims of tensors that write to it and read it.

    `scaled` has the products whose results are multiplied by a scale before they are added to the stream, and these scales.
    `signals` has for everything that is read the consumers that read it. `centred`: something subtracts the mean of the
    channels, so that only bases in which all of them weigh the same will do.
    """

    axis: str
    width: int
    writes: list[Use] = field(default_factory=list)
    reads: list[Use] = field(default_factory=list)
    signals: dict[Node, list[Key]] = field(default_factory=lambda: defaultdict(list))
    scaled: dict[Node, Node] = field(default_factory=dict)
    centred: bool = False

    @property
    def norms(self) -> list[Norm]:
        """The normalisations whose results are read, each once."""
        return list(dict.fromkeys(use.norm for use in self.reads if use.norm is not None))


@dataclass(frozen=True)
class State:
    """What a value is to the stream: "vector", "squares" of one, or a vector that a norm "scaled"; `made` is where from."""

    kind: str
    made: Node
    norm: Norm | None = None


def name_of(node: Node) -> str:
    """The name of a node's operator, empty for what is no operator: that of ATen without its overload, or of a Python function."""
    return operator_name(node.target) or getattr(node.target, "__name__", "")


def where(node: Node) -> str:
    """The module and the line in which an operator stands, as far as they are known."""
    module, line = module_path(node), place(node)
    return " ".join(part for part in (f"in {module!r}" if module else "", f"at {line}" if line else "") if part)
