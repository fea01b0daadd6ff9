"""Ctrl-C, or a request to end (SIGTERM), leaves a mark.

Libraries may swallow a KeyboardInterrupt or make another error of it, and the command must still stop.

Only the command listens; without it nothing here does anything. Imports nothing heavy, so that it is ready first.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CODE = 130
SENTENCE = "interrupted: nothing was written"
_ONE_PRESS = 1.0  # seconds: what comes sooner is the same wish, and must not stop the clearing up
_pressed: list[float] = []
_kept: list[tuple[Path, str]] = []


def listen() -> None:
    """From now on Ctrl-C and SIGTERM leave a mark and raise KeyboardInterrupt (not where the caller's shell has them ignored)."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _press)
        sys.unraisablehook = _unraisable
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _press)
        sys.unraisablehook = _unraisable


def _press(number: int, frame: Any) -> None:
    last = _pressed[-1] if _pressed else -_ONE_PRESS
    _pressed.append(time.monotonic())
    if _pressed[-1] - last >= _ONE_PRESS:
        raise KeyboardInterrupt


def _unraisable(problem: Any) -> None:
    """An interruption that arrives in a destructor can't be raised there: its mark is enough."""
    if not isinstance(problem.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(problem)


def happened() -> bool:
    """Was Ctrl-C pressed since `listen`?"""
    return bool(_pressed)


@contextmanager
def keeping(path: Path, what: str) -> Iterator[None]:
    """Within, an interruption leaves something behind, which `what` says, as soon as there is a file at `path`."""
    entry = path, what
    _kept.append(entry)
    try:
        yield
    except BaseException as error:
        if not (_pressed or isinstance(error, KeyboardInterrupt)):
            _kept.remove(entry)
        raise
    _kept.remove(entry)


def sentence() -> str:
    """What to say of an interruption; what is kept is said once."""
    path, what = _kept.pop() if _kept else (None, "")
    return f"interrupted: {what}" if path is not None and path.exists() else SENTENCE


def check() -> None:
    """Raise KeyboardInterrupt if one was swallowed: called between steps, and before anything is moved into place."""
    if _pressed:
        raise KeyboardInterrupt


def finish() -> None:
    """All is done: Ctrl-C comes too late and changes nothing."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is _press:
            signal.signal(number, signal.SIG_IGN)
