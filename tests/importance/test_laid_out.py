"""Where samples and padding lie in what a consumer is given, whatever order the model's code puts its dims in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import depgraph
import importance
from depgraph.errors import DataError
from importance.contributions import ContributionSums
from importance.rows import Rows

B, T, C = 3, 6, 8


class _TokensFirst(nn.Module):
    """What comes in is [samples, tokens, channels]; the layers see [tokens, samples, channels]."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        x = torch.relu(self.first(x.transpose(0, 1) * attention_mask.t()[:, :, None]))
        return self.last(x).transpose(0, 1)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, C), nn.Linear(C, 2)


class _Stacked(_TokensFirst):
    """Two stacked maps, whose number is in front of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(1, 1)
        self.stack, self.out = nn.Parameter(torch.randn(B, C, 4)), nn.Parameter(torch.randn(B, 2, C))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = torch.relu(torch.einsum("btc,ehc->ebth", x * attention_mask[:, :, None], self.stack))
        return torch.einsum("ebth,eoh->bto", hidden, self.out)


class _Rows(_TokensFirst):
    """Samples and tokens are one dim, in front of which stands another of the samples' size."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        flat = (x * attention_mask[:, :, None]).reshape(-1, 4)
        hidden = torch.relu(self.first(flat)).expand(B, -1, -1)
        return self.last(hidden).sum(dim=0).reshape(len(x), -1, 2)


def _batches(count: int = 2) -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    found = []
    for length in (T, 2 * B)[:count]:
        mask = torch.ones(B, length, dtype=torch.long)
        mask[0, 2:] = 0
        mask[2, :1] = 0
        found.append({"x": torch.randn(B, length, 4), "attention_mask": mask})
    return found


def _singles(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: t[k : k + 1] for name, t in batch.items()} for batch in batches for k in range(B)]


def _scores(model: nn.Module, batches: list[Any], criterion: str) -> dict[str, np.ndarray]:
    example = batches[0]
    graph = depgraph.trace(model, (), example) if isinstance(example, dict) else depgraph.trace(model, example)
    return importance.Activation(batches, criterion)(graph)


@pytest.mark.parametrize("criterion", ["minitron", "amp", "wanda-sp", "wifv"])
@pytest.mark.parametrize("build", [_TokensFirst, _Stacked, _Rows])
def test_samples_and_padding_are_found_in_any_order_of_dims(build: Callable[[], nn.Module], criterion: str) -> None:
    torch.manual_seed(0)
    model, batches = build().eval(), _batches()
    together, alone = _scores(model, batches, criterion), _scores(model, _singles(batches), criterion)
    for axis, scores in together.items():
        np.testing.assert_allclose(scores, alone[axis], rtol=1e-4, err_msg=axis)
    noisy = [{**b, "x": torch.where(b["attention_mask"][:, :, None] != 0, b["x"], 100.0)} for b in batches]
    for axis, scores in _scores(model, noisy, criterion).items():
        np.testing.assert_allclose(scores, together[axis], rtol=1e-4, err_msg=axis)


def test_means_over_the_tokens_of_each_sample_are_those_of_its_text() -> None:
    torch.manual_seed(0)
    model, batches = _TokensFirst().eval(), _batches()
    squares = torch.zeros(C)
    for batch in batches:
        hidden = torch.relu(model.first(batch["x"])).detach()
        for each, mask in zip(hidden, batch["attention_mask"], strict=True):
            squares += each[mask != 0].abs().mean(dim=0).square()
    (scores,) = _scores(model, batches, "minitron").values()
    np.testing.assert_allclose(scores, squares.sqrt().numpy(), rtol=1e-5)


class _Blended(nn.Module):
    """Samples first; attention of torch lays out steps before them, as one dim with them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, C), nn.Linear(C, 2)
        self.mix = nn.MultiheadAttention(C, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.last(self.mix(hidden, hidden, hidden, need_weights=False)[0])


@pytest.mark.parametrize("criterion", ["minitron", "amp"])
def test_samples_are_found_in_batches_of_other_sizes_than_the_example(criterion: str) -> None:
    torch.manual_seed(0)
    model, whole = _Blended().eval(), torch.randn(9, T, 4)
    together = _scores(model, [whole], criterion)
    graph = depgraph.trace(model, whole[:B])
    for sizes in ([B, 9 - B], [9], [1] * 9):
        parts = importance.Activation(list(whole.split(sizes)), criterion)(graph)
        for axis, scores in together.items():
            np.testing.assert_allclose(scores, parts[axis], rtol=1e-4, err_msg=axis)


class _Experts(nn.Module):
    """Each expert is given the rows that a router picks for it, of which nothing says whose they are."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, C), nn.ReLU(), nn.Linear(C, 2)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        best, out = self.router(x).argmax(-1), x.new_zeros(*x.shape[:-1], 2)
        for number, expert in enumerate(self.experts):
            at = torch.where(best == number)
            out[at] = expert(x[at])
        return out


