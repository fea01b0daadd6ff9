"""What MODEL names: a transformers folder, a folder that `depgraph.save` wrote, or `file.py:function`."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from depgraph.cli.inputs import make_inputs
from depgraph.cutting import inputs
from depgraph.errors import CheckpointError, DepgraphError, ModelError, one_line
from depgraph.storage import MANIFEST

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_GIVES = "(module, args), (module, args, kwargs) or a dict with 'model' and 'args' or 'kwargs'"


@dataclass(frozen=True)
class Loading:
    """Where a model goes and as what: device, dtype (a name in `DTYPES`), the seed of made-up inputs.

    `base` names the unpruned module where a saved folder holds one that isn't of transformers.
    """

    device: str = "cpu"
    dtype: str = "auto"
    seed: int = 0
    base: str = ""


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode with example inputs, and what came with it: batches and a loss to score with, a tokenizer.

    `held_out` are batches to measure on, `accuracy` a function of the model's output and a batch: the share that is right.
    """

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    batches: Any = None
    loss: Callable[[Any, Any], torch.Tensor] | None = None
    tokenizer: Any = None
    held_out: Any = None
    accuracy: Callable[[Any, Any], Any] | None = None


def load_model(spec: str, loading: Loading) -> Loaded:
    """The model that `spec` names; raises ModelError in one sentence when it can't be had."""
    require_model(spec)
    if loading.base and not is_saved(Path(spec)):
        raise ModelError(
            f"--base is the unpruned module of a folder saved by depgraph, which {spec} isn't: leave it out"
        )
    file, colon, function = spec.rpartition(":")
    if colon and file.endswith(".py"):
        return _from_function(Path(file), function, loading)
    return _from_folder(Path(spec), loading)


def require_model(spec: str) -> None:
    """Raise ModelError where `spec` names neither a function of a file nor a folder with a model."""
    path = Path(spec)
    file, colon, _ = spec.rpartition(":")
    if path.suffix == ".onnx":
        raise ModelError(f"{spec} is an ONNX file already: give the PyTorch model, or inspect or prune the file")
    if path.suffix == ".py":
        raise ModelError(f"{spec} names no function: give {spec}:FUNCTION, which returns {_GIVES}")
    if colon and file.endswith(".py") and not Path(file).is_file():
        raise ModelError(f"there is no file {file}")
    if colon and file.endswith(".py") or (path / "config.json").is_file() or is_saved(path):
        return
    found = "has no config.json" if path.is_dir() else "isn't a model" if path.exists() else "doesn't exist"
    raise ModelError(f"{spec} {found}: give a transformers folder, a folder saved by depgraph, or file.py:function")


def in_float32(loaded: Loaded) -> Loaded:
    """The same, with all numbers of other floating-point types in float32; itself where there are none."""
    if all(p.dtype == torch.float32 for p in loaded.model.parameters() if p.is_floating_point()):
        return loaded

    def wide(tree: Any) -> Any:
        change = lambda t: t.float() if isinstance(t, torch.Tensor) and t.is_floating_point() else t  # noqa: E731
        return torch.utils._pytree.tree_map(change, tree)

    batches, held_out = (None if b is None else [wide(batch) for batch in b] for b in (loaded.batches, loaded.held_out))
    changed = {"batches": batches, "held_out": held_out, "args": wide(loaded.args), "kwargs": wide(loaded.kwargs)}
    return replace(loaded, model=loaded.model.float(), **changed)


def is_saved(folder: Path) -> bool:
    """Was the folder written by `depgraph.save`?"""
    return (folder / MANIFEST).is_file()


def _from_folder(folder: Path, loading: Loading) -> Loaded:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = _placed(_saved(folder, loading) if is_saved(folder) else _pretrained(folder, loading), loading).eval()
    traced = (getattr(model, "depgraph_record", None) or {}).get("inputs", {"unknown": ""})
    if "unknown" in traced:
        args, kwargs = (), make_inputs(model, folder, loading.seed)
    else:
        args, kwargs = _mover(loading)(inputs.make_inputs(traced, loading.device, loading.seed))
    return Loaded(model, args, kwargs, tokenizer=_tokenizer(folder))


def _saved(folder: Path, loading: Loading) -> nn.Module:
    from depgraph.checkpoint import load

    base = load_model(loading.base, Loading()).model if loading.base else None
    try:
        return load(folder, model=base)
    except CheckpointError as error:
        if base is not None or "model=" not in str(error):
            raise
        raise ModelError(
            f"{folder} holds a module of your own: give the unpruned one, --base file.py:function"
        ) from None


