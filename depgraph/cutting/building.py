"""A model of transformers as its config builds it."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from depgraph.cutting.record import Attention


def built(kind: type, config: Any, attention: Attention, device: str, dtype: torch.dtype) -> nn.Module:
    """The model of a config as it comes back from its JSON; raises whatever the config or the class refuses it with."""
    with undisturbed(device, dtype):
        again = type(config).from_dict(with_floats(json.loads(config.to_json_string(use_diff=True))))
        return checked(kind, again, attention)


def with_floats(data: Any) -> Any:
    """JSON as transformers writes it, with infinity and NaN as `{"__float__": "Infinity"}`, with those as numbers."""
    if isinstance(data, dict):
        return (
            float(data["__float__"]) if data.keys() == {"__float__"} else {k: with_floats(v) for k, v in data.items()}
        )
    return [with_floats(item) for item in data] if isinstance(data, list) else data


def checked(kind: type, config: Any, attention: Attention) -> nn.Module:
    """The model of a config, in eval mode, if the config passes its own validation."""
    getattr(config, "validate", lambda: None)()
    if attention:
        config._attn_implementation = attention
    model: nn.Module = kind(config)
    return model.eval()


@contextmanager
def undisturbed(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Build on `device` without initialising anything, without warnings, and with the random state kept."""
    from transformers import initialization

    before, disabled = torch.get_default_dtype(), logging.root.manager.disable
    with ExitStack() as stack:
        stack.callback(logging.disable, disabled)
        stack.callback(torch.set_default_dtype, before)
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.device(device))
        stack.enter_context(initialization.no_init_weights())
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        torch.set_default_dtype(dtype)
        yield
