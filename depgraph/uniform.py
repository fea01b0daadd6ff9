"""A cut that leaves all layers alike is only an edited config: find that config, so that the model loads everywhere.

Nothing is known of any architecture. The integers of the config whose values were sizes before the cut take the sizes after
it, one at a time, as long as that brings the shapes of the rebuilt model nearer to the pruned one's; it counts only if all
shapes agree in the end and the rebuilt model computes the same.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from depgraph.capture.capturing import quiet
from depgraph.capture.keeping import unwritten
from depgraph.configs import Place, edited, recorded_edits
from depgraph.cutting.inputs import make_inputs
from depgraph.cutting.record import attention_of, cuts, original_config, shortened_lists
from depgraph.errors import CheckpointError

_MOST_STEPS, _MOST_SECONDS = 12, 20.0
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
Shapes = dict[str, tuple[int, ...]]
Edit = tuple[str, int]


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
    start, wanted = original_config(model), _shapes(model)
    if any(cut["form"] == "depth" for cut in made):  # what counts its layers has followed
        config: Any = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        if _distance(type(model), config, wanted) == 0:
            yield config, _changed_names(made)
    planned = recorded_edits(model)
    config = edited(start, planned)
    if planned and _distance(type(model), config, wanted) == 0:
        yield config, [".".join(place) for place in planned]
    late = time.monotonic() + _MOST_SECONDS
    became = sizes(made)
    banned: list[Edit | None] = [None]  # grows by the edits of the first config found
    for ban in banned:
        found = _search(Search(type(model), wanted, became, late), start, ban)
        if found is not None:
            banned += found[1] if ban is None else []
            yield found[0], [name for name, _ in found[1]]
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
        again = read_plain(folder, library).to(model.dtype).state_dict()
    except CheckpointError as error:
        return str(error)
    names = (n for n, t in model.state_dict().items() if n not in again or not torch.equal(t, again[n]))
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


@dataclass(frozen=True)
class Search:
    """For a config by which `kind` builds the shapes `wanted`; `became` says what sizes became, `late` when to give up."""

    kind: type
    wanted: Shapes
    became: dict[int, set[int]]
    late: float

    def trials(self, config: Any, ban: Edit | None) -> Iterator[tuple[float, Edit, Any]]:
        """Every config with one more edit than `config`, and how far from the wanted shapes it is."""
        for edit, trial in _edits(config, self.became):
            if time.monotonic() > self.late:
                return
            if edit != ban:
                yield _distance(self.kind, trial, self.wanted), edit, trial


def _search(search: Search, config: Any, ban: Edit | None) -> tuple[Any, list[Edit]] | None:
    """The config whose model has the wanted shapes, by steps that each bring it nearer; `ban` is none of them."""
    apart = _distance(search.kind, config, search.wanted)
    edits: list[Edit] = []
    for _ in range(_MOST_STEPS):
        if apart == 0:
            return config, edits
        best, edit, trial = min(search.trials(config, ban), key=lambda t: t[0], default=(apart, ("", 0), config))
        if best is None or best >= apart:
            return None
        config, apart = trial, best
        edits.append(edit)
    return None


def _edits(config: Any, became: dict[int, set[int]]) -> Iterator[tuple[Edit, Any]]:
    """The config with one integer changed from an old size to a new one, or with one that wasn't set given a new one."""
    fresh = sorted({new for options in became.values() for new in options})
    for place, value in _integers(config, ()):
        for new in fresh if value is None else sorted(became.get(value, ())):
            if new == value:
                continue
            trial = copy.deepcopy(config)
            holder = trial
            for name in place[:-1]:
                holder = getattr(holder, name)
            try:
                setattr(holder, place[-1], new)
            except Exception:  # the config's own validation, of whatever kind: no such config
                continue
            yield (".".join(place), new), trial


def _integers(config: Any, before: Place) -> Iterator[tuple[Place, int | None]]:
    for name, value in sorted(vars(config).items()):
        if name.startswith("_") or isinstance(value, bool):
            continue
        if isinstance(value, int):
            yield (*before, name), value
        elif value is None and name.startswith(("n_", "num_")) or value is None and name.endswith(("_dim", "_size")):
            yield (*before, name), None
        elif type(value).__name__.endswith("Config"):
            yield from _integers(value, (*before, name))


def _shapes(model: nn.Module) -> Shapes:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def _distance(kind: type, config: Any, wanted: Shapes) -> float:
    """How far the shapes of the model that a config builds are from the wanted ones."""
    try:
        with torch.device("meta"):
            shapes = _shapes(kind(copy.deepcopy(config)))
    except Exception:
        return float("inf")
    if shapes.keys() != wanted.keys() or any(len(shapes[n]) != len(wanted[n]) for n in wanted):
        return float("inf")
    return sum(abs(a - b) for n in wanted for a, b in zip(shapes[n], wanted[n], strict=True))


def _rebuilt(model: nn.Module, config: Any, made: list[dict[str, Any]]) -> tuple[str, Any]:
    """The model that the config builds, with the pruned weights, and why it doesn't compute the same ("" if it does)."""
    config._attn_implementation = attention_of(model.config)
    try:
        rebuilt: Any = type(model)(config).to(next(model.parameters()).dtype).eval()
        rebuilt.load_state_dict({k: v.detach().cpu() for k, v in model.state_dict().items()})
    except Exception as error:
        return f"a plain reload doesn't take the weights: {type(error).__name__}: {error}", None
    if hasattr(model, "generation_config"):
        rebuilt.generation_config = copy.deepcopy(model.generation_config)
    if not made:
        return "", rebuilt
    try:
        args, kwargs = make_inputs(made[-1]["inputs"])
    except Exception as error:
        return f"it couldn't be compared with the plain reload: {error}", rebuilt
    here = next(model.parameters()).device
    with torch.no_grad(), quiet(model), quiet(rebuilt), unwritten(model), unwritten(rebuilt):
        mine = model(*pytree.tree_map(lambda t: _to(t, here), args), **pytree.tree_map(lambda t: _to(t, here), kwargs))
        try:
            theirs = rebuilt(*args, **kwargs)
        except Exception as error:
            return f"a plain reload doesn't run on the example: {type(error).__name__}: {error}", rebuilt
    if not _alike(mine, theirs):
        return "a plain reload would compute something else (buffers or scales that the config decides differ)", rebuilt
    return "", rebuilt


def _to(item: Any, device: torch.device) -> Any:
    return item.to(device) if isinstance(item, torch.Tensor) else item


def _alike(mine: Any, theirs: Any) -> bool:
    pairs = zip(pytree.tree_leaves(mine), pytree.tree_leaves(theirs), strict=True)
    for a, b in pairs:
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            allowed = _TOLERANCE.get(a.dtype, 2e-2) * float(b.abs().max() if b.numel() else 1)
            if a.shape != b.shape or float((a.cpu() - b).abs().max()) > allowed:
                return False
    return True
