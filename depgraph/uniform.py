"""A cut that leaves all layers alike is only an edited config: find that config, so that the model loads everywhere.

Nothing is known of any architecture. The integers of the config whose values were sizes before the cut take the sizes after
it, one at a time, as long as that brings the shapes of the rebuilt model nearer to the pruned one's; it counts only if all
shapes agree in the end and the rebuilt model computes the same.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from depgraph.capture.capturing import quiet
from depgraph.capture.keeping import unwritten
from depgraph.config_search import Change, ConfigSearch, dims_of
from depgraph.configs import edited, recorded_edits
from depgraph.cutting.inputs import make_inputs
from depgraph.cutting.record import attention_of, cuts, original_config, shortened_lists
from depgraph.errors import CheckpointError, one_line

_MOST_SECONDS = 20.0
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


def write_plain(model: nn.Module, folder: Path) -> tuple[str, str]:
    """Write a plain transformers directory; returns why that isn't possible ("" if it was) and which fields were edited."""
    made = cuts(getattr(model, "depgraph_record", None))
    refusals = []
    for config, edits in _candidates(model, made):
        why, rebuilt = _accepted(model, config, made)
        if not why:
            rebuilt.save_pretrained(folder)
            why = _lost(rebuilt, folder)
            if not why:
                return "", _names(edits)
            for file in folder.iterdir():
                file.unlink()
        refusals.append(why)
    none = "no config builds these shapes: layers of unequal widths, or a size that the config doesn't name"
    return next((why for why in refusals if why), none), ""


def _candidates(model: nn.Module, made: list[dict[str, Any]]) -> Iterator[tuple[Any, list[str]]]:
    """Configs that build the shapes of the model, with the names of their edited integers.

    The plan's own comes first. Different configs can give the same shapes (8 heads of 9, 6 heads of 12): where one is
    refused, those that do without one of its edits follow, as long as all searching takes less than 20 s.
    """
    start, late = original_config(model), time.monotonic() + _MOST_SECONDS
    search = ConfigSearch(type(model), start, dims_of(model), sizes(made), late)
    if any(cut["form"] == "depth" for cut in made):  # what counts its layers has followed
        config: Any = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        if replace(search, start=config).apart({}) == 0:
            yield config, _changed_names(made)
    planned = recorded_edits(model)
    if planned and search.apart(planned) == 0:
        yield edited(start, planned), [".".join(place) for place in planned]
    banned: list[Change | None] = [None]  # grows by the edits of the first config found
    for ban in banned:
        edits = search.found(ban)
        if edits is not None:
            banned += edits.items() if ban is None else []
            yield edited(start, edits), [".".join(place) for place in edits]
        if time.monotonic() > late:
            return


def _changed_names(made: list[dict[str, Any]]) -> list[str]:
    """The places in the config that cuts have changed."""
    places = [change["keys"] for cut in made for change in (*cut["attributes"], *shortened_lists(cut))]
    return list(dict.fromkeys(".".join(map(str, keys)) for keys in places if keys))


def _lost(model: Any, folder: Path) -> str:
    """What doesn't come back from a plain directory as it was saved; empty where all does."""
    library = {"class": type(model).__name__, "attention": attention_of(model.config)}
    try:
        again = read_plain(folder, library).state_dict()
    except CheckpointError as error:
        return str(error)
    names = (n for n, t in model.state_dict().items() if n not in again or not torch.equal(t, again[n].to(t.dtype)))
    return next((f"transformers doesn't load {name!r} as it was saved" for name in names), "")


def _names(edits: list[str]) -> str:
    fields = ", ".join(edits)
    return f"a config edited in {fields} builds it" if fields else "its config builds it as it is"


def _accepted(model: nn.Module, config: Any, made: list[dict[str, Any]]) -> tuple[str, Any]:
    """Why a config that gives the right shapes won't do ("" if it does), and the model that it builds."""
    try:
        getattr(config, "validate", lambda: None)()
    except Exception as error:
        return (
            f"transformers refuses the config ({error.__cause__ or error}); plan with round_to to keep such sizes",
            None,
        )
    return _rebuilt(model, config, made)


