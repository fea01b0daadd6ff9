"""Trimming a vocabulary: rows of the table and of the head go, and ids are translated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import depgraph
from depgraph.errors import CutError, PlanError
from tests.test_end_to_end import random_scores
from tests.zoo import ZOO

SIZE, KEPT = 20, [0, 2, 3, 7, 11, 12, 19]


class Words(nn.Module):
    """A table and a head with a bias, tied or not."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(SIZE, 8, padding_idx=2)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, SIZE)
        nn.init.normal_(self.table.weight)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.table(ids))))


def words(tied: bool = False) -> tuple[Words, depgraph.DependencyGraph]:
    torch.manual_seed(0)
    model = Words(tied).eval()
    return model, depgraph.trace(model, torch.tensor([[3, 7, 12], [0, 19, 2]]))


@pytest.mark.parametrize("tied", [True, False])
def test_what_stays_computes_the_same_logits(tied: bool, tmp_path: Path) -> None:
    model, graph = words(tied)
    vocabulary = graph.vocabulary
    assert (vocabulary.size, vocabulary.inputs) == (SIZE, ("ids",))
    assert [(h.output, h.dim, h.tied) for h in vocabulary.heads] == [("output 0", 2, tied)]
    report = vocabulary.keep(reversed(KEPT)).apply_with_report()
    pruned, tokens = report.model, depgraph.TokenMap.of(report.model)
    assert report.check is not None and report.check.error < 1e-6 and not report.check.vacuous
    assert pruned.table.weight.shape == pruned.head.weight.shape == (len(KEPT), 8)
    assert pruned.head.bias.shape == (len(KEPT),) and (pruned.table.weight is pruned.head.weight) == tied
    assert (pruned.table.num_embeddings, pruned.table.padding_idx) == (len(KEPT), KEPT.index(2))
    ids = torch.tensor([KEPT])
    torch.testing.assert_close(pruned(tokens.to_new(ids)), model(ids)[..., KEPT])
    depgraph.save(pruned, tmp_path / "small")
    again = depgraph.load(tmp_path / "small", model=Words(tied).eval())
    assert torch.equal(again(tokens.to_new(ids)), pruned(tokens.to_new(ids)))
    assert depgraph.TokenMap.of(again).to_old([0, 1, 6]) == [0, 2, 19]


def test_example_ids_that_go_are_replaced_in_the_check() -> None:
    model, graph = words()
    graph = depgraph.trace(model, torch.tensor([[1, 4, 5], [6, 19, 2]]))
    report = graph.vocabulary.keep(KEPT).apply_with_report()
    assert report.check is not None and not report.check.vacuous
    assert any("holds tokens that go" in note for note in graph.vocabulary.keep(KEPT).notes)


def test_the_input_side_alone_can_be_trimmed() -> None:
    model, graph = words()
    pruned = graph.vocabulary.keep(KEPT, heads=()).apply()
    assert (pruned.table.num_embeddings, pruned.head.out_features) == (len(KEPT), SIZE)
    torch.testing.assert_close(pruned(torch.arange(len(KEPT))), model(torch.tensor(KEPT)))


def test_trimming_twice_and_pruning_after_it_add_up() -> None:
    model, graph = words()
    pruned = graph.vocabulary.keep(KEPT).apply()
    again = depgraph.trace(pruned, torch.tensor([[0, 1, 2]]))
    pruned = again.plan(random_scores(again), depgraph.Target(params=0.7)).apply()
    pruned = depgraph.trace(pruned, torch.tensor([[1, 2]])).vocabulary.keep([1, 2, 5]).apply()
    tokens = depgraph.TokenMap.of(pruned)
    assert tokens.kept.tolist() == [2, 3, 12]
    assert tokens.to_new([12, 2]) == [2, 0]
    with pytest.raises(PlanError, match="token 7 was trimmed"):
        tokens.to_new([7])
    with pytest.raises(PlanError, match="no vocabulary of this Words was trimmed"):
        depgraph.TokenMap.of(model)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([2, 20], "token 20 is none of the vocabulary's, 0 to 19"),
        ([2, -1], "token -1 is none"),
        ([2, 3, 3], "token 3 is given twice"),
        ([], "no token is left"),
        ([2, 1.5], "whole numbers"),
        (5, "a list of whole numbers"),
        (torch.arange(20) > 1, "not a mask: give mask.nonzero"),
        ([0, 1], "token 2 is the padding row"),
    ],
)
def test_bad_ids_are_refused(ids: Any, message: str) -> None:
    _, graph = words()
    with pytest.raises(PlanError, match=message):
        graph.vocabulary.keep(ids)


