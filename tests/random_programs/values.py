"""Steps over [2, positions, width] whose way depends on values: which rows, how many, how often."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from tests.random_programs import sequences
from tests.random_programs.program import WIDE, Draw, Program, value

for plain in (sequences.linear, sequences.activation, sequences.residual, sequences.gated, sequences.joined):
    value(plain)


def rows(h: Tensor) -> Tensor:
    """Which rows are taken: True where their own values say so."""
    return h.mean(-1) > 0


def own(net: Program, h: Tensor, draw: Draw) -> nn.Module:
    """A layer of the step that keeps the width."""
    return net.layer(draw.place, lambda: nn.Linear(h.shape[-1], h.shape[-1]))


@value
def masked_rows(net: Program, h: Tensor, draw: Draw) -> Tensor:
    made = h.clone()
    made[rows(h)] = draw.among(lambda taken: taken * 2 + 1, lambda taken: torch.full_like(taken, 0.5))(h[rows(h)])
    return made


@value
def layer_for_some(net: Program, h: Tensor, draw: Draw) -> Tensor:
    flat = h.reshape(-1, h.shape[-1])
    places = rows(flat).nonzero().squeeze(-1)
    made = own(net, h, draw)(flat[places]).relu()
    return draw.among(
        lambda: flat.index_add(0, places, made),
        lambda: flat.index_copy(0, places, made),
        lambda: flat.index_put((places,), made),
    )().view_as(h)


@value
def selected_and_scattered(net: Program, h: Tensor, draw: Draw) -> Tensor:
    mask = rows(h).unsqueeze(-1)
    made = own(net, h, draw)(h.masked_select(mask).view(-1, h.shape[-1]))
    return h.masked_scatter(draw.among(mask, mask.expand_as(h)), made)


@value
def largest(net: Program, h: Tensor, draw: Draw) -> Tensor:
    places = h.mean(-1).topk(2, dim=1).indices.unsqueeze(-1).expand(-1, -1, h.shape[-1])
    made = own(net, h, draw)(h.gather(1, places))
    return draw.among(lambda: made, lambda: h.scatter_add(1, places, made))()


@value
def sorted_and_back(net: Program, h: Tensor, draw: Draw) -> Tensor:
    order = h.mean(-1).argsort(1)
    made = own(net, h, draw)(torch.take_along_dim(h, order[..., None], 1).cumsum(1) / 3)
    return torch.take_along_dim(made, order.argsort(1)[..., None], 1)


@value
def by_experts(net: Program, h: Tensor, draw: Draw) -> Tensor:
    weight, chosen = net.layer(f"{draw.place} router", lambda: nn.Linear(h.shape[-1], 3))(h).softmax(-1).max(-1)
    made = torch.zeros_like(h)
    for expert in range(3):
        up = net.layer(f"{draw.place} up {expert}", lambda: nn.Linear(h.shape[-1], 10))
        down = net.layer(f"{draw.place} down {expert}", lambda: nn.Linear(10, h.shape[-1]))
        places = torch.where(chosen == expert)
        if places[0].numel():
            made[places] += down(up(h[places]).relu()) * weight[places].unsqueeze(-1)
    return h + made


@value
def matched(net: Program, h: Tensor, draw: Draw) -> Tensor:
    near, which = h.mean(-1).max(1)
    which[near > 0] = -1
    table = net.layer(draw.place, lambda: nn.Embedding(h.shape[1], h.shape[-1]))
    return h + table(which.clamp(min=0)).unsqueeze(1)


@value
def on_a_number(net: Program, h: Tensor, draw: Draw) -> Tensor:
    return h * 1.5 if h.mean().item() > 0 else h.tanh()


@value
def as_often_as_said(net: Program, h: Tensor, draw: Draw) -> Tensor:
    layer = own(net, h, draw)
    for _ in range(int(h.abs().mean() * 3) % 3 + 2):
        h = torch.tanh(layer(h))
    return h


@value
def pooled_by_kind(net: Program, h: Tensor, draw: Draw) -> Tensor:
    _, kinds = (h.mean(-1) * 3).round().long().unique(return_inverse=True)
    pooled = h.new_zeros(int(kinds.max()) + 1, h.shape[-1])
    pooled = pooled.index_add(0, kinds.flatten(), h.reshape(-1, h.shape[-1]))
    return h + own(net, h, draw)(pooled)[kinds]


@value
def of_own_lengths(net: Program, h: Tensor, draw: Draw) -> Tensor:
    lengths = (rows(h).sum(-1) + 1).clamp(max=h.shape[1]).tolist()
    parts = [own(net, h, draw)(row[:length]) for row, length in zip(h, lengths, strict=True)]
    means = torch.stack([part.mean(0) for part in parts]).unsqueeze(1)
    return draw.among(lambda: h + means, lambda: pad_sequence(parts, batch_first=True))()


@value
def buckets(net: Program, h: Tensor, draw: Draw) -> Tensor:
    kinds = torch.bucketize(h.mean(-1).detach(), torch.tensor([-0.5, 0.0, 0.5]))
    return h * net.layer(draw.place, lambda: nn.Embedding(4, h.shape[-1]))(kinds)


@value
def with_its_kind(net: Program, h: Tensor, draw: Draw) -> Tensor:
    if not net.holds(draw, h.shape[-1] < WIDE):
        return h
    return torch.cat([h, F.one_hot(rows(h).long(), 2).to(h.dtype)], -1)


@value
def pasted(net: Program, h: Tensor, draw: Draw) -> Tensor:
    made = h.clone()
    for k, count in enumerate(rows(h).sum(-1).tolist()):
        made[k, :count] = h[k, :count].flip(0)
    return made


@value
def best_row(net: Program, h: Tensor, draw: Draw) -> Tensor:
    best = h[torch.arange(len(h)), h.mean(-1).argmax(1)]
    return h + own(net, h, draw)(best).unsqueeze(1)