def read_plain(path: Path, library: dict[str, Any]) -> Any:
    """Load a plain transformers directory by the class that wrote it; raises CheckpointError."""
    import transformers

    kind = getattr(transformers, library["class"], None)
    if kind is None:
        raise CheckpointError(f"transformers {transformers.__version__} has no class {library['class']!r}")
    try:
        model, info = kind.from_pretrained(path, attn_implementation=library["attention"], output_loading_info=True)
    except Exception as error:
        raise CheckpointError(f"{path} can't be loaded: {type(error).__name__}: {error}") from error
    for problem in ("missing", "unexpected", "mismatched"):
        if names := info.get(f"{problem}_keys"):
            raise CheckpointError(f"the weights in {path} have {problem} tensors, such as {min(map(str, names))}")
    return model


def sizes(made: list[dict[str, Any]]) -> dict[int, set[int]]:
    """Old sizes and what became of them: of axes, of pairs of axes (heads of so many), of attributes, of parameter dims."""
    found: dict[int, set[int]] = {}
    for cut in made:
        axes = {(size, size - gone) for size, gone in cut["axes"].values()}
        for size, left in axes:
            found.setdefault(size, set()).add(left)
        for (a, b), (c, d) in ((x, y) for x in axes for y in axes | {(s, s) for s in range(2, 17)}):
            found.setdefault(a * c, set()).add(b * d)
        for change in cut["attributes"]:
            found.setdefault(change["before"], set()).add(change["after"])
    return found


def _rebuilt(model: nn.Module, config: Any, made: list[dict[str, Any]]) -> tuple[str, Any]:
    """The model that the config builds, with the pruned weights, and why it doesn't compute the same ("" if it does)."""
    config._attn_implementation = attention_of(model.config)
    try:
        rebuilt: Any = type(model)(config).to(next(model.parameters()).dtype).eval()
        weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
        for name, held in rebuilt.state_dict(keep_vars=True).items():  # some may be in a precision of their own
            held.data = held.data.to(weights[name].dtype if name in weights else held.dtype)
        rebuilt.load_state_dict(weights)
    except Exception as error:
        return f"a plain reload doesn't take the weights: {type(error).__name__}: {error}", None
    if hasattr(model, "generation_config"):
        rebuilt.generation_config = copy.deepcopy(model.generation_config)
    if not made:
        return "", rebuilt
    try:
        args, kwargs = _in_precision(model, made[-1])
    except Exception as error:
        return f"it couldn't be compared with the plain reload: {error}", rebuilt
    here = next(model.parameters()).device
    with torch.no_grad(), quiet(model), quiet(rebuilt), unwritten(model), unwritten(rebuilt):
        try:
            there, named = pytree.tree_map(lambda t: _to(t, here), (args, kwargs))
            mine, theirs = model(*there, **named), rebuilt(*args, **kwargs)
        except Exception as error:
            return f"it, or a plain reload, doesn't run on the example: {one_line(error)}", rebuilt
    if not _alike(mine, theirs) or not _decided_alike(model, rebuilt):
        return "a plain reload would compute something else (buffers or scales that the config decides differ)", rebuilt
    return "", rebuilt


def _in_precision(model: nn.Module, cut: dict[str, Any]) -> Any:
    """Inputs like the recorded ones, in the precision of `model`, which may have been given another one since the cut."""
    before = (getattr(torch, dtype) for dtype in cut["original"].get("dtypes", {}).values())
    was = next((dtype for dtype in before if dtype.is_floating_point), None)
    now = next((p.dtype for p in model.parameters() if p.is_floating_point()), was)
    floats = {was: now}
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(floats.get(t.dtype, t.dtype)), make_inputs(cut["inputs"]))


def _to(item: Any, device: torch.device) -> Any:
    return item.to(device) if isinstance(item, torch.Tensor) else item


def _decided_alike(model: nn.Module, rebuilt: nn.Module) -> bool:
    mine, theirs = _decided(model), _decided(rebuilt)
    names = mine.keys() & theirs.keys()
    return _alike([mine[name] for name in names], [theirs[name] for name in names])


def _decided(model: nn.Module) -> dict[str, torch.Tensor]:
    """Scales and tables that a config decides and no weights say: a small difference may not be seen in the outputs."""
    found = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    for path, module in model.named_modules():
        held = vars(module).items()
        found |= {f"{path}.{name}": torch.tensor(one) for name, one in held if type(one) is float and isfinite(one)}
    return found


def _alike(mine: Any, theirs: Any) -> bool:
    pairs = zip(pytree.tree_leaves(mine), pytree.tree_leaves(theirs), strict=True)
    for a, b in pairs:
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            allowed = _TOLERANCE.get(a.dtype, 2e-2) * float(b.abs().max() if b.numel() else 1)
            if a.shape != b.shape or float((a.cpu() - b).abs().max()) > allowed:
                return False
    return True
