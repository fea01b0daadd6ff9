"""Single files that appear whole or not at all, and the names that things have until then."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from depgraph import interruption
from depgraph.errors import CheckpointError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write, which takes its place at the end; nothing of it is left on failure.

    Raises CheckpointError when the disk is full or can't be written.
    """
    temporary = sibling(path, "partial")
    try:
        yield temporary
        interruption.check()
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise unwritable(path, error) from error
        raise


def written(path: Path, text: str) -> None:
    """Write a text file; raises CheckpointError when it can't be written."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(file: Path) -> Any:
    """Raises CheckpointError when the file can't be read or isn't JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def sibling(path: Path, kind: str) -> Path:
    """A free name beside a file or folder, hidden."""
    return path.with_name(free_name(path, kind))


def free_name(path: Path, kind: str) -> str:
    """A hidden name that nothing has, for something that is to be called as `path` is."""
    return f".{path.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}"


def unwritable(path: Path, error: Exception) -> CheckpointError:
    """The sentence for a disk that is full, or can't be written to."""
    reason = getattr(error, "strerror", None) or error
    return CheckpointError(f"{path} can't be written: {reason}; nothing was left there")
