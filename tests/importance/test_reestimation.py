"""Batch norms re-estimated: exact statistics, outputs nearer to the dense ones, and a model that stays as it was on errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import depgraph
from depgraph.errors import DataError, ScoreError
from importance import Magnitude, Recipe, Reestimation, recipes, reestimate


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 16), (16, 16)):
        layers += [
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Dropout(0.5),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()


def images(count: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_statistics_are_those_of_the_data() -> None:
    model, x = cnn(), images()
    assert reestimate(model, [x]) == ("1", "5", "9")
    flat = model[0](x).transpose(0, 1).flatten(1)
    assert torch.allclose(model[1].running_mean, flat.mean(dim=1), atol=1e-5)
    assert torch.allclose(model[1].running_var, flat.var(dim=1), atol=1e-4)
    second = model[:4](x)
    assert torch.allclose(model[5].running_mean, model[4](second).mean(dim=(0, 2, 3)), atol=1e-3)  # dropout stays off
    assert model[1].momentum == 0.1
    assert not any(module.training for module in model.modules())


def test_batches_count_alike_and_nothing_is_left_of_before() -> None:
    model = cnn()
    reestimate(model, [images(seed=5) * 100])
    reestimate(model, [images(seed=1), images(seed=2)])
    means = [model[0](images(seed=seed)).mean(dim=(0, 2, 3)) for seed in (1, 2)]
    assert torch.allclose(model[1].running_mean, (means[0] + means[1]) / 2, atol=1e-5)


def test_a_pruned_cnn_comes_nearer_to_the_dense_one() -> None:
    model, x, other = cnn(), images(64), images(64, seed=3)
    reestimate(model, [x])
    graph = depgraph.trace(model, x[:2])
    errors = []
    for afterwards in ((), (Reestimation([x]),)):
        recipe = Recipe("magnitude", Magnitude(), units="all", afterwards=afterwards)
        pruned = recipe.prune(graph, depgraph.Target(params=0.5)).model
        with torch.no_grad():
            errors.append(float((pruned(other) - model(other)).square().mean()))
    assert errors[1] < 0.7 * errors[0]


def test_obs_re_estimates_with_its_own_batches_or_with_others() -> None:
    model, x, other = cnn(), images(), images(seed=4)
    graph = depgraph.trace(model, x[:2])
    for recipe, seen in ((recipes.obs([x], rounds=1), x), (recipes.obs([x], rounds=1, norms=[other]), other)):
        pruned = recipe.prune(graph, depgraph.Target(params=0.8)).model
        assert torch.allclose(pruned[1].running_mean, pruned[0](seen).mean(dim=(0, 2, 3)), atol=1e-5)


class Branches(nn.Module):
    """A batch norm that eval mode passes by."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.aside = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.aside.running_mean.fill_(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.aside(self.main(x)) if self.training else self.main(x)


def test_a_norm_that_nothing_comes_into_stays_as_it_was() -> None:
    model = Branches().train()
    assert reestimate(model, [torch.randn(8, 3)]) == ("main",)
    assert model.aside.running_mean.tolist() == [7, 7, 7]
    assert all(module.training for module in model.modules())


def test_a_model_without_batch_norms_has_nothing_to_change() -> None:
    assert reestimate(nn.Linear(2, 2), [torch.randn(3, 2)]) == ()


@pytest.mark.parametrize(
    ("batches", "error", "match"),
    [
        ([], DataError, "there are no batches"),
        ([images(), torch.randn(2, 5, 8, 8)], DataError, "doesn't fit Sequential"),
        ([images() * float("nan")], ScoreError, "NaN or infinity comes into batch norm '1'"),
    ],
)
def test_after_an_error_all_is_as_it_was(batches: list[Tensor], error: type[Exception], match: str) -> None:
    model = cnn()
    reestimate(model, [images()])
    before = state(model)
    with pytest.raises(error, match=match):
        reestimate(model, batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model[1].momentum == 0.1
    assert not model.training
