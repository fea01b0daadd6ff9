"""The hand-written modules, by name, with inputs of unequal sizes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import convolutional as conv
from . import recurrent as rec
from . import sequential as seq
from .example import Builder, Example, seeded


def picture(height: int = 13, width: int = 11) -> Tensor:
    return torch.randn(2, 3, height, width)


def sequence(channels: int = 14) -> Tensor:
    return torch.randn(2, 7, channels)


def vector(channels: int = 14) -> Tensor:
    return torch.randn(2, channels)


def on(module: Callable[[], nn.Module], inputs: Callable[[], Tensor]) -> Builder:
    """A builder of an example with one positional input."""
    return lambda: Example(module(), (inputs(),))


MAKERS: dict[str, Builder] = {
    "residual_cnn": on(conv.ResidualCNN, picture),
    "dense_net": on(conv.DenseNet, picture),
    "unet_transposed": on(conv.unet_transposed, lambda: picture(20, 12)),
    "unet_interpolated": on(conv.unet_interpolated, lambda: picture(20, 12)),
    "channel_shuffle": on(conv.ShuffleNet, picture),
    "squeeze_excitation": on(conv.squeeze_excitation, picture),
    "group_norm_cnn": on(conv.group_norm_cnn, picture),
    "separable_conv1d": on(conv.SeparableConv1d, lambda: torch.randn(2, 6, 17)),
    "prelu_net": on(conv.prelu_net, picture),
    "pixel_shuffle": on(conv.PixelShuffler, picture),
    "multihead_attention": on(seq.multihead_attention, sequence),
    "transformer_encoder": on(seq.transformer_encoder, sequence),
    "transformer_layer_norm_first": on(seq.transformer_layer_norm_first, sequence),
    "fused_qkv_unbind": on(lambda: seq.Embedded(seq.FusedAttention(), 56), sequence),
    "einsum_attention": on(lambda: seq.Embedded(seq.EinsumAttention(), 56), sequence),
    "grouped_query_by_hand": on(lambda: seq.Embedded(seq.GroupedQueryAttention(), 56), sequence),
    "glu_chunk": on(seq.GatedChunk, lambda: sequence(20)),
    "split_sizes": on(seq.SplitSizes, lambda: sequence(20)),
    "bare_parameters": on(seq.BareParameters, sequence),
    "patch_embedding": on(seq.PatchEmbedding, lambda: picture(20, 12)),
    "mlp": on(seq.mlp, vector),
    "literal_sizes": on(seq.LiteralSizes, vector),
    "used_twice": on(seq.UsedTwice, sequence),
    "tied_weights": on(seq.TiedWeights, lambda: torch.randint(0, 101, (2, 7))),
    "lstm_both_ways": on(lambda: rec.Tagger(nn.LSTM, num_layers=2, bidirectional=True), sequence),
    "lstm_projected": on(lambda: rec.Tagger(nn.LSTM, proj_size=12), sequence),
    "gru_encoder_decoder": on(rec.EncoderDecoder, sequence),
    "lstm_cell": on(rec.Stepwise, sequence),
    "two_inputs": lambda: Example(seq.TwoInputs(), (vector(10),), {"sequence": sequence()}),
}

MODULES: dict[str, Builder] = {name: seeded(name, make) for name, make in MAKERS.items()}
