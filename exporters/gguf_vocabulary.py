"""A tokenizer of transformers as a GGUF file tells it: tokens in order, what kind each is, and how text is cut into them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from depgraph.errors import ExportError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens, as the format numbers them."""

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")

SPLITS = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
"""llama.cpp's names for ways of cutting text into words, by the pattern that a tokenizer says it cuts by."""


@dataclass(frozen=True)
class Vocabulary:
    """What a file says about its tokenizer.

    `kind` is "llama" (pieces joined by score, bytes where there is none) or "gpt2" (bytes joined by merges); `ids` has those of
    special tokens by name, `flags` says what is added to a text.
    """

    kind: str
    split: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    ids: Mapping[str, int] = field(default_factory=dict)
    flags: Mapping[str, bool] = field(default_factory=dict)
    template: str = ""


def vocabulary(tokenizer: Any, rows: int, split: str = "") -> Vocabulary:
    """What to say about a tokenizer; rows of the embedding that have no token get one that is never used.

    Args:
        tokenizer: A fast tokenizer of transformers, or a folder that holds one.
        rows: How many tokens the model has.
        split: llama.cpp's name for how text is cut into words, where the tokenizer's own way isn't known here.

    Raises:
        ExportError: It is of another kind than the two, its way of cutting isn't known, or it has more tokens than the model.
    """
    tokenizer = _loaded(tokenizer)
    if not getattr(tokenizer, "is_fast", False):
        raise ExportError(
            f"{type(tokenizer).__name__} is no fast tokenizer of transformers, which GGUF's are made from."
        )
    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(tokens) >= rows:
        raise ExportError(
            f"The tokenizer has {max(tokens) + 1} tokens, the model {rows}: give the tokenizer that the model was made with, or "
            "none (a pruned vocabulary has no tokenizer that GGUF can hold)."
        )
    model = facts["model"]
    if model.get("type") != "BPE":
        raise ExportError(f"GGUF's Llama-like models have a tokenizer of kind BPE, this one is {model.get('type')}.")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    names = tuple(tokens.get(number, f"[PAD{number}]") for number in range(rows))
    common: dict[str, Any] = {
        "tokens": names,
        "kinds": tuple(_kind(tokens.get(number), number, facts) for number in range(rows)),
        "ids": _special_ids(tokenizer),
        "template": tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else "",
    }
    flags = _added(tokenizer)
    if model.get("byte_fallback"):
        scores = _scores(names, merges)
        return Vocabulary(
            "llama", "default", scores=scores, flags={**flags, "add_space_prefix": _prefixes(facts)}, **common
        )
    return Vocabulary("gpt2", split or _split(facts), merges=tuple(merges), flags=flags, **common)


def _loaded(tokenizer: Any) -> Any:
    if not isinstance(tokenizer, (str, os.PathLike)):
        return tokenizer
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ExportError(f"{os.fspath(tokenizer)} holds no tokenizer that transformers loads.") from error


def _kind(token: str | None, number: int, facts: Mapping[str, Any]) -> int:
    if token is None:
        return UNUSED
    if token == facts["model"].get("unk_token"):
        return UNKNOWN
    added = {entry["id"]: entry["special"] for entry in facts["added_tokens"]}
    if number in added:
        return CONTROL if added[number] else USER_DEFINED
    return BYTE if facts["model"].get("byte_fallback") and _BYTE.fullmatch(token) else NORMAL


def _special_ids(tokenizer: Any) -> dict[str, int]:
    found = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")}
    return {name: number for name, number in found.items() if number is not None}


def _added(tokenizer: Any) -> dict[str, bool]:
    """Which special tokens the tokenizer puts around a text."""
    ids = tokenizer("a").input_ids
    ends = {"bos": ids[0], "eos": ids[-1]}
    return {f"add_{n}_token": getattr(tokenizer, f"{n}_token_id") == number for n, number in ends.items()}


def _scores(tokens: tuple[str, ...], merges: list[str]) -> tuple[float, ...]:
    """The earlier a token is merged, the higher its score; what no merge makes has the lowest."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return tuple(-float(ranks.get(token, len(merges))) for token in tokens)


def _steps(part: Mapping[str, Any] | None, several: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    return list(part[several]) if part["type"] == "Sequence" else [part]


def _prefixes(facts: Mapping[str, Any]) -> bool:
    """Does the tokenizer put a space before a text?"""
    before = _steps(facts["normalizer"], "normalizers")
    words = _steps(facts["pre_tokenizer"], "pretokenizers")
    return any(step["type"] == "Prepend" for step in before) or any(
        step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in words
    )


def _split(facts: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer of bytes cuts text into words."""
    steps = _steps(facts["pre_tokenizer"], "pretokenizers")
    own = [step["pattern"].get("Regex", "") for step in steps if step["type"] == "Split"]
    built_in = any(step["type"] == "ByteLevel" and step.get("use_regex", True) for step in steps)
    patterns = own or ([SPLITS["gpt-2"]] if built_in else [])
    for name, pattern in SPLITS.items():
        if patterns == [pattern]:
            return name
    raise ExportError(
        "The tokenizer cuts text into words in a way that isn't known here: give llama.cpp's name for it as "
        'GgufOptions(split="...").'
    )
