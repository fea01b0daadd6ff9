"""What an export changes on a model for a while (train/eval state, transformers' settings), and puts back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_SETTINGS = ("use_cache", "_attn_implementation", "_experts_implementation")


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore every submodule's train/eval flag and every config's settings on leaving, whatever happened."""
    flags = [(module, module.training) for module in model.modules()]
    settings = [(c, key, getattr(c, key)) for c in _configs(model) for key in _SETTINGS if hasattr(c, key)]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
        for config, key, value in settings:  # parents come first: setting theirs sets their children's
            setattr(config, key, value)


def _configs(model: nn.Module) -> list[Any]:
    """Every distinct configuration object in the model, outer ones first."""
    found: list[Any] = []

    def add(config: Any) -> None:
        if not hasattr(config, "to_dict") or any(config is other for other in found):
            return
        found.append(config)
        for value in vars(config).values():
            add(value)

    for module in model.modules():
        add(getattr(module, "config", None))
    return found


def without_cache(model: nn.Module) -> None:
    """Tell decoders not to return their key-value cache: it is no output of a one-shot graph."""
    for config in _configs(model):
        if getattr(config, "use_cache", False):
            config.use_cache = False


_OFFERS = (
    ("experts", "batched_mm", "experts run as one batched product, because the model's own way did not export"),
    ("attn", "eager", "attention is written out (eager), because the model's own kernel did not export"),
)


def alternatives(model: nn.Module) -> Iterator[str]:
    """Switch to other implementations of the same computation that transformers offers, one on top of the other.

    Yields a sentence for the report after each switch that changed something. Use it within `preserved`.
    """
    for kind, value, note in _OFFERS:
        setter = next(filter(None, (getattr(m, f"set_{kind}_implementation", None) for m in model.modules())), None)
        if setter is None:  # neither the model nor what it wraps has one
            continue
        before = _implementations(model, kind)
        setter(value)
        if _implementations(model, kind) != before:
            yield note


def one_by_one(model: nn.Module) -> bool:
    """Do experts run in a loop over those that are chosen, as transformers' eager implementation has it?"""
    return "eager" in _implementations(model, "experts")


def _implementations(model: nn.Module, kind: str) -> list[str | None]:
    return [getattr(config, f"_{kind}_implementation", None) for config in _configs(model)]
