"""CPU seconds and peak memory of phases of one process."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

Phases = dict[str, dict[str, float]]


def _status(field: str) -> float:
    """A memory field of this process in MB; NaN where the system has no /proc."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
    return float("nan")


def resident() -> float:
    """Memory that this process holds now, in MB."""
    return _status("VmRSS")


def give_back_freed() -> None:
    """Let the system have what was freed (glibc; elsewhere nothing happens), so that what is held is what is used."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> None:
    """Let the peak start anew from what is held now (Linux; elsewhere peaks only grow)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Stopwatch:
    """Measures phases: CPU seconds of all threads, and the highest resident memory during the phase, in MB."""

    def __init__(self) -> None:
        self.phases: Phases = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what runs within; a phase that is entered again adds its time."""
        reset_peak()
        start = time.process_time()
        yield
        spent = time.process_time() - start
        before = self.phases.get(name, {"cpu": 0.0, "peak": 0.0})
        self.phases[name] = {"cpu": before["cpu"] + spent, "peak": max(before["peak"], _status("VmHWM"))}


def seconds(call: Callable[[], Any], times: int = 5) -> float:
    """The median CPU seconds of a call, after one call to warm up."""
    call()
    found = []
    for _ in range(times):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return statistics.median(found)


def forward_seconds(model: nn.Module, args: tuple[torch.Tensor, ...]) -> float:
    """The median CPU seconds of a forward pass without gradients."""
    with torch.no_grad():
        return seconds(lambda: model(*args))


def parameters(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def tiny() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A model to warm a tool up with: what is imported on the first use isn't counted as pruning."""
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), (torch.ones(2, 8),)
