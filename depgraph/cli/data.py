"""A text file as calibration batches and held-out batches of a language model, and the perplexity on the latter."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from depgraph.capture.capturing import quiet
from depgraph.cli.models import Loaded
from depgraph.errors import DataError

WINDOWS_A_BATCH = 4
HELD_OUT_SHARE, HELD_OUT_BATCHES = 0.1, 8
LONGEST = 1 << 23
MASKED_SHARE, IGNORED = 0.15, -100
LARGEST_LOSS = 700.0  # whose exp is still a number

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Amount:
    """How much of a text is used: calibration batches, tokens in a window; `seed` draws the windows."""

    batches: int = 16
    length: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class TextData:
    """Batches to score with, and batches from the end of the text to measure on (none where the text is short)."""

    calibration: list[Batch]
    held_out: list[Batch]

    @property
    def held_out_tokens(self) -> int:
        return sum(batch["input_ids"].numel() for batch in self.held_out)


def read_text(path: Path) -> str:
    """The first 8 MB of a text file; raises DataError when it can't be read or says nothing."""
    try:
        with path.open("rb") as file:
            text = file.read(LONGEST).decode("utf-8", errors="strict" if path.stat().st_size <= LONGEST else "ignore")
    except OSError as error:
        raise DataError(f"the data file {path} can't be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"the data file {path} isn't UTF-8 text (byte {error.start}): give plain text") from error
    if not text.strip():
        raise DataError(f"the data file {path} is empty: give text to score with")
    return text


def text_data(loaded: Loaded, path: Path, text: str, amount: Amount) -> TextData:
    """The text as batches for this model.

    Raises DataError: the model takes no text, there is no tokenizer, or the text is shorter than one window.
    """
    make = _kind(loaded)
    length = _length(loaded.model, amount.length)
    windows = _windows(loaded, path, text, length)
    random = torch.Generator().manual_seed(amount.seed)
    aside = int(len(windows) * HELD_OUT_SHARE) if len(windows) >= 2 * WINDOWS_A_BATCH else 0
    train, held_out = windows[: len(windows) - aside], windows[len(windows) - aside :]
    chosen = train[torch.randperm(len(train), generator=random)[: amount.batches * WINDOWS_A_BATCH]]
    held_out = held_out[: HELD_OUT_BATCHES * WINDOWS_A_BATCH]

    def batched(some: Tensor) -> list[Batch]:
        parts = some.split(WINDOWS_A_BATCH) if len(some) else ()
        return [_moved(make(loaded, part, random), next(loaded.model.parameters()).device) for part in parts]

    return TextData(batched(chosen), batched(held_out))


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def perplexity(model: nn.Module, batches: Iterable[Batch], like: nn.Module) -> float:
    """exp of the mean loss over batches of equal windows, in eval mode without gradients, of `like` or a form of it."""
    from importance.calling import loss_of_form

    total = count = 0.0
    with quiet(model), torch.no_grad():
        for batch in batches:
            size = len(batch["input_ids"])
            total += float(loss_of_form(like, model, batch, None)) * size
            count += size
    return math.exp(min(total / count, LARGEST_LOSS))


def _causal(loaded: Loaded, windows: Tensor, random: torch.Generator) -> Batch:
    return {"input_ids": windows}


def _sequence_to_sequence(loaded: Loaded, windows: Tensor, random: torch.Generator) -> Batch:
    """The second half of every window is to be told from the first."""
    half = windows.shape[1] // 2
    labels = windows[:, half:].contiguous()
    shifted = getattr(loaded.model, "prepare_decoder_input_ids_from_labels", None)
    begun = {} if shifted is None else {"decoder_input_ids": shifted(labels=labels)}
    return {"input_ids": windows[:, :half].contiguous(), **begun, "labels": labels}


def _masked(loaded: Loaded, windows: Tensor, random: torch.Generator) -> Batch:
    """Every seventh token or so is masked and to be told from the others."""
    hidden = torch.rand(windows.shape, generator=random) < MASKED_SHARE
    hidden[:, windows.shape[1] // 2] = True
    return {
        "input_ids": windows.masked_fill(hidden, loaded.tokenizer.mask_token_id),
        "labels": windows.masked_fill(~hidden, IGNORED),
    }


def _kind(loaded: Loaded) -> Callable[[Loaded, Tensor, torch.Generator], Batch]:
    """How a model of this kind is asked to tell tokens."""
    model, name = loaded.model, type(loaded.model).__name__
    advice = "give file.py:function, whose dict has the 'batches' to score with"
    if loaded.tokenizer is None:
        raise DataError(f"--data needs a tokenizer and {name} came without: put its files into the folder, or {advice}")
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise DataError(f"--data is for models that read text and {name} reads {model.main_input_name}: {advice}")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return _sequence_to_sequence
    generates = getattr(model, "can_generate", lambda: True)
    if generates():
        return _causal
    tells = getattr(model, "get_output_embeddings", lambda: None)() is not None
    if tells and loaded.tokenizer.mask_token_id is not None and "labels" in inspect.signature(model.forward).parameters:
        return _masked
    raise DataError(f"--data is for language models, and {name} doesn't predict tokens: {advice}")


def _length(model: nn.Module, asked: int | None) -> int:
    config = getattr(model, "config", None)
    text_config = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else None
    limit = getattr(text_config, "max_position_embeddings", None)
    if asked is not None and limit and asked > limit:
        raise DataError(f"--length {asked} is more than the {limit} positions of {type(model).__name__}")
    return asked if asked is not None else min(128, limit or 128)


def _windows(loaded: Loaded, path: Path, text: str, length: int) -> Tensor:
    """The text's tokens in windows [number, length]."""
    tokens = torch.tensor(loaded.tokenizer.encode(text, add_special_tokens=False, verbose=False))
    if len(tokens) < length:
        raise DataError(
            f"the data file {path} has {len(tokens)} tokens, fewer than one window of {length}: "
            "give more text or a smaller --length"
        )
    known, largest = _vocabulary(loaded.model), int(tokens.max())
    if known is not None and largest >= known:
        raise DataError(f"the tokenizer gives token {largest} and the model knows {known}: they don't belong together")
    return tokens[: len(tokens) // length * length].view(-1, length)


def _vocabulary(model: nn.Module) -> int | None:
    """How many tokens the model's input embedding has."""
    get: Any = getattr(model, "get_input_embeddings", None)
    return getattr(get(), "num_embeddings", None) if get is not None else None


class Measured(NamedTuple):
    """Perplexities before and after, None without held-out text, and why there is none though there was a text."""

    figures: dict[str, float] | None = None
    why: str = ""

    @property
    def lines(self) -> list[str]:
        """The same, as the command says it."""
        if self.figures is None:
            return [self.why] if self.why else []
        change = f"{self.figures['before']:.3f} -> {self.figures['after']:.3f}"
        return [f"perplexity on {self.figures['tokens']:,} held-out tokens: {change}"]


def measured(dense: nn.Module, model: nn.Module, found: TextData) -> Measured:
    """The perplexity of a dense and a pruned model on held-out text.

    A graph in the place of a module may fail on sizes other than those that it was captured with; then it says so. Raises
    DataError where a module fails.
    """
    if not found.held_out:
        return Measured()
    try:
        after = perplexity(model, found.held_out, dense)
    except Exception as error:
        if not isinstance(model, GraphModule):
            raise
        shape = "x".join(map(str, found.held_out[0]["input_ids"].shape))
        reason = " ".join(str(error).split())
        return Measured(
            why=f"perplexity wasn't measured, as the graph form can't take the text's batches of {shape} tokens: {reason}"
        )
    before = perplexity(dense, found.held_out, dense)
    return Measured({"before": before, "after": after, "tokens": found.held_out_tokens})
