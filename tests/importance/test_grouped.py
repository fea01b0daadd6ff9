"""Scores and compensation where a convolution, transposed or not, has groups: each output sees the channels of its group alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import depgraph
import importance
from importance.compensation import Compensation, compensate
from importance.consumers import consumers_of

GROUPS, CHANNELS = 4, 16


def _net(last: nn.Module) -> tuple[nn.Sequential, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, padding=1), nn.ReLU(), last).eval()
    smooth = nn.functional.interpolate(torch.randn(24, 3, 2, 2), 6, mode="bilinear")
    return model, [*(smooth + 0.1 * torch.randn_like(smooth)).split(12)]


AXES = {"transposed": "0.weight:0/within", "plain": "2.weight:1"}
"""The channels within a group."""


def _by_group(layer: nn.Module) -> Tensor:
    """The weight as [groups, rows, channels of a group, places]: a transposed convolution's places are rows."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.ConvTranspose2d):
        return weight.flatten(1).unflatten(0, (GROUPS, -1)).mT[..., None]
    return weight.flatten(2).unflatten(0, (GROUPS, -1))


LAYERS = {
    "transposed": lambda: nn.ConvTranspose2d(CHANNELS, 8, 4, 2, 1, groups=GROUPS),
    "plain": lambda: nn.Conv2d(CHANNELS, 8, 3, groups=GROUPS, bias=False),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_ria_takes_the_share_of_a_whole_output_and_of_every_column(kind: str) -> None:
    model, batches = _net(LAYERS[kind]())
    with torch.no_grad():
        channels = model[2].weight if kind == "transposed" else model[2].weight.transpose(0, 1)
        channels[1] = 0
    graph = depgraph.trace(model, batches[0])
    weights = _by_group(model[2]).abs()
    rows, columns = (weights.sum(dims, keepdim=True) for dims in ((2, 3), 1))
    shares = (weights / rows + weights / columns.clamp(min=1e-30)).sum((1, 3)).flatten()
    given = torch.cat([model[:2](batch).detach() for batch in batches])
    norms = given.square().sum((0, 2, 3)).div(len(given)).sqrt()
    expected = (shares * norms.sqrt()).reshape(GROUPS, -1).sum(0)
    found = importance.Activation(batches, "ria")(graph)[AXES[kind]]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)


def test_a_channel_that_nothing_reads_is_worth_nothing_to_ria() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        model[2].weight[:, 2] = 0
    x = torch.randn(20, 4)
    (scores,) = importance.Activation([x], "ria")(depgraph.trace(model, x)).values()
    assert scores[2] == 0 and (np.delete(scores, 2) > 0).all()


@pytest.mark.parametrize("kind", LAYERS)
def test_what_heads_add_is_taken_of_the_outputs_of_each_group(kind: str) -> None:
    model, batches = _net(LAYERS[kind]())
    graph = depgraph.trace(model, batches[0])
    given = torch.cat([model[:2](batch).detach() for batch in batches]).movedim(1, -1).flatten(1, 2)
    made = given.unflatten(-1, (GROUPS, -1, 1)) * _by_group(model[2]).permute(0, 2, 1, 3).flatten(2)
    expected = made.abs().sum((2, 4)).mean((0, 1))
    found = importance.Activation(batches, "amp")(graph)[AXES[kind]]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
def test_least_squares_makes_up_within_each_group(kind: str) -> None:
    model, batches = _net(LAYERS[kind]())
    graph = depgraph.trace(model, batches[0])
    plan = graph.cut_plan({AXES[kind]: [1, 3]})
    x, apart = torch.cat(batches), list[float]()
    for how in (None, Compensation(biases="none", damping=1e-6)):
        pruned = plan.apply()
        if how is not None:
            compensate(pruned, plan, batches, how)
        apart.append(float((pruned(x) - model(x)).detach().square().mean()))
    assert apart[1] < 0.85 * apart[0], apart


def test_least_squares_of_a_transposed_convolution_is_that_of_its_groups() -> None:
    model, batches = _net(LAYERS["transposed"]())
    graph = depgraph.trace(model, batches[0])
    damping = 0.01
    plan = graph.cut_plan({AXES["transposed"]: [1, 3]})
    pruned = plan.apply()
    compensate(pruned, plan, batches, Compensation(biases="none", damping=damping))
    (consumer,) = (c for c in consumers_of(graph) if AXES["transposed"] in c.labels)
    assert consumer.groups == GROUPS
    given = torch.cat([model[:2](batch).detach() for batch in batches]).movedim(1, -1).flatten(0, 2).double()
    for part, (rows, weight) in enumerate(zip(given.chunk(GROUPS, dim=1), _by_group(model[2])[..., 0], strict=True)):
        second = rows.T @ rows / len(rows)
        kept, gone = [0, 2], [1, 3]
        inner = second[kept][:, kept]
        inner = inner + damping * inner.diagonal().mean() * torch.eye(2)
        gain = torch.linalg.solve(inner, second[kept][:, gone])
        expected = weight[:, kept].double() + weight[:, gone].double() @ gain.T
        found = pruned[2].weight.detach()[2 * part : 2 * part + 2].flatten(1).T
        np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-4, atol=1e-5)


