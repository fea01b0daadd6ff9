"""Cuts of recurrent layers: what a hidden unit is, what follows it, and what they give in every form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import depgraph
import exporters
from depgraph.errors import CheckError, DepgraphError
from tests.test_end_to_end import random_scores
from tests.zoo import MODULES

NAMES = ["lstm_both_ways", "lstm_projected", "gru_encoder_decoder", "lstm_cell"]


def planned(name: str, form: str = "module") -> depgraph.Plan:
    example = MODULES[name]()
    graph = depgraph.trace(example.model, example.args, strict=True)
    return graph.plan(random_scores(graph), depgraph.Target(params=0.5), scope="axis", form=form)


def assert_known(model: nn.Module) -> None:
    """Recurrent layers call their kernel with the parameters that they hold, and say their own sizes."""
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            assert all(a is b for a, b in zip(module._flat_weights, module.parameters(), strict=True))
            assert all(a() is b for a, b in zip(module._flat_weight_refs, module.parameters(), strict=True))
            assert module.weight_ih_l0.shape[1] == module.input_size
            assert module.weight_hh_l0.shape[1] == (module.proj_size or module.hidden_size)
        if isinstance(module, nn.RNNCellBase):
            assert module.weight_ih.shape[1] == module.input_size
            assert module.weight_hh.shape[1] == module.hidden_size


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_compute_what_the_zeroed_original_computes(name: str) -> None:
    for form in ("module", "graph"):
        report = planned(name, form).apply_with_report(form=form)
        assert report.check is not None
        assert report.check.error <= 1e-5 and report.check.sensitivity > 1e-2
        assert report.check.mixed_axes == 0
        assert report.after.params <= 0.5 * report.before.params


def test_a_hidden_unit_is_a_row_of_every_gate_and_a_column_of_what_reads_it() -> None:
    graph = planned("lstm_both_ways").graph
    axis = next(a for a in graph.axes if a.size == 24)
    members = {(target, dim): indices.tolist() for target, dim, indices in axis.group(3).members}
    assert members["layer.weight_ih_l0", 0] == members["layer.bias_hh_l1_reverse", 0] == [3, 27, 51, 75]
    assert members["layer.weight_hh_l1", 1] == [3]
    assert members["layer.weight_ih_l1", 1] == members["head.weight", 1] == [3, 27]


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_layer_is_an_ordinary_smaller_one(name: str, tmp_path: Path) -> None:
    example, pruned = MODULES[name](), planned(name).apply()
    assert_known(pruned)
    pruned(*example.args).sum().backward()
    assert all(p.grad is not None for p in pruned.parameters())
    depgraph.save(pruned, tmp_path / "saved")
    loaded = depgraph.load(tmp_path / "saved", model=lambda: MODULES[name]().model)
    assert_known(loaded)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(*example.args), pruned.eval()(*example.args))


def test_in_place_cuts_reach_the_weights_that_the_kernel_is_called_with() -> None:
    plan = planned("lstm_both_ways")
    plan.apply_(check="none")
    assert_known(plan.graph.model)
    with torch.no_grad():
        expected = planned("lstm_both_ways").apply()(*plan.graph.args)
        assert torch.equal(plan.graph.model(*plan.graph.args), expected)


def test_a_refused_cut_in_place_leaves_the_layer_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned("lstm_both_ways")
    model = plan.graph.model
    held = list(model.parameters())
    monkeypatch.setattr("depgraph.cutting.verifying.difference", lambda got, expected: 1.0)
    with pytest.raises(CheckError):
        plan.apply_()
    assert all(a is b for a, b in zip(model.parameters(), held, strict=True))
    assert_known(model)


def test_a_cut_layer_is_exported(tmp_path: Path) -> None:
    name = "lstm_both_ways"
    report = exporters.to_onnx(planned(name).apply(), MODULES[name]().args, tmp_path / "model.onnx")
    assert report.max_rel_error < 1e-5


@pytest.mark.parametrize(("layer", "form"), [(nn.RNN, "module"), (nn.LSTM, "module"), (nn.LSTM, "graph")])
def test_states_that_are_given_or_taken_belong_to_the_hidden_units(layer: type[nn.RNNBase], form: str) -> None:
    class Started(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.start, self.head = layer(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.start(x[:1])
            _, last = self.layer(x, (hidden, hidden.tanh()) if layer is nn.LSTM else hidden)
            return self.head(last[1] if layer is nn.LSTM else last)

    graph = depgraph.trace(Started(), torch.randn(5, 2, 6))
    assert [a.size for a in graph.axes] == [8]
    report = graph.cut_plan({graph.axes[0].name: [0, 5]}).apply_with_report(form=form)
    assert report.check is not None and not report.check.vacuous


def test_the_dropout_between_layers_follows_the_mode_of_a_cut_graph() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.GRU(6, 8, num_layers=2, dropout=0.5), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.layer(x)[0])

    inputs = torch.randn(5, 2, 6)
    graph = depgraph.trace(Dropping(), inputs)
    pruned = graph.cut_plan({graph.axes[0].name: [0, 5]}).apply(form="graph").train()
    assert not torch.equal(pruned(inputs), pruned(inputs))
    pruned.eval()
    assert torch.equal(pruned(inputs), pruned(inputs))


class Speaker(nn.Module):
    """Its head is its table, and it gives its state."""

    def __init__(self, neurons: int) -> None:
        super().__init__()
        self.table, self.memory = nn.Embedding(40, 16), nn.GRU(16, 16, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, neurons), nn.ReLU(), nn.Linear(neurons, 16)) if neurons else nn.ReLU()
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states, last = self.memory(self.table(ids))
        return self.head(states + self.mlp(states)), last


@pytest.mark.parametrize("neurons", [0, 24])
def test_a_state_that_is_put_out_is_said_to_hold_the_width(neurons: int) -> None:
    inputs = (torch.randint(40, (2, 5)),)
    graph, target = depgraph.trace(Speaker(neurons), inputs), depgraph.Target(params=0.4)
    with pytest.raises(
        DepgraphError, match=r"output 1 holds the width of 'table.weight' and \d others \(16\)"
    ) as found:
        graph.plan(random_scores(graph), target)
    assert "free=['output 1']" in str(found.value)
    freed = depgraph.trace(Speaker(neurons), inputs, free=["output 1"])
    assert freed.plan(random_scores(freed), target).removal


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(6, 8, proj_size=4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0]


def test_units_stay_more_than_what_they_are_projected_to() -> None:
    """torch takes a layer with as many units as numbers in its state for one without a projection."""
    torch.manual_seed(0)
    graph = depgraph.trace(Projected().eval(), torch.randn(5, 2, 6))
    units = next(a for a in graph.axes if a.size == 8)
    plan = graph.plan(random_scores(graph), depgraph.Target(params=0.7), only=[units.name])
    assert units.size - len(plan.removal[units.name]) > 4
    assert plan.apply_with_report().check.error < 1e-5
    with pytest.raises(DepgraphError, match="projects nothing"):
        graph.cut_plan({units.name: [0, 1, 2, 3]})
