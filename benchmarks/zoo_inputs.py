"""Example inputs of any model of transformers, by the names that its forward takes and the sizes in its config."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

BATCH, TOKENS, FRAMES, SIDE, SAMPLES, GRID = 2, 16, 64, 64, 6400, 4
MOST = 12  # shapes tried of one set of names
BANDS = (
    "num_mel_bins",
    "feature_size",
    "input_feat_per_channel",
    "feature_projection_input_dim",
    "n_mels",
    "num_mels",
    "mel_dim",
    "input_dim",
    "input_feat_size",
    "model_in_dim",
)


@dataclass(frozen=True)
class Maker:
    """Makes the tensors of one model; every method gives the shapes that an input of its name may have, likely ones first."""

    config: Any
    random: torch.Generator
    takes: frozenset[str]

    def text(self) -> list[Tensor]:
        words = min(self.number(("vocab_size", "text_vocab_size"), 64, "text"), 64)
        limit = self.number(("max_position_embeddings", "n_positions"), TOKENS, "text")
        free = [w for w in range(4, words) if w not in set(_special(self.config))] or [0]
        length = min(TOKENS, max(limit - 2, 2))
        chosen = torch.tensor(free)[torch.randint(0, len(free), (BATCH, length), generator=self.random)]
        books = self.number(("num_codebooks",), 0)
        return [
            chosen,
            *([chosen[:, None].repeat(1, books, 1), chosen[..., None].repeat(1, 1, books)] if books else []),
        ]

    def pixels(self) -> list[Tensor]:
        """Images, films, or patches in a row where the model takes a grid beside them."""
        side = self.find(("image_size", "img_size", "input_size"), "vision")
        height, width = side[-2:] if isinstance(side, (list, tuple)) and len(side) > 1 else (_whole(side, SIDE),) * 2
        channels = self.number(("num_channels", "in_channels", "in_chans", "image_channels"), 3, "vision")
        film = self.number(("num_frames", "frames_per_clip"), 2, "vision")
        image, frames = self.floats(BATCH, channels, height, width), self.floats(BATCH, film, channels, height, width)
        found = [image, frames, self.floats(BATCH, 1, channels, height, width)]
        if "spatial_shapes" in self.takes:
            found.insert(0, self.patches().reshape(BATCH, GRID * GRID, -1))
        return [self.patches(), *found] if any(name.endswith("grid_thw") for name in self.takes) else found

    def films(self) -> list[Tensor]:
        image = self.pixels()[-3]  # images come before films
        length = self.number(("num_frames", "frames_per_clip"), 2, "vision")
        return [image[:, None].repeat(1, length, 1, 1, 1)]

    def patches(self) -> Tensor:
        """The patches of `BATCH` images of `GRID` by `GRID`, a row each."""
        patch = self.number(("patch_size", "spatial_patch_size"), 14, "vision")
        channels = self.number(("in_channels", "num_channels", "in_chans"), 3, "vision")
        deep = self.number(("temporal_patch_size",), 1, "vision")
        return self.floats(BATCH * GRID * GRID, channels * deep * patch * patch)

    def hidden(self) -> list[Tensor]:
        width = self.number(("hidden_size", "d_model"), 64)
        return [self.patches(), self.floats(BATCH, TOKENS, width)]

    def grid(self) -> list[Tensor]:
        return [torch.tensor([[1, GRID, GRID]] * BATCH)]

    def spectra(self) -> list[Tensor]:
        """[batch, bands, frames] and [batch, frames, bands]."""
        frames = 2 * self.number(("max_source_positions",), FRAMES // 2, "audio")
        known = dict.fromkeys(v for n in BANDS if type(v := self.find((n,), "audio")) is int)
        upright = [self.floats(BATCH, bands, frames) for bands in known or [80]]
        lying = [t.transpose(1, 2).contiguous() for t in upright]
        lying += [t[:, None] for t in lying[:1]]
        return [*upright, *lying] if self.find(("max_source_positions",), "audio") else [*lying, *upright]

    def sound(self) -> list[Tensor]:
        """A waveform, one with a channel, or spectra in a row where the config says how many frames."""
        bands, frames = self.find(("num_mel_bins",), "audio"), self.find(("max_length",), "audio")
        spectra = [self.floats(BATCH, frames, bands)] if type(bands) is type(frames) is int else []
        channels = self.number(("audio_channels",), 1, "audio")
        return [
            *spectra,
            self.floats(BATCH, SAMPLES),
            self.floats(BATCH, channels, SAMPLES),
            self.floats(BATCH, 1, SAMPLES),
        ]

    def series(self) -> list[Tensor]:
        """Past values of a time series: [batch, time, channels] or [batch, time]."""
        time = self.number(("context_length", "prediction_length"), 32) + max(self.find(("lags_sequence",)) or [0])
        channels = self.number(("num_input_channels", "input_size"), 1)
        return [self.floats(BATCH, time, channels), self.floats(BATCH, time)]

    def time_features(self) -> list[Tensor]:
        past = self.series()[1].shape[1]
        return [self.floats(BATCH, past, self.number(("num_time_features",), 1))]

    def mask(self) -> list[Tensor]:
        return [torch.ones_like(self.text()[0])]

    def boxes(self) -> list[Tensor]:
        corner = torch.randint(0, 50, (BATCH, self.text()[0].shape[1], 2), generator=self.random)
        return [torch.cat([corner, corner + 20], dim=-1)]

    def ones_like(self, shapes: list[Tensor]) -> list[Tensor]:
        return [torch.ones(t.shape) for t in shapes]

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def find(self, names: tuple[str, ...], kind: str = "") -> Any:
        """The first of these fields in the sub-configs of a kind (vision, text, audio), in the config, or in any other."""
        tree = list(_tree(self.config))
        tree.sort(key=lambda item: 0 if kind and kind in item[0] else 1)
        for name in names:
            for _, config in tree:
                if config.get(name) is not None:
                    return config[name]
        return None

    def number(self, names: tuple[str, ...], otherwise: int, kind: str = "") -> int:
        return _whole(self.find(names, kind), otherwise)


MAKERS: dict[str, Callable[[Maker], list[Tensor]]] = {
    "input_ids": Maker.text,
    "pixel_values": Maker.pixels,
    "input_features": Maker.spectra,
    "input_values": Maker.sound,
    "decoder_input_ids": Maker.text,
    "pixel_values_videos": Maker.films,
    "bbox": Maker.boxes,
    "image": Maker.pixels,
    "past_values": Maker.series,
    "past_time_features": Maker.time_features,
    "past_observed_mask": lambda maker: maker.ones_like(maker.series()),
    "past_values_padding": lambda maker: [torch.zeros_like(t) for t in maker.series()[1:]],
    "freq": lambda maker: [torch.zeros(BATCH, 1, dtype=torch.long)],
    "hidden_states": Maker.hidden,
    "grid_thw": Maker.grid,
    "image_grid_thw": Maker.grid,
    "merge_sizes": lambda maker: [torch.ones(BATCH, dtype=torch.long)],
    "audio_mel": Maker.spectra,
    "audio_mel_mask": lambda maker: [torch.zeros(BATCH, FRAMES, dtype=torch.bool)],
    "input_features_mask": lambda maker: [torch.ones(BATCH, FRAMES, dtype=torch.long)],
    "attention_mask": Maker.mask,
    "qformer_input_ids": Maker.text,
    "task_inputs": Maker.text,
    "inputs_embeds": lambda maker: maker.hidden()[1:],
    "query_embeds": lambda maker: maker.hidden()[1:],
    "latents": lambda maker: [maker.hidden()[1].transpose(1, 2)],
    "pixel_attention_mask": lambda maker: [torch.ones(BATCH, GRID * GRID, dtype=torch.long)],
    "spatial_shapes": lambda maker: [torch.tensor([[GRID, GRID]] * BATCH)],
    "prompt_pixel_values": Maker.pixels,
    "prompt_masks": Maker.pixels,
    "inputs": lambda maker: [*maker.text(), *maker.sound(), *maker.pixels()],
    "input": Maker.text,
}
CORE = ("input_ids", "pixel_values", "input_features", "input_values", "decoder_input_ids")
SIDES = ("bbox", "image", "qformer_input_ids", "pixel_values_videos", "image_grid_thw", "input_features_mask")


def candidates(model: nn.Module, seed: int = 0) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Makers of keyword arguments to try, likely ones first: the main input and required ones, then with what else can be made.

    Raises LookupError for a required input of a name that `MAKERS` lacks.
    """
    signature = inspect.signature(model.forward).parameters
    plain = [p for n, p in signature.items() if n != "kwargs" and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = [p.name for p in plain if p.default is p.empty]
    takes = frozenset(p.name for p in plain)
    missing = [name for name in required if name not in MAKERS]
    if missing:
        raise LookupError(f"the zoo can't make up the input {missing[0]!r}")
    for names in _sets(model, required, takes):
        shapes = _shapes(model, names, takes, seed)
        for chosen in itertools.islice(itertools.product(*shapes.values()), MOST):
            made = dict(zip(shapes, chosen, strict=True))
            yield partial(dict, made)
            if {"input_ids", "pixel_values"} <= made.keys() and hasattr(model, "get_image_features"):
                yield partial(with_image_tokens, model, made)


def _shapes(model: nn.Module, names: list[str], takes: frozenset[str], seed: int) -> dict[str, list[Tensor]]:
    maker = Maker(model.config, torch.Generator().manual_seed(seed), takes)
    return {name: MAKERS[name](maker) for name in names}


def with_image_tokens(model: nn.Module, made: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, where the words begin with as many image tokens as the model makes features of an image."""
    token = next(
        v for name in ("image_token_id", "image_token_index") if (v := getattr(model.config, name, None)) is not None
    )
    grid = {name: made[name] for name in ("image_grid_thw",) if name in made}
    with torch.no_grad():
        found = model.get_image_features(pixel_values=made["pixel_values"], **grid)
    found = getattr(found, "pooler_output", found)
    leaves = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]
    count = sum(leaf.numel() // leaf.shape[-1] for leaf in leaves) // BATCH
    return {**made, "input_ids": torch.cat([torch.full((BATCH, count), token), made["input_ids"]], dim=1)}


def _sets(model: nn.Module, required: list[str], takes: frozenset[str]) -> list[list[str]]:
    """Sets of names, without repeats."""
    main = model.main_input_name
    mains = [n for n in ([main] if isinstance(main, str) else main) if n in takes and n in MAKERS]
    least = [*required, *(n for n in mains if n not in required)]
    decoder = [*least, "decoder_input_ids"] if "decoder_input_ids" in takes - set(least) else least
    core = [*least, *(n for n in CORE if n in takes and n not in least)]
    more = [*core, *(n for n in SIDES if n in takes and n not in core)]
    masked = [*least, *(n for n in ("attention_mask",) if n in takes and n not in least)]
    found: list[list[str]] = []
    first = decoder if getattr(model.config, "is_encoder_decoder", False) else least
    for names in (first, core, least, decoder, masked, more):
        if names and names not in found:
            found.append(names)
    return found


def _tree(config: Any, name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """A config and all within it, outermost first, as a name and its fields."""
    yield name, vars(config)
    for field, held in vars(config).items():
        if hasattr(held, "to_diff_dict"):
            yield from _tree(held, f"{name}.{field}")


def _special(config: Any) -> Iterator[int]:
    """The numbers of all special tokens."""
    for _, held in _tree(config):
        yield from (v for k, v in held.items() if k.endswith(("token_id", "token_index")) and isinstance(v, int))


def _whole(value: Any, otherwise: int) -> int:
    """An int, the first of several, or the other number."""
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else otherwise
