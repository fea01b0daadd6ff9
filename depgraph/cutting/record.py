"""What was cut, as plain data that travels with the model, its checkpoint and its exported files."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import nn

from depgraph.capture.recording import assign
from depgraph.capture.sizes import Attr
from depgraph.cutting.expressing import Solution
from depgraph.cutting.inputs import describe_inputs
from depgraph.cutting.rerunning import inputs_at
from depgraph.cutting.ways import look, put
from depgraph.errors import CutError

if TYPE_CHECKING:
    from depgraph.plan import Plan

FORMAT = 1
Attention = str | dict[str, Any] | None
Record = dict[str, Any]


def make_record(plan: Plan, form: str, solution: Solution) -> Record:
    """JSON-able: all that is needed to make the same cut again, its costs, and the same of earlier cuts.

    `removed` holds removed indices by parameter and dim, `groups` the removed groups by axis, `attributes` the changed
    integers, `inputs` what the example inputs of the result look like, `vocabulary` which tokens stay, `branches` what a
    graph form leaves out, `config` the integers of a config that builds the result (uniform plans and trimmed vocabularies
    only), `original` the classes of the modules that were cut; a graph form also has there what its original was built
    from, and in its `way` which of `cut_programs` it is.
    """
    graph = plan.graph
    earlier = getattr(graph.model, "depgraph_record", None)
    return {
        "format": FORMAT,
        "form": form,
        "removed": [{"target": r.target, "dim": r.dim, "indices": r.indices.tolist()} for r in plan.removed()],
        "attributes": [
            {**_attr(attr), "before": graph.sizes.now(attr), "after": value}
            for attr, value in solution.attributes.items()
        ],
        "axes": {name: [graph[name].size, len(groups)] for name, groups in plan.removal.items()},
        "groups": {name: [int(g) for g in groups] for name, groups in plan.removal.items()},
        "branches": list(plan.branches),
        "config": dict(plan.config),
        "free": sorted(graph.free),
        "inputs": describe_inputs(*inputs_at(graph, plan.kept())),
        "vocabulary": _vocabulary(plan),
        "cost": {"before": asdict(graph.dense_cost), "after": asdict(plan.cost())},
        "original": original_of(graph.model, graph.held()) if form == "graph" else _modules(graph.model),
        "earlier": [*earlier["earlier"], {k: v for k, v in earlier.items() if k != "earlier"}] if earlier else [],
    }


def cuts(record: Mapping[str, Any] | None) -> list[Record]:
    """The cuts of a model, the first one first; none without a record."""
    return [*record["earlier"], dict(record)] if record else []


def in_short(record: Any) -> Any:
    """A record without what grows with what went: its inputs, and costs before the first cut and after the last."""
    if not isinstance(record, Mapping) or "cost" not in record:
        return record
    costs = {"before": cuts(record)[0]["cost"]["before"], "after": record["cost"]["after"]}
    return {name: record[name] for name in ("format", "form", "inputs") if name in record} | {"cost": costs}


def put_record(model: nn.Module, before: Any) -> None:
    """Give a model the record that it had before a cut, or none."""
    if before is None:
        vars(model).pop("depgraph_record", None)
    else:
        model.depgraph_record = before


def attr_of(change: Mapping[str, Any]) -> Attr:
    """The attribute that an entry of `attributes` names."""
    return Attr(change["module"], change["name"], tuple(change["keys"]))


def library_class(model: nn.Module) -> str:
    """The name under which the transformers package has this model's class; empty where it doesn't."""
    if not is_pretrained(model):
        return ""
    import transformers

    name = type(model).__name__
    return name if getattr(transformers, name, None) is type(model) else ""


def is_pretrained(model: nn.Module) -> bool:
    """Is this one of transformers' models, or derived from one?"""
    return any(
        (c.__module__, c.__name__) == ("transformers.modeling_utils", "PreTrainedModel") for c in type(model).__mro__
    )


