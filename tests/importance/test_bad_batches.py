"""What calibration data that can't be used is answered with, whichever score or recipe asks for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import depgraph
import importance
from depgraph.errors import DataError, ScoreError
from importance import CRITERIA, Activation, recipes

WORDS = 20


class Words(nn.Module):
    """Token ids in, logits out, with one block on a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(WORDS, 8), nn.LayerNorm(8), nn.Linear(8, WORDS, bias=False)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.head(x + self.down(self.up(self.norm(x)).relu()))


def graph_of(model: nn.Module | None = None) -> depgraph.DependencyGraph:
    torch.manual_seed(0)
    return depgraph.trace((model or Words()).eval(), torch.randint(0, WORDS, (2, 6)))


EMPTY = {"no samples": torch.zeros(0, 6, dtype=torch.long), "no tokens": torch.zeros(2, 0, dtype=torch.long)}


@pytest.mark.parametrize("batch", EMPTY.values(), ids=EMPTY.keys())
def test_batches_without_a_row_are_refused(batch: Tensor) -> None:
    graph = graph_of()
    for score in (*(Activation([batch], name) for name in CRITERIA), importance.OptimalBrain([batch])):
        with pytest.raises(DataError, match="the batches are empty"):
            score(graph)
    for name in ("flap", "obs", "slicegpt"):
        with pytest.raises(DataError, match="the batches are empty"):
            recipes.named(name, [batch]).prune(graph, depgraph.Target(params=0.8))


def test_an_empty_batch_beside_others_changes_nothing() -> None:
    graph, batch = graph_of(), torch.randint(0, WORDS, (2, 6))
    for name in CRITERIA:
        alone, beside = (Activation(given, name)(graph) for given in ([batch], [EMPTY["no tokens"], batch]))
        assert all((alone[axis] == beside[axis]).all() for axis in alone)


@pytest.mark.parametrize("index", [-1, WORDS])
def test_ids_that_a_table_has_no_row_for_are_refused(index: int) -> None:
    graph, batch = graph_of(), torch.full((2, 6), index)
    with pytest.raises(DataError, match=rf"holds the index {index}, but .* has {WORDS} rows: look for a tokenizer"):
        Activation([batch])(graph)
    with pytest.raises(DataError, match=r"look for ids beyond a table \(of a tokenizer that isn't the model's\)"):
        importance.Taylor([batch])(graph)


def test_batches_of_another_rank_are_scored_like_samples() -> None:
    graph, batch = graph_of(), torch.randint(0, WORDS, (1, 6))
    whole, flat = Activation([batch], "ifv")(graph), Activation([batch[0]], "ifv")(graph)
    assert whole["up.weight:0"] == pytest.approx(flat["up.weight:0"])


@pytest.mark.parametrize("name", list(CRITERIA))
def test_activations_that_overflow_are_named_by_every_criterion(name: str) -> None:
    model = Words()
    with torch.no_grad():
        model.up.bias.fill_(1e30)
        model.down.weight.fill_(1e30)
    with pytest.raises(ScoreError, match=r"NaN or infinity comes in at the input of (down|head).weight"):
        Activation([torch.randint(0, WORDS, (2, 6))], name)(graph_of(model))


def test_a_rotation_names_the_weight_that_is_not_finite() -> None:
    model = Words()
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(ScoreError, match=r"'norm.weight' holds NaN or infinite values"):
        recipes.slicegpt([torch.randint(0, WORDS, (2, 6))]).prune(graph_of(model), depgraph.Target(params=0.8))


def test_a_model_that_is_cut_in_inference_mode_can_be_trained() -> None:
    graph: Any = graph_of()
    with torch.inference_mode():
        model = graph.plan(importance.Magnitude(), depgraph.Target(params=0.8)).apply()
    assert not any(parameter.is_inference() for parameter in model.parameters())
    model(torch.randint(0, WORDS, (2, 6))).sum().backward()


class _Labelled(Words):
    """The loss is its own, as models of transformers have it."""

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = super().forward(ids)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


@pytest.mark.parametrize("name", ["taylor-second", "gblm"])
def test_a_sample_with_nothing_to_predict_is_named_where_each_is_looked_at_alone(name: str) -> None:
    graph = graph_of(_Labelled())
    ids = torch.randint(0, WORDS, (2, 6))
    labels = ids.clone()
    labels[1] = -100
    batch = {"ids": ids, "labels": labels}
    assert importance.named("taylor", batches=[batch])(graph)
    with pytest.raises(
        ScoreError, match="all labels of it, or of a sample that is looked at alone, are -100: leave out"
    ):
        importance.named(name, batches=[batch])(graph)


class _Masked(Words):
    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        return super().forward(ids) * attention_mask[:, :, None]