class _Used(nn.Module):
    """A convolution with groups, and a linear map that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.last = LAYERS["plain"]()
        self.twice = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.last(torch.relu(self.first(x)))).mean((2, 3))
        return self.head(torch.relu(self.twice(torch.relu(self.twice(x)))))


def test_what_cant_be_fitted_to_the_pruned_models_inputs_is_solved_for_the_dense_ones() -> None:
    _, batches = _net(LAYERS["plain"]())
    torch.manual_seed(0)
    model = _Used().eval()
    graph = depgraph.trace(model, batches[0])
    axis = next(a.name for a in graph.axes if any(m.target == "last.weight" and m.dim == 1 for m in a.members))
    plan = graph.cut_plan({axis: [1, 3]})
    sequential, dense = plan.apply(), plan.apply()
    done = importance.refit(sequential, plan, batches, Compensation(biases="existing", inputs="pruned"))
    compensate(dense, plan, batches, Compensation(biases="existing"))
    assert torch.allclose(sequential.last.weight, dense.last.weight, atol=1e-6)
    assert "last.weight" in done.changed and "head.weight" in done.changed and not done.left
    x = torch.cat(batches)
    errors = [float((one(x) - model(x)).detach().square().mean()) for one in (plan.apply(), dense, sequential)]
    assert errors[2] < errors[0] and errors[2] <= 1.05 * errors[1]


class KernelPerSample(nn.Module):
    """Kernels are made for each sample, which are the groups of one convolution (Karras et al., "StyleGAN2")."""

    def __init__(self, place: int = 3, constant: bool = False) -> None:
        super().__init__()
        self.constant, self.place = constant, place
        self.kernel = nn.Parameter(torch.randn(6, CHANNELS, place, place) / 9)
        self.image, self.style = nn.Parameter(torch.randn(1, CHANNELS, 6, 6)), nn.Linear(5, CHANNELS)
        self.embed = nn.Conv2d(3, CHANNELS, 3, padding=1)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        n = len(style)
        x = self.image.repeat(n, 1, 1, 1) if self.constant else self.embed(x)
        kernels = self.kernel * self.style(style).view(n, 1, -1, 1, 1)
        made = nn.functional.conv2d(x.reshape(1, -1, 6, 6), kernels.flatten(0, 1), groups=n)
        return made.view(n, 6, *made.shape[2:])


@pytest.mark.parametrize("recipe", ["ria", "flap", "obs"])
def test_kernels_that_are_made_for_each_sample_are_scored(recipe: str) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(2, 3, 6, 6), torch.randn(2, 5)) for _ in range(2)]
    graph = depgraph.trace(KernelPerSample().eval(), batches[0])
    pruned = getattr(importance.recipes, recipe)(batches).prune(graph, depgraph.Target(params=0.7))
    assert pruned.report.check.error < 1e-4 and pruned.report.check.sensitivity > 1e-3


@pytest.mark.parametrize("score", ["ria", "amp"])
def test_a_stored_image_that_made_kernels_slide_over_is_no_kernel(score: str) -> None:
    torch.manual_seed(0)
    batch = (torch.randn(2, 3, 6, 6), torch.randn(2, 5))
    graph = depgraph.trace(KernelPerSample(constant=True).eval(), batch)
    found = importance.Activation([batch], score)(graph)
    assert any(len(scores) == CHANNELS and np.ptp(scores) > 0 for scores in found.values())


def test_what_meets_a_kernel_that_is_made_is_taken_as_a_channel_of_every_group() -> None:
    torch.manual_seed(0)
    model, batch = KernelPerSample(place=1).eval(), (torch.randn(2, 3, 6, 6), torch.randn(2, 5))
    graph = depgraph.trace(model, batch)
    (found,) = (s for name, s in importance.Activation([batch], "amp")(graph).items() if len(s) == CHANNELS)
    kernels = (model.kernel.flatten(1) * model.style(batch[1])[:, None]).detach()
    given = model.embed(batch[0]).detach().flatten(2)
    expected = torch.einsum("noc,ncp->c", kernels.abs(), given.abs())
    assert np.corrcoef(found, expected.numpy())[0, 1] > 0.99


@pytest.mark.parametrize("name", ["flap", "wanda_sp", "obs"])
def test_recipes_take_channels_of_every_group_too(name: str) -> None:
    """Of a convolution in two groups one is half of the model: with nothing smaller to take, a recipe had to go far below."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, groups=2), nn.ReLU(), nn.Conv2d(24, 4, 1)]
    model = nn.Sequential(*layers).eval()
    batches = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    made = importance.recipes.named(name, batches).prune(depgraph.trace(model, batches[0]), depgraph.Target(params=0.7))
    assert made.plan is not None
    assert 0.62 < made.plan.cost().params / sum(p.numel() for p in model.parameters()) <= 0.7
