"""Folders that appear whole or not at all, and tensors in safetensors files."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from depgraph import interruption
from depgraph.errors import CheckpointError
from depgraph.files import free_name, read_json, sibling, unwritable

MANIFEST, WEIGHTS, CONFIG = "depgraph.json", "model.safetensors", "config.json"
OVERWRITE = ("never", "replace")
_ENTRIES: dict[str, Any] = {
    "format": int, "kind": str, "class": str, "library": dict, "record": (dict, type(None)), "training": dict, "tensors": dict,
}  # fmt: skip
_CUT: dict[str, Any] = {"form": str, "removed": list, "attributes": list, "inputs": dict, "original": dict}
_OF_FORM: dict[str, dict[str, Any]] = {
    "module": {},
    "graph": {"groups": dict, "free": list},
    "depth": {"shortening": dict},
    "products": {"free": list},
}


def free_folder(folder: str | os.PathLike[str], overwrite: str) -> Path:
    """The absolute path of a folder that may be written.

    Raises CheckpointError when something is there that `overwrite` ("never" or "replace") doesn't allow to go.
    """
    if overwrite not in OVERWRITE:
        raise CheckpointError(f"overwrite={overwrite!r} is not one of {', '.join(OVERWRITE)}")
    path = Path(folder).resolve()
    try:
        if path.exists() and not path.is_dir():
            raise CheckpointError(f"{path} is a file: choose another folder to save to")
        if not path.is_dir() or not any(path.iterdir()):
            return path
    except OSError as error:
        raise unwritable(path, error) from error
    if overwrite == "never":
        raise CheckpointError(f"the folder {path} exists and isn't empty: choose another, or pass overwrite='replace'")
    if not any((path / name).is_file() for name in (MANIFEST, CONFIG)):
        raise CheckpointError(
            f"the folder {path} holds no saved model, so overwrite='replace' leaves it alone: choose another"
        )
    return path


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A temporary sibling to write to, which takes the place of `path` at the end; nothing of it is left on failure.

    Raises CheckpointError when the disk is full or can't be written.
    """
    missing = [parent for parent in path.parents if not parent.exists()]
    temporary = path / free_name(path, "partial") if os.path.ismount(path) else sibling(path, "partial")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _as_usual(temporary)
        interruption.check()
        _take_place(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, (OSError, SafetensorError)):
            raise unwritable(path, error) from error
        raise


def check_free(file: Path, option: str) -> None:
    """Raise CheckpointError where something is there already; `option` is what names another file."""
    if file.exists():
        raise CheckpointError(f"{file} exists: name another file with {option}")


def _as_usual(folder: Path) -> None:
    """Lets those read the weights who may read the folder's other new files: safetensors makes them private."""
    probe = folder / free_name(folder, "probe")
    probe.touch()
    usual = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in folder.glob("*.safetensors"):
        file.chmod(usual)


def _take_place(temporary: Path, path: Path) -> None:
    if temporary.parent == path:
        _move_up(temporary, path)
        return
    if not path.exists():
        temporary.rename(path)
        return
    aside = sibling(path, "replaced")
    path.rename(aside)
    try:
        temporary.rename(path)
    except BaseException:
        aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _move_up(temporary: Path, path: Path) -> None:
    """As `_take_place` for a folder that can't be renamed, because a disk is mounted there: file by file."""
    aside = path / free_name(path, "replaced")
    moves = [(old, aside / old.name) for old in path.iterdir() if old != temporary]
    moves += [(new, path / new.name) for new in temporary.iterdir()]
    done: list[tuple[Path, Path]] = []
    try:
        aside.mkdir()
        for old, new in moves:
            old.rename(new)
            done.append((old, new))
    except BaseException:
        for old, new in reversed(done):
            new.rename(old)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(temporary, ignore_errors=True)


def write_tensors(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Write a safetensors file; views of a larger storage are written as what they show."""
    seen: set[int] = set()
    ready = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr() if tensor.numel() else 0
        ready[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    save_file(ready, file, metadata={"format": "pt"})


def write_json(data: Any, file: Path) -> None:
    file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: str | os.PathLike[str], newest: int) -> tuple[Path, dict[str, Any]]:
    """The folder's path and its `depgraph.json`.

    Raises CheckpointError when there is none, when it can't be read, and for a format later than `newest`.
    """
    path = Path(folder).resolve()
    if not path.is_dir():
        raise CheckpointError(f"there is no folder {path}")
    if not (path / MANIFEST).is_file():
        plain = "; transformers' from_pretrained loads it" if (path / CONFIG).is_file() else ""
        raise CheckpointError(f"{path} wasn't written by depgraph.save: it has no {MANIFEST}{plain}")
    data = read_json(path / MANIFEST)
    if not _has(data, _ENTRIES) or not _is_record(data["record"]):
        raise CheckpointError(f"{path / MANIFEST} is not the record of a saved model, or is damaged")
    found = data["format"]
    if found > newest:
        raise CheckpointError(
            f"{path} has format {found}, this version of depgraph reads up to {newest}: install a later one"
        )
    return path, data


def _has(data: Any, entries: Mapping[str, Any]) -> bool:
    """Is it a dict with such entries?"""
    return isinstance(data, dict) and all(key in data and isinstance(data[key], kind) for key, kind in entries.items())


def _is_record(record: Any) -> bool:
    """Are all cuts there, with what making them again reads?"""
    return record is None or _has(record, {"earlier": list}) and all(map(_is_cut, [*record["earlier"], record]))


def _is_cut(cut: Any) -> bool:
    known = _has(cut, _CUT) and cut["form"] in _OF_FORM and _has(cut, _OF_FORM[cut["form"]])
    return known and all(_has(one, {"target": str, "dim": int, "indices": list}) for one in cut["removed"])


def read_tensors(
    file: Path, table: Mapping[str, Mapping[str, Any]], device: torch.device | str
) -> dict[str, torch.Tensor]:
    """The tensors of a file; names, shapes and dtypes must be those of `table` (entries with `same_as` aren't stored).

    Raises CheckpointError that names the first tensor that is missing, unexpected or different, and when the file is
    truncated or can't be read.
    """
    wanted = {name: entry for name, entry in table.items() if "same_as" not in entry}
    try:
        with safe_open(file, "pt", device=str(device)) as stored:
            names = set(stored.keys())
            _same_names(file, names, set(wanted))
            tensors = {name: stored.get_tensor(name).clone() for name in wanted}
    except (OSError, SafetensorError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).removesuffix(f": {file}")
        raise CheckpointError(
            f"{file} can't be read: {reason}; copy the folder again, or save the model anew"
        ) from error
    for name, entry in wanted.items():
        found = (list(tensors[name].shape), str(tensors[name].dtype).removeprefix("torch."))
        if found != (entry["shape"], entry["dtype"]):
            raise CheckpointError(
                f"{file}: {name!r} is {found[1]} {found[0]}, recorded is {entry['dtype']} {entry['shape']}"
            )
    return tensors


def _same_names(file: Path, found: set[str], wanted: set[str]) -> None:
    if wanted - found:
        raise CheckpointError(f"{file} lacks the tensor {min(wanted - found)!r}: it isn't the file that was saved here")
    if found - wanted:
        raise CheckpointError(
            f"{file} has an unexpected tensor {min(found - wanted)!r}: it isn't the file that was saved here"
        )
