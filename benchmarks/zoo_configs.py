"""Tiny configurations of any model type of transformers, by one rule over the names and values of config fields.

No model is named here: a field's name says what kind of number it holds (layers, heads, width, vocabulary, image side, ...), a
`Level` says how small numbers of that kind become, and equal widths stay equal throughout a config and its sub-configs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

WORDS, POSITIONS, SOURCE_POSITIONS = 128, 512, 32
WIDE = 32
MAIN = re.compile(r"(^|_)(hidden_size|d_model|n_embd|embed_dim|hidden_dim|hidden_dimension|dim|emb_dim|embedding_dim)$")
LAYERS = re.compile(r"((^|_)(n_|num_)?(hidden_)?(layers?|blocks?|depth)|^num_\w+_layers|_depths?)$")


@dataclass(frozen=True)
class Level:
    """How far to shrink.

    Attributes:
        layers: so many are left.
        heads: of all attentions; 0: as many as there were, divided by `fewer`.
        divisor: of widths; 0: the main width becomes 64, the others follow it.
        patches: along the side of an image.
        fewer: divisor of the number of heads, whose width follows from it.
    """

    layers: int
    heads: int
    divisor: int
    patches: int
    fewer: int = 1


LEVELS = (
    Level(2, 4, 0, 4),
    Level(2, 0, 8, 4),
    Level(4, 0, 8, 8),
    Level(2, 0, 16, 8, fewer=16),
    Level(2, 0, 2, 14),
    Level(2, 0, 1, 14),
    Level(99, 0, 8, 14),
)


@dataclass
class Shrinker:
    """Shrinks one tree of configs to one level."""

    level: Level
    mains: set[int] = field(default_factory=set)
    tokens: dict[int, int] = field(default_factory=dict)
    main: int = 0
    depth: int = 0

    def shrunk(self, config: Any) -> Any:
        """A new config of the same class; fields that the class fills in itself are left for it to fill in again."""
        self.mains |= set(_mains(config))
        values = plain(config)
        own = [v for k, v in values.items() if MAIN.search(k) and isinstance(v, int) and v >= WIDE]
        before = self.main, self.depth
        self.main = max(own, default=max(self.mains, default=256))
        self.depth = max([v for k, v in values.items() if LAYERS.search(k) and isinstance(v, int)], default=0)
        chosen = self._layers(values)
        made = {name: self.value(name, value, values, chosen) for name, value in values.items()}
        defaults = {f.name: f.default for f in fields(config)}
        given = {n: v for n, v in made.items() if n in defaults and self._is_given(n, defaults[n], values[n])}
        if vars(config).get("_out_indices") is not None and len(config.stage_names) != self.depth + 1:
            given["out_indices"] = list(config.out_indices)
        for name in _sub_configs(config):
            given[name] = self.shrunk(getattr(config, name))
        self.main, self.depth = before
        return type(config)(**given)

    def _is_given(self, name: str, default: Any, value: Any) -> bool:
        """Is the field the caller's to set (the class has a value for it), or a list with an entry for each layer?"""
        return default is not None or (isinstance(value, (list, tuple)) and len(value) == self.depth > 2)

    def _layers(self, values: Mapping[str, Any]) -> list[int]:
        """Which layers stay: one of each kind that per-layer lists tell apart, then the first ones."""
        lists = [v for v in values.values() if isinstance(v, (list, tuple)) and len(v) == self.depth > 2]
        kinds: dict[tuple[str, ...], int] = {}
        for k in range(self.depth):
            kinds.setdefault(tuple(str(entries[k]) for entries in lists), k)
        first = sorted(kinds.values())[:4] if lists else []
        rest = [k for k in range(self.depth) if k not in first]
        return sorted(first + rest[: max(0, self.level.layers - len(first))])

    def value(self, name: str, value: Any, values: Mapping[str, Any], chosen: list[int]) -> Any:
        """What a field becomes."""
        if isinstance(value, (list, tuple)):
            return type(value)(self._entries(name, list(value), values, chosen))
        if isinstance(value, dict):
            return {k: self.value(k, v, values, chosen) if isinstance(k, str) else v for k, v in value.items()}
        if isinstance(value, bool) or not isinstance(value, int) or value <= 1:
            return value
        rule = next((rule for pattern, rule in RULES if pattern.search(name)), None)
        return value if rule is None else rule(self, value, {"name": name, "values": values, "layers": len(chosen)})

    def _entries(self, name: str, entries: list[Any], values: Mapping[str, Any], chosen: list[int]) -> list[Any]:
        """The entries of a list: of the layers that stay, indices of layers, or numbers like those of single fields."""
        if len(entries) == self.depth > 2:
            return [entries[k] for k in chosen]
        whole = bool(entries) and all(isinstance(e, int) and not isinstance(e, bool) for e in entries)
        if whole and re.search(r"ind(ex|ice)|idx|(_layers|_blocks|_layer)$", name) and self.depth > 2:
            return sorted({e * len(chosen) // self.depth if e >= 0 else max(e, -len(chosen)) for e in entries})
        if whole and "section" in name:
            return [
                max(1, e * 8 // sum(entries)) if not self.level.divisor else max(1, e // self.level.divisor)
                for e in entries
            ]
        if whole and re.search(r"depths|num_blocks|blocks_per_stage|_repeats|of_layers", name):
            return [min(e, self.level.layers) for e in entries]
        if whole and re.search(r"size|dim|channels|width|embed|hidden|filters|planes", name):
            large = 4 * max(1, self.level.divisor // 8) if self.level.divisor != 1 else 1
            skip = re.search(r"kernel|patch|image|window|stride|padding|feature_sizes|feat_sizes", name)
            return entries if skip else [e // large if e >= WIDE and e % large == 0 else e for e in entries]
        return [self.value(name, e, values, chosen) for e in entries]

    def width(self, value: int, _: Mapping[str, Any]) -> int:
        """A width: divided, or as many sixteenths as it has quarters of the main width."""
        if value < WIDE:
            return value
        if self.level.divisor:
            return max(4, value // self.level.divisor)
        quarters = 4 if value in self.mains else min(max(round(4 * value / self.main), 1), 8)
        return 16 * quarters

    def head_width(self, value: int, context: Mapping[str, Any]) -> int:
        """The width of a head: 16, or divided like other widths."""
        return min(value, 16) if not self.level.divisor else max(4, value * self.level.fewer // self.level.divisor)

    def heads(self, value: int, context: Mapping[str, Any]) -> int:
        """Heads: all of one number, KV heads half of that where they are fewer than the others."""
        if not self.level.heads:
            return max(value // self.level.fewer, 1)
        query = [v for k, v in context["values"].items() if re.search(r"heads?$", k) and isinstance(v, int)]
        fewer = "key_value" in context["name"] or "kv" in context["name"]
        return self.level.heads // 2 if fewer and value < max(query, default=value) else self.level.heads

    def depth_of(self, value: int, context: Mapping[str, Any]) -> int:
        """Layers: as many as were chosen where this is the number of all, else at most so many."""
        return min(value, context["layers"] if value == self.depth else self.level.layers)

    def share_of_layers(self, value: int, context: Mapping[str, Any]) -> int:
        """A layer's number or a number of some layers, in proportion."""
        return value * context["layers"] // self.depth if self.depth > 2 else value

    def token(self, value: int, context: Mapping[str, Any]) -> int:
        """The number of a special token: small ones stay, others are counted from the end of the vocabulary."""
        if value < WORDS // 2:
            return value
        return self.tokens.setdefault(value, WORDS - 1 - len(self.tokens) % (WORDS // 2))

    def side(self, value: int, context: Mapping[str, Any]) -> int:
        """The side of an image: so many patches."""
        patch = context["values"].get("patch_size")
        patch = patch if isinstance(patch, int) else 16
        return min(value, max(patch * self.level.patches, 64))

    def window(self, value: int, context: Mapping[str, Any]) -> int:
        """The side of a window of attention within an image: two patches where images are small."""
        return min(value, 2) if self.level.patches == LEVELS[0].patches else value


def at_most(limit: int) -> Callable[[Shrinker, int, Mapping[str, Any]], int]:
    return lambda shrinker, value, context: min(value, limit)


RULES: tuple[tuple[re.Pattern[str], Any], ...] = tuple(
    (re.compile(pattern), rule)
    for pattern, rule in (
        (r"_token_id$|_token_index$|_token$|(bos|eos|pad|sep|cls|unk|mask)_(token_)?id|_id$", Shrinker.token),
        (
            r"vocab(ulary)?(_size)?|codebook_size|num_embeddings|num_codevectors_per_group|entry_size|hash_size",
            at_most(WORDS),
        ),
        (r"kv_shared_layers|first_k_dense|layer_id$|start_layer|_at$", Shrinker.share_of_layers),
        (r"sparse_step|interval|frequency$|every_n|_every", at_most(2)),
        (r"per_tok|top_?k$|topk$|num_selected", at_most(2)),
        (r"n_group$|topk_group|expert_group", at_most(1)),
        (r"n_shared_experts|num_shared_experts", at_most(1)),
        (r"experts$|num_experts", at_most(4)),
        (r"queries|detection_tokens|proposals|num_denoising|latents$", at_most(8)),
        (r"codebooks|quantizers", at_most(4)),
        (r"max_source_positions", at_most(SOURCE_POSITIONS)),
        (
            r"positions?(_embeddings)?$|max_length|context_length|n_ctx|^block_size|max_\w*(tokens|length)",
            at_most(POSITIONS),
        ),
        (r"(image|img|input)_size$|^spatial_size", Shrinker.side),
        (r"sliding_window|^local_attention$", at_most(8)),
        (r"^window_size$|window_sizes?$", Shrinker.window),
        (r"(n_|num_)frames|frames_per", at_most(4)),
        (r"state_size|d_state|state_dim", at_most(16)),
        (r"feat_extract_layers|lstm_layers", at_most(99)),
        (r"head_dim|dim_head|d_kv|head_size|rotary_dim|head_width", Shrinker.head_width),
        (r"heads?$|n_heads|num_heads|num_attention_heads", Shrinker.heads),
        (LAYERS.pattern, Shrinker.depth_of),
        (
            r"patch|kernel|window|stride|pad|chunk|bins|num_channels|in_channels|groups|mel|factor|rate|ratio|steps?$",
            at_most(1 << 40),
        ),
        (
            r"size|dim|channel|width|d_model|d_ff|ffn|inner|rank|filters|n_embd|embd|units|proj|hidden|planes|intermediate",
            Shrinker.width,
        ),
    )
)


def plain(config: Any) -> dict[str, Any]:
    """The fields of a config that hold values, without its sub-configs."""
    skip = {"transformers_version", "architectures", "id2label", "label2id", "model_type", *_sub_configs(config)}
    declared = [f.name for f in fields(config) if f.init]
    held, mapped = vars(config), getattr(config, "attribute_map", {})
    found = {n: held.get(n, held.get(mapped.get(n))) for n in declared if n not in skip}
    return {n: value for n, value in found.items() if value is not None}


def _sub_configs(config: Any) -> list[str]:
    """The names of the fields that hold configs."""
    return [f.name for f in fields(config) if hasattr(vars(config).get(f.name), "to_diff_dict")]


def _mains(config: Any) -> list[int]:
    """The main widths of a config and all within it."""
    own = [v for k, v in plain(config).items() if MAIN.search(k) and type(v) is int and v >= WIDE]
    return own + [v for name in _sub_configs(config) for v in _mains(getattr(config, name))]


def shrink(config: Any, level: Level) -> Any:
    """A tiny config like `config`; raises whatever its class raises for numbers that don't fit one another."""
    return Shrinker(level).shrunk(config)
