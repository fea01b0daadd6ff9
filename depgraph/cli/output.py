"""What the command prints and where: results on stdout, progress and errors on stderr, exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from safetensors import SafetensorError

from depgraph import errors, interruption
from depgraph.storage import appearing

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
    if isinstance(error, errors.DepgraphError) and isinstance(error.__cause__, (OSError, SafetensorError)):
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


class _Paper(Console):
    """A console that says when its reader is gone, where rich would end the process."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


@contextlib.contextmanager
def printing() -> Iterator[Console]:
    """A console on stdout; what others print there meanwhile goes to stderr, so that JSON stays alone."""
    narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = _Paper(file=sys.stdout, width=None if narrow else WIDTH)
    with _descriptor_on_stderr(), contextlib.redirect_stdout(sys.stderr):
        yield console


@contextlib.contextmanager
def _descriptor_on_stderr() -> Iterator[None]:
    """Meanwhile, what isn't written by Python goes to stderr too, where stdout and stderr are files of the system."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ValueError):
            out, errors_to = sys.stdout.fileno(), sys.stderr.fileno()
            sys.stdout.flush()
            kept = os.dup(out)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, out)
            os.dup2(errors_to, out)
        yield


@contextlib.contextmanager
def showing() -> Iterator[None]:
    """Prints results: a reader that went away has seen enough; raises CheckpointError where stdout can't be written."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # or the interpreter fails to flush at its end
        if not isinstance(error, BrokenPipeError):
            raise errors.CheckpointError(
                f"the results can't be printed: {error.strerror or error}; make room there (what --out names is written)"
            ) from error


def print_json(data: dict[str, Any], console: Console) -> None:
    print(json.dumps(data, indent=1), file=console.file)


def check_vacant(folder: Path) -> None:
    """Raise CheckpointError unless a folder of that name can be made (it may be there if it is empty)."""
    if folder.is_dir() and any(folder.iterdir()):
        raise errors.CheckpointError(f"the folder {folder} exists and isn't empty: name another with --out")
    if folder.exists() and not folder.is_dir():
        raise errors.CheckpointError(f"{folder} is a file: name a folder with --out")


@contextlib.contextmanager
def new_folder(out: Path | None) -> Iterator[Path | None]:
    """A folder that takes the name `out` at the end, or none without a name; errors speak of it by that name."""
    if out is None:
        yield None
        return
    with appearing(out.resolve()) as folder:
        try:
            yield folder
        except errors.DepgraphError as error:
            if str(folder) not in str(error):
                raise
            raise type(error)(str(error).replace(str(folder), str(out))) from error.__cause__
