"""The table of rules, and `Op`, through which a rule reads one operator and states its relations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from depgraph.errors import UnsupportedOperator
from depgraph.graph import Contraction, Least, Program, Reason, Relations, Value, Work
from depgraph.rules.equation import Term, Token, parse

Rule = Callable[["Op"], None]
_TABLE: dict[str, Rule] = {}
MARKED = "the rule of an operator fixes it"
NO_RULE = "no rule knows what this operator does with it"


@dataclass
class Op:
    """One operator of a captured graph: its arguments by schema name (tensors as `Value`s) and its results.

    `unread` are the positions of results that nothing reads, `followed` the names of inputs whose numbers are indices and
    whose rule knows what becomes of them when their domain gets smaller (see `depgraph.rules.domains`). `shown` is what
    users know the operator by, where its rule is that of another. `rows` are the tensors that lie in memory row by row of those
    that its first one is a view of, with itself, for operators that ask how far its numbers are apart.
    """

    name: str
    target: str
    arguments: dict[str, Any]
    outputs: list[Value]
    program: Program
    where: str = ""
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    unread: frozenset[int] = frozenset()
    followed: set[str] = field(default_factory=set)
    shown: str = ""
    rows: list[Value] = field(default_factory=list)

    @property
    def relations(self) -> Relations:
        return self.program.relations

    @property
    def output(self) -> Value:
        return self.outputs[0]

    @property
    def inputs(self) -> list[Value]:
        """All tensors among the arguments, in order."""
        return [v for argument in self.arguments.values() for v in _tensors(argument)]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.arguments.get(name, default)

    def reason(self, text: str, why: str = "") -> Reason:
        return Reason(f"{text} ({self.shown or self.target}{', ' + self.where if self.where else ''})", why=why or text)

    def fix(self, value: Value, dim: int, text: str) -> None:
        """Fix one dimension of one value."""
        self.relations.fix(value.dim(dim), self.reason(text))

    def fix_all(self, text: str, why: str = "") -> None:
        """Fix every dimension of every tensor of this operator."""
        for value in [*self.inputs, *self.outputs]:
            for dim in value.dims:
                self.relations.fix(dim, self.reason(text, why))

    def leave_alone(self, misfit: Exception | None = None) -> None:
        """Fix all that it has, and report it: it has no rule, or one that doesn't fit this use of it, as `misfit` says."""
        self.program.unknown.setdefault(self.target, []).append(self.where)
        self.fix_all(NO_RULE if misfit is None else f"its rule doesn't fit this use of it: {misfit}", NO_RULE)

    def no_rule(self) -> UnsupportedOperator:
        """What to raise where operators without a rule are refused."""
        return UnsupportedOperator(
            f"operator {self.target} at {self.where or 'an unknown place'} has no rule; "
            f"register one with depgraph.rule({self.target!r}, ...) or trace with strict=False to leave its dims alone"
        )

    def align_elementwise(self, values: Iterable[Value]) -> None:
        """Align dims from the right, with broadcasting."""
        values = list(values)
        for value in values[:-1]:
            last = values[-1]
            for d in range(1, min(len(value.shape), len(last.shape)) + 1):
                self.relations.align(value.dim(-d), last.dim(-d))

    def align_beside(self, a: Value, b: Value, along: int) -> None:
        """Align the dims of two tensors of one rank, but for dimension `along`."""
        for d in range(len(a.shape)):
            if d != along % len(a.shape):
                self.relations.align(a.dim(d), b.dim(d))

    def choose(self, source: Value, dim: int, picks: Value, count: int) -> None:
        """The numbers in `picks` are indices of `dim`, chosen by what is in `source`: `count` of them at once."""
        chosen = source.dim(dim)
        self.relations.mix(chosen, f"{self.target.split('.')[1]} chooses among its indices")
        self.relations.least.append(Least(chosen, count, self.reason(f"{count} of its indices are chosen")))
        picks.domain = chosen

    def point(self, source: Value, dim: int, index: Value | None, why: str = "") -> None:
        """The numbers in `index` are indices of `dim`, which is fixed unless they were chosen among a dim of this size.

        `why` says in plain words what fixes it, where there is more to say than that an index points into it.
        """
        domain = None if index is None else index.domain
        if index is not None and domain is not None and self.relations.sizes[domain] == source.shape[dim]:
            self.relations.align(source.dim(dim), domain)
            self.followed.add(index.name)
        else:
            reason = self.reason("an index tensor points into it", why)
            self.relations.fix(source.dim(dim), replace(reason, lift=f"index {self.name}"))

    def contract(self, operand: Value, dim: int, product: int = 0) -> None:
        """This operator sums `operand` over dimension `dim`, in the `product`-th of the products that it takes."""
        self.relations.contractions.append(Contraction(self.name, operand.name, dim % len(operand.shape), product))

    def contract_alone(self, operand: Value, dim: int) -> None:
        """This operator sums `operand` over dimension `dim` as it is, multiplied with nothing: a product of its own."""
        self.contract(operand, dim, product=-1 - len(self.relations.contractions))

    def relate(self, equation: str, *inputs: Value | None, work: str = "", why: str = "", **sizes: int) -> None:
        """State an axis equation over `inputs` (the operator's tensors by default; None skips a term) and its outputs.

        `sizes` gives letters that stand in brackets only; `work` names the letters whose sizes multiply to the MACs;
        `why` says in plain words what fixes the dims marked ``!``.
        """
        _Relating(self, sizes, why).run(equation, inputs or tuple(self.inputs), work)