@contextmanager
def uncut_configs(model: nn.Module) -> Iterator[None]:
    """Meanwhile, integers within config objects are what they were before the first cut."""
    undo: list[Callable[[], None]] = []
    try:
        for cut in reversed(cuts(getattr(model, "depgraph_record", None))):
            undo += _assigned(model, (change for change in cut["attributes"] if change["keys"]))  # as far as that gets
            undo += [
                _put_back(model, attr_of(entry), entry["before"])
                for entry in shortened_lists(cut)
                if entry["keys"] and entry["before"]
            ]
        yield
    finally:
        for step in reversed(undo):
            step()


def _assigned(model: nn.Module, changes: Iterable[Any]) -> Iterator[Callable[[], None]]:
    """Set integers to what they were before, but for those in a module that a later cut has left out; what takes it back."""
    for change in changes:
        with suppress(CutError):
            yield assign(model, attr_of(change), change["before"])


def shortened_lists(cut: Record) -> list[dict[str, Any]]:
    """The lists that followed when entries left their containers, with what they were `before`."""
    shortening = cut.get("shortening", {})
    return [*shortening.get("lists", ()), *shortening.get("fields", ())]


def _put_back(model: nn.Module, attr: Attr, items: list[Any]) -> Callable[[], None]:
    """Give a list within a config the items that it had before an entry left."""
    held = getattr(model.get_submodule(attr.module), attr.name)
    kind = type(look(held, attr.keys))
    return put(held, attr.keys, kind(items))


def original_config(model: nn.Module) -> Any:
    """A copy of a transformers model's config as it was before the first cut."""
    with uncut_configs(model):
        config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    return config


def classes_of(model: nn.Module) -> dict[str, str]:
    """The class of every module of a model, by path."""
    return {path: type(module).__qualname__ for path, module in model.named_modules()}


def attention_of(config: Any) -> Attention:
    """The kind of attention that a config asks for; where its parts may differ, each by its name and the config's own by ""."""
    own: str | None = getattr(config, "_attn_implementation", None)
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ()}
    kinds = {name: attention_of(part) for name, part in parts.items() if part is not None}
    return {"": own, **kinds} if kinds else own


def original_of(model: nn.Module, tensors: Mapping[str, Any]) -> Record:
    """What the cut module was: dtypes of its tensors and, for a model of transformers, class and config."""
    found: Record = {"dtypes": {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}}
    return found | ({"modules": classes_of(model), **_built_from(model)} if library_class(model) else {})


def _built_from(model: nn.Module) -> Record:
    """What a model of transformers was built from before the first cut."""
    config = original_config(model)
    plain = json.loads(config.to_json_string(use_diff=False))
    return {"class": library_class(model), "attention": attention_of(config), "config": plain}


def record_beside_config(model: nn.Module) -> Record | None:
    """The record of a model whose own config builds it as it is now: it also says what it was built from before the cuts."""
    made = cuts(getattr(model, "depgraph_record", None))
    if not made:
        return None
    if "config" not in made[0]["original"]:
        made[0] = {**made[0], "original": {**made[0]["original"], **_built_from(model)}}
    *earlier, last = ({key: value for key, value in cut.items() if key != "earlier"} for cut in made)
    return {**last, "earlier": earlier}


def _modules(model: nn.Module) -> Record:
    """The classes of its modules, which a forward may have replaced; of a model that is built from a config alone."""
    return {"modules": classes_of(model)} if library_class(model) else {}


def _vocabulary(plan: Plan) -> Record:
    """The inputs that a vocabulary was trimmed for, how many tokens it had, and which of them stay: their position is their new id."""
    words, widths = plan.graph.words, plan.graph.widths
    if words is None:
        return {}
    stays = plan.kept().of_class(widths.class_of(words.dim))
    size = widths.program.relations.sizes[words.dim]
    return {"inputs": list(words.inputs), "size": size, "kept": list(range(size)) if stays is None else stays.tolist()}


def _attr(attr: Attr) -> dict[str, Any]:
    return {"module": attr.module, "name": attr.name, "keys": list(attr.keys)}
