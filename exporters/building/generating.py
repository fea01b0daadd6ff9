"""The files of a language model that generate: a decoder with its cache, or an encoder and a decoder, seen to do as `generate()` does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from depgraph.errors import ExportError
from exporters.building.asked import Subject
from exporters.building.file_model import DecoderFile, EncoderDecoderFiles, FileModel
from exporters.building.precisions import file_bytes
from exporters.encoder_decoder import DECODER, ENCODER, to_encoder_decoder_onnx
from exporters.genai import MODEL, GenaiOptions, to_genai
from exporters.onnx_export import OnnxOptions
from exporters.quantising import QuantOptions, quantise_in_place

GENAI, TWO = "genai", "seq2seq"
SETTINGS = "settings.json"
_PROMPTS = 4


@dataclass(frozen=True)
class Kind:
    """A way to generate: the folder, its files and what each is, the script that runs them, how they are written, what stands for them.

    `write(model, subject, folder, precision, opset)` gives notes; `stand_in(folder, model)` computes with the files what the model does.
    """

    folder: str
    files: Mapping[str, str]
    script: str
    write: Callable[[nn.Module, Subject, Path, str, int], tuple[str, ...]]
    stand_in: Callable[[Path, nn.Module], FileModel]

    def bytes(self, folder: Path) -> int:
        """Bytes of all its files, which run together."""
        return sum(file_bytes(folder / name) for name in self.files)

    @property
    def needs_tokenizer(self) -> bool:
        """Can the script do nothing without one?"""
        return self.folder == GENAI

    @property
    def named(self) -> str:
        """Its files, as a sentence names them."""
        return " and ".join(f"{self.folder}/{name}" for name in self.files)


def kind_of(model: nn.Module, subject: Subject) -> Kind | None:
    """How a model generates; None where it doesn't, or nothing says how its tokens are read."""
    if not getattr(model, "can_generate", lambda: False)():
        return None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return _TWO if encoder_inputs(subject) else None
    return _ONE if subject.tokenizer is not None and "input_ids" in subject.kwargs else None


@dataclass(frozen=True)
class Generated:
    """Files that were made: their kind and folder, all their bytes, what to say; `why` there are none, and 0 bytes then."""

    kind: Kind
    folder: Path
    bytes: int = 0
    why: str = ""
    notes: tuple[str, ...] = ()


def generated(model: nn.Module, subject: Subject, folder: Path, how: tuple[str, int]) -> Generated | None:
    """Write the files with which a model generates into a new folder, in a precision and at an opset; None for one that doesn't."""
    kind = kind_of(model, subject)
    if kind is None:
        return None
    try:
        notes = kind.write(model, subject, folder, *how)
    except ExportError as error:
        return Generated(kind, folder, why=f"no folder for generating text was made: {error}")
    return Generated(kind, folder, kind.bytes(folder), notes=notes)


def quality_of(kind: Kind, folder: Path, model: nn.Module, subject: Subject) -> tuple[float | None, str]:
    """The figure of quality of the files in a folder, and why it isn't known."""
    try:
        return subject.measure(kind.stand_in(folder, model)), ""
    except Exception as error:
        return None, f"quality of {kind.named} wasn't measured, as these couldn't be run in the model's place ({error})"


def encoder_inputs(subject: Subject) -> dict[str, torch.Tensor]:
    """What the encoder takes of the example: all but the decoder's."""
    given = {name: value for name, value in subject.kwargs.items() if isinstance(value, torch.Tensor)}
    return {name: value for name, value in given.items() if not name.startswith("decoder_") and name != "labels"}


def _decoder(model: nn.Module, subject: Subject, folder: Path, precision: str, opset: int) -> tuple[str, ...]:
    fewer = None if precision == "float32" else QuantOptions(precision)  # type: ignore[arg-type]
    found = [b["input_ids"] for b in subject.batches or () if isinstance(b, dict) and "input_ids" in b][:_PROMPTS]
    prompt = found[0] if found else subject.kwargs["input_ids"]
    options = GenaiOptions(OnnxOptions(opset=opset, dtype="float32", record="costs"), fewer, data=found or None)
    to_genai(model, subject.tokenizer, folder, prompt, options=options)
    return ()


def _encoder_decoder(model: nn.Module, subject: Subject, folder: Path, precision: str, opset: int) -> tuple[str, ...]:
    options = OnnxOptions(opset=opset, dtype="float32", record="costs")
    made = to_encoder_decoder_onnx(model, encoder_inputs(subject), folder, options=options)
    if precision != "float32":
        stand_in = EncoderDecoderFiles(folder, model)
        for name, data in zip((ENCODER, DECODER), stand_in.feeds(subject.kwargs), strict=True):
            quantise_in_place(folder / name, [data], options=QuantOptions(precision))  # type: ignore[arg-type]
    settings, left = run_settings(model, made.start)
    (folder / SETTINGS).write_text(json.dumps(settings) + "\n")
    if hasattr(subject.tokenizer, "save_pretrained"):
        subject.tokenizer.save_pretrained(folder)
    return (*made.notes, *left)


_SAID = {"forced_bos_token_id": "first", "suppress_tokens": "never", "begin_suppress_tokens": "not_first"}
_USUAL = (
    ("num_beams", 1),
    ("do_sample", False),
    ("no_repeat_ngram_size", 0),
    ("repetition_penalty", 1.0),
    ("bad_words_ids", None),
    ("forced_eos_token_id", None),
    ("min_length", 0),
    ("min_new_tokens", None),
)


def run_settings(model: nn.Module, start: int) -> tuple[dict[str, list[int]], tuple[str, ...]]:
    """What run.py needs to generate as `generate()` does, token ids by what they are for, and notes on what it leaves out."""
    said = getattr(model, "generation_config", None)
    settings = {"start": [start], "ends": _ids(getattr(said, "eos_token_id", None))}
    settings |= {name: _ids(getattr(said, option, None)) for option, name in _SAID.items()}
    from transformers import GenerationMixin

    notes = []
    if getattr(type(model), "generate", None) is not GenerationMixin.generate:
        notes.append(
            f'generate() of {type(model).__name__} begins in a way of its own, run.py with the tokens under "start" in '
            f"{TWO}/{SETTINGS}: put those of your task there"
        )
    other = [
        f"{name}={getattr(said, name)}" for name, usual in _USUAL if getattr(said, name, usual) not in (usual, None)
    ]
    if other:
        notes.append(f"run.py takes the likeliest token each time, where the model asks for {', '.join(other)}")
    return settings, tuple(notes)


def _ids(given: int | list[int] | None) -> list[int]:
    return [] if given is None else [given] if isinstance(given, int) else list(given)


_ONE = Kind(
    GENAI, {MODEL: "with its cache"}, "run_text.py", _decoder, lambda folder, model: DecoderFile(folder / MODEL, model)
)
_PAIR = {ENCODER: "the encoder, run once", DECODER: "the decoder, with its cache"}
_TWO = Kind(TWO, _PAIR, "run_pairs.py", _encoder_decoder, EncoderDecoderFiles)


__all__ = ["Generated", "Kind", "encoder_inputs", "generated", "kind_of", "quality_of"]
