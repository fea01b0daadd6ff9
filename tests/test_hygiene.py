"""Rules for the source that no linter knows: no architecture names in code, files of readable length, no pickle."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("depgraph", "importance", "exporters")
MAX_LINES = 350
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve"}
ARCHITECTURES = re.compile(
    r"(?i:llama|mistral|qwen|gemma|gpt[-_]?2|bert|whisper|convnext|resnet|mobilenet|mamba|phi[-_]?3)"
    r"|(?<![A-Za-z])(?i:t5|swin)(?![a-z0-9])"
)
_LAYOUT = {tokenize.NL, tokenize.COMMENT}
_LINE_STARTS = {tokenize.ENCODING, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}


def _sources(*packages: str) -> Iterator[tuple[str, str]]:
    """Path from the root and text of every file of these packages."""
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def code_tokens(source: str) -> Iterator[tokenize.TokenInfo]:
    """The tokens of a source text without comments and docstrings (strings that stand alone as a statement)."""
    tokens = list(tokenize.tokenize(io.BytesIO(source.encode()).readline))
    tokens = [token for token in tokens if token.type not in _LAYOUT]
    for before, token, after in zip(tokens, tokens[1:], tokens[2:], strict=False):
        is_docstring = token.type == tokenize.STRING and before.type in _LINE_STARTS and after.type == tokenize.NEWLINE
        if not is_docstring:
            yield token


def architecture_names(source: str) -> list[str]:
    """`line: token` for every token of the code that names an architecture."""
    return [f"{token.start[0]}: {token.string}" for token in code_tokens(source) if ARCHITECTURES.search(token.string)]


def pickling(source: str) -> list[int]:
    """The lines that import a pickling module or call `torch.load` or `torch.save`."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        if PICKLES.intersection(name.split(".")[0] for name in names):
            lines.append(node.lineno)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"torch.load", "torch.save"}:
            lines.append(node.lineno)
    return lines


def test_architecture_names_are_found_in_code_only() -> None:
    source = '"""For LLaMA."""\n\n# like bert\ndef f(x):\n    """A T5."""\n    swinging = "a swine"\n    return x\n'
    assert architecture_names(source) == []
    assert architecture_names("import transformers\nx = transformers.LlamaConfig()\n") == ["2: LlamaConfig"]
    assert architecture_names('x = {\n    "t5": 1,\n}\n') == ['2: "t5"']
    assert architecture_names("t5_layers = SwinBlock = 1\n") == ["1: t5_layers", "1: SwinBlock"]


def test_no_architecture_is_named_in_the_library() -> None:
    found = {path: names for path, text in _sources("depgraph", "importance") if (names := architecture_names(text))}
    assert found == {}


def test_files_fit_in_one_reading() -> None:
    lengths = {path: len(text.splitlines()) for path, text in _sources(*PACKAGES)}
    assert lengths
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_pickling_is_found() -> None:
    assert pickling("import pickle\nfrom dill import loads\nimport torch\ntorch.load\n") == [1, 2, 4]
    assert pickling("import torch\nfrom safetensors.torch import save_file\n") == []


def test_nothing_is_pickled() -> None:
    found = {path: lines for path, text in _sources(*PACKAGES) if (lines := pickling(text))}
    assert found == {}
