"""Rules of one's own: what is accepted, what is refused and how, and what they make prunable."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import depgraph
from depgraph.errors import RuleError
from depgraph.rules import Op, registry
from tests.test_end_to_end import random_scores


@torch.library.custom_op("depgraph_tests::blend", mutates_args=())
def blend(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
    return x * scale + (0 if shift is None else shift)


@blend.register_fake
def _(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
    return torch.empty_like(x)


class Blending(nn.Module):
    def __init__(self, shifted: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(4, 8), nn.Linear(8, 3), nn.Parameter(torch.rand(8) + 0.5)
        self.shift = nn.Parameter(torch.rand(8)) if shifted else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.ops.depgraph_tests.blend(self.up(x), self.scale, self.shift))


@pytest.fixture(autouse=True)
def _own_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))
    yield


def prunable(model: nn.Module) -> int:
    graph = depgraph.trace(model, torch.randn(2, 4), strict=True)
    for form in ("module", "graph"):
        plan = graph.plan(random_scores(graph), depgraph.Target(params=0.6), form=form)
        report = plan.apply_with_report(form=form)
        assert report.check is not None and not report.check.vacuous
    return sum(int(axis.prunable.sum()) for axis in graph.axes)


@pytest.mark.parametrize(
    "name",
    ["depgraph_tests::blend", "depgraph_tests.blend", "depgraph_tests::blend.default", "depgraph_tests.blend.default"],
)
def test_one_line_makes_an_operator_prunable_through(name: str) -> None:
    depgraph.rule(name, "... c, c -> ... c")
    assert prunable(Blending()) == 8


def test_operators_themselves_are_names_too() -> None:
    depgraph.rule(torch.ops.depgraph_tests.blend, equation="... c, c, c -> ... c", work="... c")
    assert prunable(Blending(shifted=True)) == 8
    assert prunable(Blending()) == 8, "an optional tensor that isn't given takes its term with it"


def test_a_function_may_be_a_rule() -> None:
    @depgraph.rule("depgraph_tests::blend")
    def blended(op: Op) -> None:
        op.align_elementwise([*op.inputs, op.output])

    assert prunable(Blending()) == 8


def test_operators_that_come_later_find_their_rule() -> None:
    depgraph.rule("depgraph_tests::later", "... c~ -> ... c")
    library = torch.library.Library("depgraph_tests", "FRAGMENT")
    library.define("later(Tensor x) -> Tensor")
    library.impl("later", lambda x: x.softmax(-1), "CompositeExplicitAutograd")

    class Later(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[1](torch.ops.depgraph_tests.later(self[0](x)))

    (axis,) = depgraph.trace(Later(nn.Linear(4, 8), nn.Linear(8, 3)), torch.randn(2, 4), strict=True).axes
    assert axis.prunable.all() and not axis.exact


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "needs the name of an operator"),
        (("... c -> ... c",), "needs the name of an operator"),
        (("scale", "c -> c"), "'scale' names no operator"),
        (("mylib::scale", "... c, c"), "no operator.*arrow"),
        (("mylib::scale", "(c -> c"), r"can't read '\('"),
        (("mylib::scale", "... c -> ... d"), "'c' stands in one input and in no result.*c~.*c!"),
        (("mylib::scale", "c -> c d"), "'d' stands in no input.*d!"),
    ],
)
def test_what_is_no_rule_is_refused_in_one_sentence(arguments: tuple[str, ...], complaint: str) -> None:
    before = dict(registry._TABLE)
    with pytest.raises(RuleError, match=complaint):
        depgraph.rule(*arguments)
    assert before == registry._TABLE


def test_keywords_are_checked() -> None:
    with pytest.raises(RuleError, match="work='n k': 'n' is no letter"):
        depgraph.rule("mylib::scale", "... k, k -> ... k", work="n k")
    with pytest.raises(RuleError, match="two equations"):
        depgraph.rule("mylib::scale", "c -> c", equation="c -> c")
    with pytest.raises(RuleError, match="work= names letters of an equation"):
        depgraph.rule("mylib::scale", work="n k")
    with pytest.raises(RuleError, match="a function of one Op"):
        depgraph.rule("mylib::scale")("... c -> ... c")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("equation", "complaint"),
    [
        ("... c -> ... c", "it has 1 inputs and 1 results, the operator was called with 2 tensors and gave 1"),
        ("... c, c -> ... c, c", "2 results"),
        ("... c, n c -> n ... c", "doesn't fit a term of 2 dims"),
        ("c ..., c -> c ...", "can't be aligned"),
    ],
)
def test_a_rule_that_does_not_fit_says_where(equation: str, complaint: str) -> None:
    depgraph.rule("depgraph_tests::blend", equation)
    text = rf"the rule .* doesn't fit depgraph_tests.blend.default at tests/rules/test_custom\.py:\d+: .*{complaint}"
    with pytest.raises(RuleError, match=text):
        depgraph.trace(Blending(), torch.randn(2, 4))