@pytest.mark.parametrize("criterion", ["minitron", "amp", "wanda-sp", "wifv"])
def test_rows_that_a_router_picks_are_not_taken_for_samples_in_their_order(criterion: str) -> None:
    torch.manual_seed(0)
    model, whole = _Experts().eval(), torch.randn(8, T, 4)
    together, alone = _scores(model, [whole], criterion), _scores(model, list(whole.split(1)), criterion)
    for axis, scores in together.items():
        np.testing.assert_allclose(scores, alone[axis], rtol=1e-4, err_msg=axis)


class _StepsFirst(nn.Module):
    """Steps lie along the first dim of what comes in, as recurrent layers and attention of torch take them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, C), nn.Linear(C, 2)
        self.mix: nn.Module = nn.LSTM(C, C) if kind == "recurrent" else nn.MultiheadAttention(C, 2)

    def forward(self, input: Tensor) -> Tensor:
        hidden = torch.relu(self.first(input))
        given = (hidden,) if isinstance(self.mix, nn.LSTM) else (hidden, hidden, hidden)
        return self.last(torch.relu(self.mix(*given)[0]))


@pytest.mark.parametrize("kind", ["recurrent", "attention"])
@pytest.mark.parametrize("criterion", ["minitron", "amp"])
def test_samples_that_lie_along_the_second_dim_are_found(kind: str, criterion: str) -> None:
    torch.manual_seed(0)
    model, batches = _StepsFirst(kind).eval(), [torch.randn(T, B, 4), torch.randn(T, B, 4)]
    together = _scores(model, batches, criterion)
    alone = _scores(model, [one for batch in batches for one in batch.split(1, dim=1)], criterion)
    for axis, scores in together.items():
        np.testing.assert_allclose(scores, alone[axis], rtol=1e-4, err_msg=axis)


def test_a_batch_is_not_taken_apart_along_its_steps() -> None:
    model, batch = _StepsFirst("recurrent").eval(), torch.randn(T, B, 4)
    graph = depgraph.trace(model, batch)
    for score in (
        importance.Fisher([batch], lambda output, given: output.sum()),
        importance.GradientBlend([batch], lambda o, g: o.sum()),
    ):
        with pytest.raises(DataError, match=r"samples of 'input' lie along its second dim.*takes samples first"):
            score(graph)


class _Scaled(nn.Module):
    """Of every sample a scale of its own, and beside what it computes a mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, C), nn.Linear(C, 2)

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.first(x)) * scale
        return self.last(hidden), hidden.mean()


def test_a_mean_over_the_batch_makes_no_steps_of_its_samples() -> None:
    torch.manual_seed(0)
    batch = torch.randn(B, 4), torch.rand(B, 1)
    graph = depgraph.trace(_Scaled().eval(), batch)
    together = importance.Fisher([batch], lambda output, given: output[0].square().mean())(graph)
    alone = [tuple(t[k : k + 1] for t in batch) for k in range(B)]
    for axis, scores in importance.Fisher(alone, lambda output, given: output[0].square().mean())(graph).items():
        np.testing.assert_allclose(scores, together[axis], rtol=1e-5)


class _TwoTexts(nn.Module):
    """Two texts, each with a mask of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, C), nn.Linear(C, 2)

    def forward(self, x: Tensor, y: Tensor, attention_mask: Tensor, y_attention_mask: Tensor) -> Tensor:
        mean = (x * attention_mask[:, :, None]).sum(dim=1)
        return self.last(torch.relu(self.first(y * y_attention_mask[:, :, None] + mean[:, None])))


@pytest.mark.parametrize("length", [T, T + 1])
def test_of_two_masks_each_text_has_its_own_also_where_both_are_as_long(length: int) -> None:
    torch.manual_seed(0)
    model = _TwoTexts().eval()
    masks = [torch.ones(B, T, dtype=torch.long), torch.ones(B, length, dtype=torch.long)]
    masks[0][:, 1:], masks[1][0, 3:] = 0, 0
    x, y = torch.randn(B, T, 4), torch.randn(B, length, 4)
    batch = {"x": x, "y": y, "attention_mask": masks[0], "y_attention_mask": masks[1]}
    (scores,) = _scores(model, [batch], "ifv").values()
    mean = (x * masks[0][:, :, None]).sum(dim=1)[:, None]
    hidden = torch.relu(model.first(y * masks[1][:, :, None] + mean)).detach()[masks[1] != 0]
    np.testing.assert_allclose(scores, hidden.var(dim=0).numpy(), rtol=1e-4)


class _Plain(_TokensFirst):
    """Padding goes through it."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


