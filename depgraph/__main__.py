"""The command as the shell starts it: it listens for Ctrl-C before anything heavy is imported."""

from __future__ import annotations

import contextlib
import os
import sys

from depgraph import interruption


def main() -> int:
    """Run the command and return its exit code."""
    interruption.listen()
    try:
        code = _run()
    finally:
        interruption.finish()
    if code == interruption.CODE:
        _leave(code)
    return code


def _run() -> int:
    try:
        from depgraph.cli import main as run

        return run()
    except BaseException:
        if not interruption.happened():
            raise
        print(interruption.sentence(), file=sys.stderr)
        return interruption.CODE


def _leave(code: int) -> None:
    """End at once: an interpreter that was interrupted within an import of C code may end by the signal, not by the code."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
