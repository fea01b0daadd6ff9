"""Transforms of torch.func (`vmap`, `grad`) that torch's exporter enters when it runs a captured program, and leaves open when it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch._C import _functorch


@contextmanager
def transforms_ended() -> Iterator[None]:
    """Afterwards no more transforms are at work than before: every later call of torch would be within them."""
    depth = _open()
    try:
        yield
    finally:
        while _open() > depth:
            _functorch.pop_dynamic_layer_stack()


def _open() -> int:
    return len(_functorch.get_interpreter_stack() or ())
