"""Making up for channels of convolutions whose windows aren't laid out: of three dims, transposed, padded by a word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import depgraph
import exporters
from importance import Compensation, compensate
from importance.refitting import refit
from importance.taps import taps_of
from tests.onnx_door.exporting import exported
from tests.zoo.example import Example

CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "words": lambda: nn.Conv1d(6, 5, 4, padding="same"),
    "words, dilated": lambda: nn.Conv2d(6, 5, 3, padding="same", dilation=2, bias=False),
    "3d": lambda: nn.Conv3d(6, 5, 3, padding=1, stride=2, bias=False),
    "3d, grouped": lambda: nn.Conv3d(6, 4, 3, padding=1, groups=2),
    "transposed 1d": lambda: nn.ConvTranspose1d(6, 5, 5, stride=2, padding=1, dilation=2),
    "transposed 2d": lambda: nn.ConvTranspose2d(6, 5, 4, stride=2, padding=1, bias=False),
    "transposed 3d": lambda: nn.ConvTranspose3d(6, 5, 3, stride=3, output_padding=1),
}
FIRST = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def _net(name: str) -> tuple[nn.Sequential, Tensor]:
    """A network of two convolutions with six channels between them, and a batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        second: Any = CONVOLUTIONS[name]()
        space = second.weight.ndim - 2
        first, last = FIRST[space](3, 6, 3, padding=1), FIRST[space](second.out_channels, 2, 1)
        model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)
        return model.eval(), torch.randn(16, 3, *[7] * space)


def _plan(model: nn.Module, x: Tensor, channel: int) -> depgraph.Plan:
    """The group of a channel of the first convolution goes."""
    graph = depgraph.trace(model, (x,))
    members = ((axis, member) for axis in graph.axes for member in axis.members)
    found = {axis.name: m.labels for axis, m in members if (m.target, m.dim) == ("0.weight", 0)}
    name, labels = max(
        found.items(), key=lambda item: int(item[1].max())
    )  # not the blocks of a convolution with groups
    return graph.cut_plan({name: [int(labels[channel])]})


def _behind(model: nn.Module, x: Tensor) -> Tensor:
    """What the second convolution puts out."""
    with torch.no_grad():
        made: Tensor = model[:3](x)  # type: ignore[index]
    return made


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("how", [Compensation("bias"), Compensation(damping=1e-6)], ids=["bias", "least-squares"])
def test_the_mean_of_every_output_is_kept_where_a_constant_goes(name: str, how: Compensation) -> None:
    model, x = _net(name)
    with torch.no_grad():
        for channel in (1, 4):  # one of each group
            model[0].weight[channel], model[0].bias[channel] = 0, 1.5  # type: ignore[index, operator]
    plan = _plan(model, x, 4)
    plain, made, dense = plan.apply(), plan.apply(), _behind(model, x)
    compensate(made, plan, [x], how)
    places = [0, *range(2, x.ndim)]
    assert torch.allclose(_behind(made, x).mean(places), dense.mean(places), atol=1e-5)
    assert (_behind(made, x) - dense).square().sum() < (_behind(plain, x) - dense).square().sum()


@pytest.mark.parametrize("name", [name for name in CONVOLUTIONS if "grouped" not in name])
@pytest.mark.parametrize("way", [compensate, refit])
def test_a_doubled_channel_goes_without_loss(name: str, way: Any) -> None:
    model, x = _net(name)
    with torch.no_grad():
        model[0].weight[4], model[0].bias[4] = model[0].weight[2], model[0].bias[2]  # type: ignore[index, operator]
    plan = _plan(model, x, 4)
    made = plan.apply()
    way(made, plan, [x], Compensation(damping=1e-9, inputs="pruned" if way is refit else "dense"))
    assert torch.allclose(_behind(made, x), _behind(model, x), atol=1e-3)


@pytest.mark.parametrize("name", ["3d", "transposed 2d"])
def test_biases_that_were_made_are_saved_and_exported(name: str, tmp_path: Path) -> None:
    model, x = _net(name)
    plan = _plan(model, x, 4)
    made = plan.apply()
    assert compensate(made, plan, [x], Compensation("bias")).created == ("2.bias",)
    depgraph.save(made, tmp_path / "made")
    assert torch.equal(_behind(depgraph.load(tmp_path / "made", _net(name)[0]), x), _behind(made, x))
    exporters.to_onnx(made, (x,), tmp_path / "made.onnx")  # compares it with the model


@pytest.mark.parametrize("name", ["3d", "transposed 1d", "transposed 2d"])
def test_a_file_makes_up_as_its_module_does(name: str, tmp_path: Path) -> None:
    model, x = _net(name)
    graph = depgraph.trace(exported(Example(model, (x,)), tmp_path / "dense.onnx", input_names=["x"]))
    plan, file_plan = _plan(model, x, 4), graph.cut_plan({"0.weight:0": [4]})
    for how in (Compensation("bias"), Compensation()):
        made, written = plan.apply(), file_plan.apply()
        compensate(made, plan, [x], how)
        compensate(written, file_plan, [x], how)
        got = graph.again(written).observer().call(((), {"x": x}))
        torch.testing.assert_close(got, made(x).detach(), rtol=1e-3, atol=1e-4)


def test_at_what_share_of_places_an_element_of_a_kernel_takes_part() -> None:
    layer = nn.ConvTranspose1d(
        2, 2, 3, stride=2, padding=1
    )  # puts out 7 places of 4, of which the first element meets 3
    graph = depgraph.trace(nn.Sequential(nn.Conv1d(2, 2, 1), layer), (torch.randn(1, 2, 4),))
    node = next(n for n in graph.nodes if "transpose" in str(n.target))
    assert taps_of(node, (1, 2, 4), (3,)).tolist() == pytest.approx([3 / 7, 4 / 7, 3 / 7])