@dataclass
class _Relating:
    op: Op
    sizes: dict[str, int]
    why: str = ""
    letters: dict[str, int] = field(default_factory=dict)
    run_dims: list[int] = field(default_factory=list)

    def run(self, text: str, inputs: tuple[Value | None, ...], work: str) -> None:
        equation = parse(text)
        operands = [(t, v) for t, v in zip(equation.inputs, inputs, strict=False) if v is not None]
        bound = [*operands, *zip(equation.outputs, self.op.outputs, strict=False)]
        for term, value in bound:
            self._plain(term, value)
        for term, value in bound:
            self._brackets(term, value)
        products = sorted(equation.contracted)
        for term, value in operands:
            for token, dim in _spread(term, value):
                for letter in sorted(set(token.letters) & equation.contracted)[:1]:
                    self.op.contract(value, dim - value.first, products.index(letter))
        if work:
            dims = [self.letters[w] for w in work.split() if w != "..."] + (self.run_dims if "..." in work else [])
            self.op.relations.work.append(Work(self.op.name, tuple(dims)))

    def _plain(self, term: Term, value: Value) -> None:
        relations = self.op.relations
        run = []
        for token, dim in _spread(term, value):
            if token.is_run:
                run.append(dim)
                continue
            if len(token.letters) == 1:
                self._bind(token.letters[0], dim)
            if token.mark == "!":
                relations.fix(
                    dim, self.op.reason(f"dimension {token.letters[0]!r} can't be narrowed", self.why or MARKED)
                )
            elif token.mark == "~":
                relations.mix(dim, f"{self.op.target} mixes it")
        for a, b in zip(reversed(self.run_dims), reversed(run), strict=False):
            relations.align(a, b)
        self.run_dims = self._widest(run)

    def _widest(self, run: list[int]) -> list[int]:
        """What `run` and the runs before it broadcast to: of every pair from the right, a dim not of size 1."""
        long, short = sorted((run, self.run_dims), key=len, reverse=True)
        lead = len(long) - len(short)
        sizes = self.op.relations.sizes
        return long[:lead] + [b if sizes[a] == 1 else a for a, b in zip(long[lead:], short, strict=True)]

    def _bind(self, letter: str, dim: int) -> None:
        relations = self.op.relations
        known = self.letters.setdefault(letter, dim)
        relations.align(known, dim)
        if relations.sizes[known] == 1:
            self.letters[letter] = dim

    def _brackets(self, term: Term, value: Value) -> None:
        for token, dim in _spread(term, value):
            if len(token.letters) > 1:
                self.op.relations.fold(dim, self._parts(token.letters, self.op.relations.sizes[dim]))

    def _parts(self, letters: tuple[str, ...], size: int) -> list[int]:
        relations = self.op.relations
        known = {a: relations.sizes[self.letters[a]] if a in self.letters else self.sizes.get(a) for a in letters}
        missing = [a for a, s in known.items() if s is None]
        product = int(np.prod([s for s in known.values() if s is not None]))
        if len(missing) > 1:
            raise ValueError(f"the sizes of {missing} can't be told in {letters}")
        for letter in letters:
            if letter not in self.letters:
                self.letters[letter] = relations.new_dim(known[letter] or size // product)
        return [self.letters[a] for a in letters]


def _spread(term: Term, value: Value) -> list[tuple[Token, int]]:
    """Pair the tokens of a term with the dims of a value; ``...`` takes what is left over."""
    dims = list(value.dims)
    fixed = sum(not token.is_run for token in term)
    if fixed > len(dims) or (fixed < len(dims) and not any(token.is_run for token in term)):
        raise ValueError(f"{value.name} with shape {value.shape} doesn't fit a term of {fixed} dims")
    pairs = []
    for token in term:
        count = len(dims) - fixed if token.is_run else 1
        for dim in dims[:count] if token.is_run else dims[:1]:
            pairs.append((token, dim))
        dims = dims[count:] if token.is_run else dims[1:]
        fixed -= not token.is_run
    return pairs


def _tensors(argument: Any) -> list[Value]:
    if isinstance(argument, Value):
        return [argument]
    if isinstance(argument, (list, tuple)):
        return [v for item in argument for v in _tensors(item)]
    return []


def rule(*targets: str, equation: str = "", work: str = "") -> Callable[[Rule], Rule]:
    """A row of the library's own table: a rule for `targets` (such as ``aten.linear``); overloads may be left out.

    With `equation` the decorated function isn't needed. Users' rules are checked by `depgraph.rules.custom`.
    """

    def decorate(function: Rule) -> Rule:
        register(targets, function)
        return function

    if equation:
        decorate(lambda op: op.relate(equation, work=work))
    return decorate


def register(targets: Iterable[str], function: Rule) -> None:
    """Put a rule into the table, in the place of any that was there."""
    for target in targets:
        _TABLE[target] = function


def aten(names: str) -> list[str]:
    """Names of ATen operators without their prefix, apart by blanks, as `rule` wants them."""
    return [f"aten.{name}" for name in names.split()]


def lookup(target: str) -> Rule | None:
    """The rule for an operator: by its full name, without its overload, or as the in-place form of another."""
    base = target.rsplit(".", 1)[0] if target.count(".") > 1 else target
    return next((_TABLE[name] for name in (target, base, base.removesuffix("_")) if name in _TABLE), None)


def table() -> dict[str, Rule]:
    """A copy of the table of rules, by operator name."""
    return dict(_TABLE)