def test_a_head_that_is_none_is_refused() -> None:
    _, graph = words()
    with pytest.raises(PlanError, match="heads='output 1' names 0 heads.*output 0:2"):
        graph.vocabulary.keep(KEPT, heads=["output 1"])
    _, graph = words(tied=True)
    with pytest.raises(PlanError, match="output 0:2 is tied"):
        graph.vocabulary.keep(KEPT, heads=())


class Shifted(Words):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * (ids != 3).unsqueeze(-1)


class TwoTables(Words):
    def __init__(self) -> None:
        super().__init__()
        self.kinds = nn.Embedding(3, 8)

    def forward(self, ids: Tensor, kinds: Tensor) -> Tensor:
        return super().forward(ids) + self.head(self.kinds(kinds))


class Normalised(Words):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).log_softmax(-1)


class Greedy(Words):
    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(ids)
        return logits, logits.argmax(-1)


def test_what_counts_on_ids_keeps_the_vocabulary() -> None:
    ids = torch.tensor([[3, 7, 2]])
    with pytest.raises(PlanError, match=r"can't change: .*test_vocabulary.py:\d+ takes them for numbers \(aten.ne"):
        depgraph.trace(Shifted().eval(), ids).vocabulary.keep(KEPT)
    with pytest.raises(PlanError, match="gives its indices"):
        depgraph.trace(Greedy().eval(), ids).vocabulary.keep(KEPT)
    with pytest.raises(PlanError, match="no vocabulary"):
        _ = depgraph.trace(nn.Linear(3, 4), torch.randn(2, 3)).vocabulary
    with pytest.raises(CutError, match="trimmed in the module"):
        words()[1].vocabulary.keep(KEPT).apply(form="graph")


def test_several_vocabularies_are_told_apart() -> None:
    graph = depgraph.trace(TwoTables().eval(), (torch.tensor([[3, 7, 2]]), torch.tensor([[0, 1, 2]])))
    with pytest.raises(PlanError, match=r"several.*'ids' \(20 rows of table.weight\), 'kinds' \(3 rows"):
        _ = graph.vocabulary
    pruned = graph.vocabularies["kinds"].keep([0, 2]).apply()
    assert pruned.kinds.num_embeddings == 2 and pruned.table.num_embeddings == SIZE


def test_outputs_normalised_over_the_tokens_are_compared_with_the_cut_program() -> None:
    report = depgraph.trace(Normalised().eval(), torch.tensor([[3, 7, 2]])).vocabulary.keep(KEPT).apply_with_report()
    assert report.check is not None and report.check.mixed_axes == 1 and report.check.error < 1e-6


@pytest.mark.parametrize("name", ["llama_8_4", "llama_8_2", "t5"])
def test_a_config_follows(name: str, tmp_path: Path) -> None:
    example = ZOO[name]()
    graph = depgraph.trace(example.model, example.args, example.kwargs)
    kept = [0, 1, 2, *range(20, 101, 3)]
    report = graph.vocabulary.keep(kept).apply_with_report()
    assert report.check is not None and report.check.error < 1e-6 and not report.check.vacuous
    saved = depgraph.save(report.model, tmp_path / "small")
    assert saved.format == "plain"
    assert depgraph.load(tmp_path / "small").config.vocab_size == len(kept)