def test_a_mask_given_by_place_counts_as_one_given_by_name() -> None:
    torch.manual_seed(0)
    model, (batch,) = _Plain().eval(), _batches(1)
    (scores,) = _scores(model, [(batch["x"], batch["attention_mask"])], "ifv").values()
    hidden = torch.relu(model.first(batch["x"])).detach()[batch["attention_mask"] != 0]
    np.testing.assert_allclose(scores, hidden.var(dim=0).numpy(), rtol=1e-5)


class _Heads(nn.Module):
    """An attention with as many heads as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(2 * T, 2 * T, bias=False) for _ in range(4))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        q, k, v = (one(x).unflatten(-1, (T, 2)).transpose(1, 2) for one in (self.q, self.k, self.v))
        weights = (q @ k.mT).masked_fill(attention_mask[:, None, None] == 0, -1e9).softmax(dim=-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


def test_padding_stays_out_where_there_are_as_many_heads_as_tokens() -> None:
    torch.manual_seed(0)
    model, mask = _Heads().eval(), _batches(1)[0]["attention_mask"]
    x = torch.randn(B, T, 2 * T)
    found = [
        _scores(model, [{"x": torch.where(mask[:, :, None] != 0, x, fill), "attention_mask": mask}], "wifv")
        for fill in (0.0, 3.0)
    ]
    for axis, scores in found[0].items():
        np.testing.assert_allclose(scores, found[1][axis], rtol=1e-4, err_msg=axis)


class _Routed(nn.Module):
    """Rows with a positive number go to one map, the others to another, and what both put out is added."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down = nn.Linear(4, C), nn.Linear(C, C), nn.Linear(C, C)
        self.last = nn.Linear(C, 2)

    def forward(self, x: Tensor) -> Tensor:
        made = torch.relu(self.first(x))
        for one, chosen in ((self.up, x[:, 0] > 0), (self.down, x[:, 0] <= 0)):
            at = torch.where(chosen)[0]
            made = made.index_add(0, at, one(made[at]))
        return self.last(made)


@pytest.mark.parametrize("criterion", ["wanda-sp", "amp"])
def test_norms_and_means_are_for_each_sample_of_a_batch_however_many_come_to_a_consumer(criterion: str) -> None:
    torch.manual_seed(0)
    model, x = _Routed().eval(), torch.randn(12, 4)
    x[:, 0] = x[:, 0].abs() * torch.tensor([1.0, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, 1])
    graph = depgraph.trace(model, x)
    together = importance.Activation([x], criterion)(graph)
    assert together
    for parts in (torch.split(x, 5), torch.split(x, 4)):
        for axis, scores in importance.Activation(list(parts), criterion)(graph).items():
            np.testing.assert_allclose(scores, together[axis], rtol=1e-4, err_msg=axis)


def test_what_meets_something_computed_is_scored_alike_however_samples_are_batched() -> None:
    torch.manual_seed(0)
    labels = {"pairs": np.array([0, 0, 1, 1])}
    given, met = torch.randn(4, 3, 4), torch.randn(4, 3, 4) * torch.tensor([0.1, 0.1, 3.0, 3.0])[:, None, None]
    found = []
    for sizes in ([4], [2, 2]):
        sums = ContributionSums(labels, stored=False)
        for x, y in zip(given.split(sizes), met.split(sizes), strict=True):
            sums.add((Rows(x), Rows(y)))
        found.append(sums.scores("pairs")[1])
    by_hand = (given.abs().mean(dim=(0, 1)) * met.abs().mean(dim=(0, 1))).reshape(2, 2).sum(dim=1)
    for scores in found:
        np.testing.assert_allclose(scores, by_hand.numpy(), rtol=1e-5)
