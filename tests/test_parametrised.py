"""Weights that are computed from other parameters: the parameters are cut, and the weights follow."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import depgraph
from depgraph.errors import CheckError
from tests.test_end_to_end import random_scores

Wrapper = Callable[[nn.Module], nn.Module]


class Scaled(nn.Module):
    """A parametrisation of one's own: each row of the weight has a factor."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.rand(rows, 1) + 0.5)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.factor


def scaled(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Scaled(layer.weight.shape[0]))  # type: ignore


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return weight_norm(layer)


def masked(layer: nn.Module) -> nn.Module:
    prune.random_unstructured(layer, "weight", 0.3)  # type: ignore[no-untyped-call]
    prune.ln_structured(layer, "weight", 2, 1, 0)  # type: ignore[no-untyped-call]
    return layer


WRAPPERS: dict[str, Wrapper] = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm_of_all": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "spectral_norm": parametrizations.spectral_norm,
    "scaled": scaled,
    "old_weight_norm": old_weight_norm,
    "old_spectral_norm": spectral_norm,
    "masked": masked,
}


def build(wrap: Wrapper) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [wrap(nn.Linear(6, 16)), nn.Tanh(), wrap(nn.Linear(16, 12)), nn.Tanh(), nn.Linear(12, 3)]
    return nn.Sequential(*layers).eval()


def planned(wrap: Wrapper, form: str) -> depgraph.Plan:
    graph = depgraph.trace(build(wrap), torch.randn(5, 6), strict=True)
    return graph.plan(random_scores(graph), depgraph.Target(params=0.6), scope="axis", form=form)


@pytest.mark.parametrize("name", WRAPPERS)
def test_both_forms_are_smaller_and_right(name: str) -> None:
    for form in ("module", "graph"):
        report = planned(WRAPPERS[name], form).apply_with_report(form=form)
        assert report.check is not None and not report.check.vacuous
        assert report.check.error <= 1e-5 and report.check.sensitivity > 1e-2
        assert sum(p.numel() for p in report.model.parameters()) == report.after.params <= 0.6 * report.before.params


@pytest.mark.parametrize("name", WRAPPERS)
def test_layers_know_their_new_sizes_train_and_are_saved(name: str, tmp_path: Path) -> None:
    wrap, inputs = WRAPPERS[name], torch.randn(5, 6)
    pruned = planned(wrap, "module").apply(check="none")
    for layer in (pruned[0], pruned[2], pruned[4]):  # type: ignore[index]
        assert layer.weight.shape == (layer.out_features, layer.in_features)
    assert pruned[2].in_features == pruned[0].out_features < 16  # type: ignore[index]
    depgraph.save(pruned, tmp_path / "saved")
    loaded = depgraph.load(tmp_path / "saved", model=lambda: build(wrap))
    torch.testing.assert_close(loaded.eval()(inputs), pruned.eval()(inputs))
    pruned.train()(inputs).sum().backward()
    assert all(p.grad is not None for p in pruned.parameters())


@pytest.mark.parametrize("name", ["weight_norm", "old_weight_norm", "old_spectral_norm", "masked"])
def test_a_cut_in_place_follows_or_is_taken_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.randn(5, 6)
    plan = planned(WRAPPERS[name], "module")
    model = plan.graph.model
    before = model(inputs)
    with monkeypatch.context() as patched, pytest.raises(CheckError):
        patched.setattr("depgraph.cutting.verifying.difference", lambda got, expected: 1.0)
        plan.apply_()
    assert torch.equal(model(inputs), before)
    assert model[0].weight.shape == (16, 6)  # type: ignore[index]
    plan.apply_(check="none")
    assert model[0].weight.shape == (model[0].out_features, 6)  # type: ignore[index]
    assert model[0].out_features < 16  # type: ignore[index]


def test_what_an_orthogonal_weight_is_made_of_stays_whole_but_its_rows_may_go() -> None:
    graph = depgraph.trace(build(parametrizations.orthogonal), torch.randn(5, 6), strict=True)
    free = {m.target for a in graph.axes if a.prunable.any() for m in a.members}
    assert not any(target.endswith("original") for target in free)
    for axis in graph.axes:
        if axis.prunable.any():
            report = graph.cut_plan({axis.name: [0, 3]}).apply_with_report()
            assert report.check is not None and not report.check.vacuous
