"""The integers of a transformers config, and what the class builds from the config when some of them are changed.

Nothing is known of any architecture: what an integer does is found out by building the model on the meta device. A config
counts only as it comes back from its own JSON and if it passes its own validation, since that is how it will be loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from depgraph.cutting.building import built, checked, undisturbed
from depgraph.cutting.record import attention_of, cuts, library_class, original_config

Place = tuple[str, ...]
Edits = Mapping[Place, int]
Shapes = dict[str, tuple[int, ...]]


class Configs:
    """The configs near that of a model, and the shapes of the parameters and saved buffers that they build.

    `integers` are the integers of the config by place (names of attributes and positions in lists), `unset` the places that
    hold nothing, or that the class asks for and the config doesn't have.
    """

    def __init__(self, model: nn.Module) -> None:
        self.kind = type(model)
        self.attention = attention_of(model.config)
        self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self.config = edited(original_config(model), recorded_edits(model))
        self.integers: dict[Place, int] = {}
        self.unset: list[Place] = []
        for place, value in _walk(self.config, ()):
            if value is None:
                self.unset.append(place)
            else:
                self.integers[place] = value
        self._known: dict[frozenset[tuple[Place, int]], Shapes | None] = {}
        self.unset += sorted({(name,) for name in self._asked_for()} - set(self.unset))

    @property
    def builds(self) -> int:
        """How many configs were tried so far."""
        return len(self._known)

    def shapes(self, edits: Edits) -> Shapes | None:
        """The shapes that the config builds with `edits` made; None where it is refused."""
        key = frozenset(edits.items())
        if key not in self._known:
            try:
                self._known[key] = shapes_of(self._outline(edits))
            except Exception:
                self._known[key] = None
        return self._known[key]

    def _outline(self, edits: Edits) -> nn.Module:
        """The same as `model` on the meta device, without the way through JSON, which takes most of the time."""
        with undisturbed("meta", self.dtype):
            config = edited(self.config, edits)
            return checked(self.kind, type(config)(**config.to_dict()), self.attention)

    def model(self, edits: Edits, device: str) -> nn.Module:
        """The model, with weights that nothing initialised; raises what transformers raises."""
        return built(self.kind, edited(self.config, edits), self.attention, device, self.dtype)

    def _asked_for(self) -> set[str]:
        """Names that the class looks up in its config in vain: settings that it would obey."""
        asked: set[str] = set()
        watched = copy.deepcopy(self.config)
        above = type(watched)

        def missing(self: Any, name: str) -> Any:
            asked.add(name)
            raise AttributeError(name)

        try:
            watched.__class__ = type(above.__name__, (above,), {"__getattr__": missing})
            with undisturbed("meta", self.dtype):
                self.kind(watched)
        except Exception:
            return set()
        return {name for name in asked if not name.startswith("_")}


def recorded_edits(model: nn.Module) -> dict[Place, int]:
    """What the plans of earlier cuts changed in the config of a model."""
    found: dict[Place, int] = {}
    for cut in cuts(getattr(model, "depgraph_record", None)):
        found.update({tuple(name.split(".")): int(value) for name, value in cut.get("config", {}).items()})
    return found


def of_library(model: nn.Module) -> bool:
    """Is the model one whose class transformers builds from a config?"""
    return bool(library_class(model))


def edited(config: Any, edits: Edits) -> Any:
    """A copy of a config with other integers at some places."""
    trial = copy.deepcopy(config)
    for place, value in edits.items():
        holder = trial
        for name in place[:-1]:
            holder = holder[int(name)] if isinstance(holder, list) else getattr(holder, name)
            if isinstance(holder, tuple):
                holder = _as_list(trial, place)
        if isinstance(holder, list):
            holder[int(place[-1])] = value
        else:
            setattr(holder, place[-1], value)
    return trial


def _as_list(config: Any, place: Place) -> list[int]:
    """Put a list where a config has a tuple, so that it can be changed."""
    holder = config
    for name in place[:-2]:
        holder = getattr(holder, name)
    values = list(getattr(holder, place[-2]))
    setattr(holder, place[-2], values)
    return values


def shapes_of(model: nn.Module) -> Shapes:
    """Shapes of all that a checkpoint of the model holds."""
    return {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)
    }


def _walk(config: Any, before: Place) -> Iterator[tuple[Place, int | None]]:
    for name, value in sorted(vars(config).items()):
        place = (*before, name)
        if name.startswith("_") or isinstance(value, bool):
            continue
        if value is None or isinstance(value, int):
            yield place, value
        elif isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
            yield from (((*place, str(k)), v) for k, v in enumerate(value))
        elif hasattr(value, "to_diff_dict"):
            yield from _walk(value, place)