def _pretrained(folder: Path, loading: Loading) -> nn.Module:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        named = (config.architectures or [""])[0]
        chosen = getattr(transformers, named, None) if named else None
        if chosen is None:
            what = f"{named!r}" if named else "none"
            raise ModelError(
                f"{folder / 'config.json'} must name a class of transformers under 'architectures', but names {what}"
            )
        if loading.device == "meta":
            with torch.device("meta"):
                return chosen(config)
        model, report = chosen.from_pretrained(
            folder,
            local_files_only=True,
            dtype=DTYPES[loading.dtype],
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except DepgraphError:
        raise
    except Exception as error:
        raise ModelError(
            f"{folder} can't be loaded with transformers: {one_line(error)}; see that its files are all there and whole"
        ) from error
    for name, saved, wanted in sorted(report["mismatched_keys"]):
        raise ModelError(
            f"{folder} doesn't fit its config.json: {name!r} has shape {list(saved)} there, a {chosen.__name__} of that config "
            f"{list(wanted)}"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(f"{folder} lacks {len(missing)} weights of a {chosen.__name__}, the first is {missing[0]!r}")
    return model


def _tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, None where it has none."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json", "vocab.txt")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ModelError(f"the tokenizer in {folder} can't be loaded: {one_line(error)}") from error


def _from_function(file: Path, name: str, loading: Loading) -> Loaded:
    function = _function(_imported(file), file, name)
    try:
        given = function()
    except DepgraphError:
        raise
    except (Exception, SystemExit) as error:
        raise ModelError(f"{file}:{name} failed with {one_line(error)}{_line_in(file, error)}") from error
    parts = _parts(given)
    model, args, kwargs = parts.get("model"), parts.get("args", ()), parts.get("kwargs") or {}
    if not isinstance(model, nn.Module) or not isinstance(kwargs, Mapping) or not (parts.keys() & {"args", "kwargs"}):
        raise ModelError(f"{file}:{name} must return {_GIVES}; it returned {_described(given)}")
    for part in ("loss", "accuracy"):
        if parts.get(part) is not None and not callable(parts[part]):
            raise ModelError(
                f"{file}:{name} gives {_described(parts[part])} as {part!r}: give a function of output and batch"
            )
    for part in ("batches", "held_out"):
        held = parts.get(part)
        if held is not None and (isinstance(held, str | Mapping | torch.Tensor) or not isinstance(held, Iterable)):
            raise ModelError(f"{file}:{name} gives {_described(parts[part])} as {part!r}: give a list of batches")
    args = tuple(args) if isinstance(args, (tuple, list)) else (args,)
    move = _mover(loading)
    model = _placed(model, loading)
    rest = {name: parts.get(name) for name in ("batches", "loss", "tokenizer", "held_out", "accuracy")}
    return Loaded(model.eval(), move(args), move(dict(kwargs)), **rest)


def _parts(given: Any) -> dict[str, Any]:
    if isinstance(given, Mapping):
        return dict(given)
    if isinstance(given, (tuple, list)) and len(given) in (2, 3):
        return dict(zip(("model", "args", "kwargs"), given, strict=False))
    return {}


def _described(given: Any) -> str:
    if isinstance(given, Mapping):
        return f"a dict with {', '.join(map(repr, given)) or 'nothing in it'}"
    if isinstance(given, (tuple, list)):
        return f"a {type(given).__name__} of {', '.join(type(part).__name__ for part in given) or 'nothing'}"
    return f"a {type(given).__name__}"


def _imported(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"depgraph_given_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ModelError(f"{file} can't be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ModelError(f"{file} can't be imported: {one_line(error)}{_line_in(file, error)}") from error
    finally:
        sys.path.remove(str(file.resolve().parent))
    return module


def _function(module: ModuleType, file: Path, name: str) -> Callable[[], Any]:
    found = getattr(module, name, None)
    if callable(found):
        return found
    held = {n: value for n, value in vars(module).items() if callable(value)}
    own = [n for n, value in held.items() if getattr(value, "__module__", "") == module.__name__]
    near = difflib.get_close_matches(name, own, n=1) or own[:3]
    hint = f"did you mean {' or '.join(near)}" if near else "it has none"
    raise ModelError(f"{file} has no function {name!r}: {hint}")


def _line_in(file: Path, error: BaseException) -> str:
    """The innermost line of the user's file that an error passed through."""
    found, trace = "", error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename).name == file.name:
            found = f" (at {file.name}:{trace.tb_lineno})"
        trace = trace.tb_next
    return found


def _mover(loading: Loading) -> Callable[[Any], Any]:
    """Puts tensors where the model goes; floating-point ones take its dtype."""
    dtype = DTYPES[loading.dtype]

    def move(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor):
            return tensor
        wanted = dtype if isinstance(dtype, torch.dtype) and tensor.is_floating_point() else tensor.dtype
        return tensor.to(loading.device, wanted)

    return lambda tree: torch.utils._pytree.tree_map(move, tree)


def _placed(model: nn.Module, loading: Loading) -> nn.Module:
    dtype = DTYPES[loading.dtype]
    try:
        return model.to(loading.device, dtype if isinstance(dtype, torch.dtype) else None)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"the model can't be moved to device {loading.device!r}: {one_line(error)}") from error
