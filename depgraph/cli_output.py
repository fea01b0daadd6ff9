"""What the command prints and where: results on stdout, progress and errors on stderr, exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Sized
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from depgraph import errors, interruption

WIDTH = 160  # of tables that go into a file or a pipe
CODES: dict[int, str] = {
    0: "done",
    1: "an unexpected error (a bug: run again with --debug)",
    2: "bad usage or input",
    3: "the model can't be captured or cut, or has nothing to prune",
    4: "the target can't be met",
    5: "the check failed: the pruned model isn't right",
    6: "the ONNX file can't be made or doesn't agree",
    7: "file trouble: unreadable, exists already, disk full",
    interruption.CODE: "interrupted",
}
_BY_ERROR: tuple[tuple[type[BaseException], int], ...] = (
    (errors.TargetError, 4),
    (errors.CheckError, 5),
    (errors.ExportError, 6),
    (errors.CheckpointError, 7),
    (errors.CaptureError, 3),
    (errors.UnsupportedOperator, 3),
    (errors.UnsupportedParameter, 3),
    (errors.NothingToPrune, 3),
    (errors.CutError, 3),
    (errors.DepgraphError, 2),
    (OSError, 7),
)


def exit_code(error: BaseException) -> int:
    """The exit code of an error; one caused by a file is file trouble whatever it stopped."""
    if isinstance(error, errors.DepgraphError) and isinstance(error.__cause__, OSError):
        return 7
    return next((code for kind, code in _BY_ERROR if isinstance(error, kind)), 1)


def show_error(error: BaseException, debug: bool = False) -> int:
    """Print an error as one sentence on stderr (with its traceback to debug) and return its exit code."""
    code = exit_code(error)
    if debug:
        traceback.print_exception(error)
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError):
        text = f"{error.filename or 'a file'}: {error.strerror or text}"
    elif code == 1:
        text = f"unexpected {type(error).__name__}: {text} (run again with --debug for the traceback)"
    say(f"error: {text}")
    return code


def say(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr)


class Steps:
    """Progress on stderr, shown where that is a terminal: a spinner for a step, a bar where the number is known."""

    def __init__(self) -> None:
        self.console = Console(file=sys.stderr)
        shown = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self.progress = Progress(*shown, console=self.console, transient=True, disable=not self.console.is_terminal)

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        task = self.progress.add_task(what, total=None)
        self.progress.start()
        try:
            yield
            interruption.check()
        finally:
            self.progress.remove_task(task)
            if not self.progress.tasks:
                self.progress.stop()

    def over(self, batches: Iterable[Any], what: str) -> Iterable[Any]:
        """The same batches, counted while they are taken."""
        return _Counted(self.progress, batches, what)


class _Counted:
    def __init__(self, progress: Progress, batches: Iterable[Any], what: str) -> None:
        self.progress, self.batches, self.what = progress, batches, what

    def __iter__(self) -> Iterator[Any]:
        total = len(self.batches) if isinstance(self.batches, Sized) else None
        task = self.progress.add_task(self.what, total=total)
        try:
            for batch in self.batches:
                yield batch
                self.progress.advance(task)
        finally:
            self.progress.remove_task(task)


@contextlib.contextmanager
def printing(as_json: bool) -> Iterator[Console]:
    """A console on stdout; what others print there meanwhile goes to stderr, so that JSON stays alone."""
    narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(file=sys.stdout, width=None if narrow else WIDTH)
    with contextlib.redirect_stdout(sys.stderr):
        yield console


def print_json(data: dict[str, Any], console: Console) -> None:
    print(json.dumps(data, indent=1), file=console.file)
