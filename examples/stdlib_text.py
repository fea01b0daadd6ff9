"""The source text of Python's own standard library, divided into training and held-out modules.

A module is held out when a SHA-256 hash of its dotted name says so (about 5 percent of the modules), so the division
is the same on every machine and for every Python version; the text itself is that of the running Python. Tests,
third-party packages, generated files and tables (codec tables, the text of ``pydoc_data``) are left out.
"""

from __future__ import annotations

import hashlib
import sysconfig
import tokenize
from pathlib import Path, PurePosixPath

HELD_OUT_PERCENT = 5
DEFAULT_SEPARATOR = "\n\n"
_EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}
)
_EXCLUDED_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize", "__phello__")


def module_name(relative: PurePosixPath) -> str:
    """The dotted name of a module from its path under the standard library: ``json/__init__.py`` is ``json``."""
    parts = list(relative.with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


def is_held_out(name: str) -> bool:
    """Whether the module of this dotted name is kept out of training."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT


def _is_wanted(relative: PurePosixPath) -> bool:
    if not _EXCLUDED_FOLDERS.isdisjoint(relative.parts):
        return False
    return not any(part.startswith(_EXCLUDED_PREFIXES) for part in relative.parts)


def stdlib_modules() -> dict[str, Path]:
    """Dotted name and file of every module that is used, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = {}
    for path in root.rglob("*.py"):
        relative = PurePosixPath(path.relative_to(root).as_posix())
        if _is_wanted(relative):
            modules[module_name(relative)] = path
    return dict(sorted(modules.items()))


def _read(path: Path) -> str:
    with tokenize.open(path) as file:  # follows the file's own encoding line
        return file.read().strip("\n") + "\n"


def _text(held_out: bool, separator: str) -> str:
    return separator.join(_read(path) for name, path in stdlib_modules().items() if is_held_out(name) is held_out)


def training_text(separator: str = DEFAULT_SEPARATOR) -> str:
    """The source of the training modules, one after another in the order of their names."""
    return _text(held_out=False, separator=separator)


def held_out_text(separator: str = DEFAULT_SEPARATOR) -> str:
    """The source of the held-out modules, one after another in the order of their names."""
    return _text(held_out=True, separator=separator)
