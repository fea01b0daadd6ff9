"""Windows of convolutions, laid out as the columns of their weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import depgraph
from importance import Surgeon
from importance.patches import Window, laid_out
from tests.importance.test_surgeon import squared


@pytest.mark.parametrize("sides", ["both", "columns"])
def test_groups_of_a_convolution_of_three_dims_cost_what_those_of_two_do(sides: str) -> None:
    torch.manual_seed(0)
    flat = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=(2, 1)), nn.Tanh(), nn.Conv2d(6, 4, 3, padding=(1, 0), dilation=(1, 2))
    )
    deep = nn.Sequential(nn.Conv3d(3, 6, (3, 1, 3), stride=(2, 1, 1)), nn.Tanh(), nn.Conv3d(6, 4, (3, 1, 3)))
    deep[2].padding, deep[2].dilation = (1, 0, 0), (1, 1, 2)
    for one, other in ((flat[0], deep[0]), (flat[2], deep[2])):
        other.weight.data, other.bias.data = one.weight.data.unsqueeze(3), one.bias.data
    x = torch.randn(5, 3, 9, 8)
    found = [
        Surgeon([given], squared, sides=sides)(depgraph.trace(model, given))
        for model, given in ((flat, x), (deep, x.unsqueeze(3)))
    ]
    np.testing.assert_allclose(found[1]["0.weight:0"], found[0]["0.weight:0"], rtol=1e-4)


def test_windows_of_three_dims_lie_as_the_weight_is_multiplied_with_them() -> None:
    x, weight = torch.randn(2, 3, 7, 8, 9), torch.randn(5, 3, 3, 2, 3)
    expected = nn.functional.conv3d(x, weight, stride=(2, 1, 3), dilation=(1, 2, 1), padding=(1, 0, 2))
    columns = laid_out(x, Window((3, 2, 3), (2, 1, 3), (1, 2, 1), ((1, 1), (0, 0), (2, 2))))
    torch.testing.assert_close((weight.flatten(1) @ columns).reshape(expected.shape), expected, rtol=1e-4, atol=1e-4)