def test_batches_that_are_all_padding_are_refused() -> None:
    ids = torch.randint(0, WORDS, (2, 6))
    graph = depgraph.trace(_Masked().eval(), (ids, torch.ones_like(ids)))
    padding, text = (ids, torch.zeros_like(ids)), (ids, torch.ones_like(ids))
    with pytest.raises(DataError, match="masks of all batches are zero everywhere"):
        Activation([padding, padding])(graph)
    assert Activation([padding, text])(graph)


@pytest.mark.parametrize("name", ["obs", "wanda-sp"])
def test_a_model_without_values_is_refused_by_scores_of_activations(name: str) -> None:
    with torch.device("meta"):
        graph = depgraph.trace(Words().eval(), torch.zeros(2, 6, dtype=torch.long))
    with pytest.raises(ScoreError, match="on the meta device and have no values"):
        importance.named(name, batches=[torch.randint(0, WORDS, (2, 6))])(graph)


def test_batches_in_another_precision_than_the_models_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    model, batch = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval(), torch.randn(4, 6)
    graph = depgraph.trace(model, batch)
    with pytest.raises(DataError, match=r"Sequential doesn't run on a batch \(float64 \[4, 6\]\).*same dtype"):
        Activation([batch.double()])(graph)
    with pytest.raises(DataError, match="a batch doesn't fit Sequential"):
        Activation([batch[:, :2]])(graph)
    assert not capfd.readouterr().err


@pytest.mark.parametrize("loss", [nn.functional.cross_entropy, lambda output: output.sum(), lambda o, b: o.nothing])
@pytest.mark.parametrize("name", ["llm_pruner", "best", "bonsai", "llm_surgeon"])
def test_a_loss_that_fails_is_told_how_it_is_called(name: str, loss: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    batch = torch.randn(4, 6), torch.randint(0, 3, (4,))
    graph = depgraph.trace(model, batch[0])
    with pytest.raises(
        ScoreError, match=r"the loss failed with (Type|Attribute)Error: .* called as loss\(output, batch\)"
    ):
        recipes.named(name, [batch], loss=loss).prune(graph, depgraph.Target(params=0.8))


def test_a_plan_by_scores_that_say_nothing_notes_that() -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval(), torch.randn(4, 6)
    graph, target = depgraph.trace(model, batch), depgraph.Target(params=0.8)
    for recipe in (recipes.flap([batch[:1]]), recipes.llm_pruner([batch], lambda output, given: (output * 0).sum())):
        assert "the scores say nothing" in " ".join(recipe.plan(graph, target).notes)
    for recipe in (recipes.flap([batch]), recipes.llm_pruner([batch], lambda output, given: output.sum())):
        assert not recipe.plan(graph, target).notes


@pytest.mark.parametrize("name", ["flap", "llm_pruner", "obs"])
def test_a_batch_that_calls_an_argument_otherwise_is_told_both_names(name: str) -> None:
    batch = {"input_ids": torch.randint(0, WORDS, (2, 6)), "labels": torch.randint(0, WORDS, (2, 6))}
    with pytest.raises(DataError, match="gives 'input_ids', which the forward of Words doesn't take, and not 'ids'"):
        recipes.named(name, [batch], lambda output, batch: output.mean()).prune(graph_of(), depgraph.Target(params=0.8))


class Picks(Words):
    """What each sample's label is worth: samples are told by their number, of which there are fewer than labels."""

    def forward(self, ids: Tensor, label: Tensor) -> Tensor:
        scores = super().forward(ids).mean(1)
        return scores.softmax(-1)[torch.arange(len(scores)), label]


def test_labels_that_pick_beside_the_numbers_of_samples_are_within_their_own_dim() -> None:
    torch.manual_seed(0)
    batch = (torch.randint(0, WORDS, (2, 6)), torch.tensor([WORDS - 1, 7]))
    graph = depgraph.trace(Picks().eval(), batch)
    assert recipes.flap([batch]).prune(graph, depgraph.Target(params=0.8)).report.check.error < 1e-4
    with pytest.raises(
        DataError, match=f"'label' of a batch holds the index {WORDS}, but the table .* has {WORDS} rows"
    ):
        recipes.flap([(batch[0], torch.tensor([0, WORDS]))]).prune(graph, depgraph.Target(params=0.8))


def test_a_model_in_the_place_of_its_graph_is_refused() -> None:
    model, batches = Words().eval(), [torch.randint(0, WORDS, (2, 6))]
    recipe = recipes.named("flap", batches)
    asked = [importance.Magnitude(), Activation(batches), recipe.score, importance.Taylor(batches)]
    asked += [lambda m: recipe.prune(m, depgraph.Target(params=0.8)), lambda m: importance.collect(m, batches, [])]
    for ask in asked:
        with pytest.raises(ScoreError, match="expected a graph and got a Words: trace the model first"):
            ask(model)
