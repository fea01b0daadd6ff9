"""README.md is run: its Python in one namespace, its `depgraph` commands, and both print what it says they print.

The blocks run in their order in one temporary folder that holds a copy of `examples`. A block marked `text output` is
what the block before it printed; `...` in it stands for anything, so that times and versions need not be said.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHELLS = {"bash", "sh", "shell", "console"}
COMMAND = "import sys; sys.argv[0] = 'depgraph'; from depgraph.__main__ import main; sys.exit(main())"
_FENCE = re.compile(r"^```([a-z]*)[ \t]*(.*?)[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the word after it, its text, and the line of README.md where the text starts."""

    language: str
    mark: str
    text: str
    line: int


def blocks(markdown: str) -> list[Block]:
    """All fenced blocks in their order."""
    return [
        Block(match[1], match[2], match[3], markdown.count("\n", 0, match.start(3)) + 1)
        for match in _FENCE.finditer(markdown)
    ]


def commands(shell: str) -> Iterator[list[str]]:
    """The words of every command line, with continued lines joined and prompts and comments left out."""
    for line in shell.replace("\\\n", " ").splitlines():
        if words := shlex.split(line.removeprefix("$ "), comments=True):
            yield words


def same_text(expected: str, printed: str) -> bool:
    """Whether the texts agree but for trailing blanks and what `...` stands for."""
    texts = ["\n".join(line.rstrip() for line in text.strip().splitlines()) + "\n" for text in (expected, printed)]
    return doctest.OutputChecker().check_output(*texts, doctest.ELLIPSIS)


@pytest.fixture(scope="module")
def readme() -> list[Block]:
    return blocks((ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.fixture
def run_block(
    workspace: Path, run_python: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Block], str]:
    """Runs a block and returns what it printed. Python sees one module, whose line numbers are those of README.md."""
    module = types.ModuleType("readme")
    module.__file__ = str(workspace / "readme.py")
    monkeypatch.setitem(sys.modules, "readme", module)
    lines: list[str] = []

    def run_python_block(block: Block) -> str:
        lines.extend([""] * (block.line - 1 - len(lines)) + block.text.splitlines())
        Path(module.__file__).write_text("\n".join(lines), encoding="utf-8")
        program = compile("\n" * (block.line - 1) + block.text, module.__file__, "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(program, module.__dict__)
        return printed.getvalue()

    def run_shell_block(block: Block) -> str:
        depgraph = [words[1:] for words in commands(block.text) if words[0] == "depgraph"]
        return "".join(run_python("-c", COMMAND, *words) for words in depgraph)

    return lambda block: run_python_block(block) if block.language == "python" else run_shell_block(block)


@pytest.mark.ci
def test_blocks_run_and_print_what_the_readme_says(
    readme: list[Block], run_block: Callable[[Block], str], workspace: Path
) -> None:
    printed: str | None = None
    for block in readme:
        if block.language == "python" or block.language in SHELLS:
            printed = run_block(block)
        elif block.mark == "output":
            assert printed is not None, f"README.md:{block.line}: no block before this output"
            assert same_text(block.text, printed), f"README.md:{block.line} says otherwise; printed was:\n{printed}"
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    left = {f"/{path.name}{'/' * path.is_dir()}" for path in workspace.iterdir()} - {"/examples/", "/readme.py"}
    assert left and left <= set(ignored), "what the README writes would be committed"


def test_readme_has_python_and_the_two_commands(readme: list[Block]) -> None:
    lines = [words for block in readme if block.language in SHELLS for words in commands(block.text)]
    assert any(block.language == "python" for block in readme)
    assert ["make", "demo"] in lines
    assert ["make", "test"] in lines


def test_make_targets_and_scripts_of_the_readme_exist(readme: list[Block]) -> None:
    lines = [words for block in readme if block.language in SHELLS for words in commands(block.text)]
    makefile = (ROOT / "Makefile").read_text()
    for words in lines:
        if words[0] == "make":
            assert re.search(rf"^{re.escape(words[1])}:", makefile, re.MULTILINE), words
        if words[0].startswith("python") and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), words


def test_continuous_integration_calls_the_command_of_the_readme() -> None:
    run = (ROOT / ".ci" / "run").read_text()
    assert "\nmake test " in run
    assert '"-m ci"' in run


def test_blocks_are_found_with_their_lines() -> None:
    markdown = "# A\n```python\nx = 1\n```\ntext\n```text output\n1\n```\n```\nplain\n```\n"
    assert blocks(markdown) == [
        Block("python", "", "x = 1\n", 3),
        Block("text", "output", "1\n", 7),
        Block("", "", "plain\n", 10),
    ]


def test_commands_join_continued_lines() -> None:
    assert list(commands("$ depgraph a \\\n  --out b  # why\n\n# no\nmake test\n")) == [
        ["depgraph", "a", "--out", "b"],
        ["make", "test"],
    ]


def test_printed_text_is_compared_with_ellipses() -> None:
    assert same_text("took ... s\nok\n", "took 1.5 s  \nok\n\n")
    assert not same_text("took ... s\nok\n", "took 1.5 s\nno\n")
