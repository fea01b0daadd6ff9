"""The command `depgraph`: one file for each of its commands. The one package that may import all three."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence

import typer

from depgraph import interruption
from depgraph.cli import (  # noqa: F401  (they add themselves to the app)
    bench,
    build,
    export,
    inspect,
    profile,
    prune,
    recipes,
    sweep,
)
from depgraph.cli.app import app
from depgraph.cli.output import say, show_error

__all__ = ["app", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; every error is one sentence on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
            logging.disable(logging.CRITICAL)
        try:
            return _run(given)
        except Exception as error:
            return _interrupted() if interruption.happened() else show_error(error, debug)
        finally:
            logging.disable(logging.NOTSET)


def _run(given: list[str]) -> int:
    try:
        done = typer.main.get_command(app).main(args=given, prog_name="depgraph", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except Exception as error:
        if interruption.happened() or not hasattr(error, "format_message"):
            raise
        where = getattr(getattr(error, "ctx", None), "command_path", "depgraph")
        if sentence := error.format_message().rstrip("."):  # none where the help was shown for want of arguments
            say(f"error: {sentence} (see {where} --help)")
        return int(getattr(error, "exit_code", 2))
    if done == interruption.CODE:
        return _interrupted()
    return done if isinstance(done, int) else 0


def _interrupted() -> int:
    say(interruption.sentence())
    return interruption.CODE
