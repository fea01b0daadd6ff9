"""Hand-written modules around recurrent layers and cells."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Tagger(nn.Module):
    """A recurrent layer between an input projection and a head over every step."""

    def __init__(self, layer: type[nn.RNNBase], **options: int | bool) -> None:
        super().__init__()
        self.embed = nn.Linear(14, 20)
        self.layer = layer(20, 24, batch_first=True, **options)
        width = int(options.get("proj_size", 24)) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x))[0])


class EncoderDecoder(nn.Module):
    """The last state of one GRU starts another one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.GRU(14, 24, num_layers=2)
        self.decoder = nn.GRU(14, 24, num_layers=2)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decoder(x, self.encoder(x)[1])[0])


class Stepwise(nn.Module):
    """An LSTM cell that is called for every step, from states that another layer makes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(14, 20)
        self.start = nn.Linear(14, 24)
        self.cell = nn.LSTMCell(20, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.start(x[:, 0])
        cell = torch.zeros_like(hidden)
        for step in range(x.shape[1]):
            hidden, cell = self.cell(self.embed(x[:, step]), (hidden, cell))
        return self.head(hidden)
