"""What comes into several consumers is summed once for all of them, as long as it is the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import depgraph
import importance
from importance import Gram, Moments, Norms


def test_what_is_written_to_between_two_consumers_is_summed_for_each() -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.one, self.two = nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(5, 2)
            self.three, self.four = nn.Linear(5, 2), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.make(x)
            first = self.one(h) + self.two(h)
            h[:, :4].mul_(2)  # through a view: what is read before and after has one name
            h[:, 4:].mul_(2)
            return first + self.three(h) + self.four(h)

    torch.manual_seed(0)
    model, x = Between(), torch.randn(7, 3)
    graph = depgraph.trace(model, x)
    found = importance.collect(graph, [x, x + 1], [Norms(), Moments(), Gram()])
    hidden = torch.cat([model.make(x), model.make(x + 1)]).detach()
    factors = {"one.weight": 1, "two.weight": 1, "three.weight": 2, "four.weight": 2}
    consumers = {consumer.weight: consumer for consumer in found.consumers}
    for weight, factor in factors.items():
        rows, consumer = hidden * factor, consumers[weight]
        torch.testing.assert_close(found.of(consumer, Norms()).squares, rows.square().sum(dim=0))
        torch.testing.assert_close(found.of(consumer, Moments()).variance, rows.var(dim=0))
        torch.testing.assert_close(found.of(consumer, Gram()).gram, rows.T @ rows)


class _Ways(nn.Module):
    """Gives its last two layers the same, and more to the second of them where an input is long."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.one, self.two = nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.make(x))
        return self.one(h) + self.two(h * 2 if x.shape[1] > 4 else h)


@pytest.mark.parametrize("lengths", [(4, 4), (4, 3), (4, 6, 4), (6, 4)])
def test_what_comes_into_two_consumers_is_summed_once_until_it_differs(lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, batches = _Ways(), [torch.randn(7, length, 3) for length in lengths]
    found = importance.collect(depgraph.trace(model, torch.randn(7, 4, 3)), batches, [Norms(), Moments(), Gram()])
    one, two = (next(c for c in found.consumers if c.weight == f"{name}.weight") for name in ("one", "two"))
    for consumer, of_long in ((one, 1), (two, 2)):
        rows = [torch.tanh(model.make(x)).flatten(0, 1).detach() * (of_long if x.shape[1] > 4 else 1) for x in batches]
        torch.testing.assert_close(found.of(consumer, Norms()).squares, torch.cat(rows).square().sum(dim=0))
        torch.testing.assert_close(found.of(consumer, Moments()).variance, torch.cat(rows).var(dim=0))
        torch.testing.assert_close(found.of(consumer, Gram()).gram, torch.cat(rows).T @ torch.cat(rows))
        assert found.of(consumer, Norms()).rows == sum(len(part) for part in rows)
    for statistic in (Norms(), Moments(), Gram()):
        assert (found.of(one, statistic) is found.of(two, statistic)) == (max(lengths) <= 4)


def test_windows_of_convolutions_are_summed_for_each() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make = nn.Conv2d(3, 4, 1)
            self.small, self.large = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.make(x)
            return self.small(h) + self.large(h)

    torch.manual_seed(0)
    model, x = Branches(), torch.randn(2, 3, 5, 5)
    found = importance.collect(depgraph.trace(model, x), [x, x + 1], [Norms(), Gram()])
    small, large = (next(c for c in found.consumers if c.weight == f"{name}.weight") for name in ("small", "large"))
    assert found.of(small, Norms()) is found.of(large, Norms())
    assert found.of(small, Gram()).gram.shape == (4, 4) and found.of(large, Gram()).gram.shape == (36, 36)
    hidden = torch.cat([model.make(x), model.make(x + 1)]).detach()
    windows = nn.functional.unfold(hidden, 3, padding=1).movedim(1, -1).flatten(0, 1)
    torch.testing.assert_close(found.of(large, Gram()).gram, windows.T @ windows)
