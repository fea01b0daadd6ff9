"""What a cut of the graph gives: a torch.fx.GraphModule that is copied and pickled as it is, as other modules are.

torch's own loses in a copy what isn't in its code (hooks, records, which buffers are saved), and can't be pickled where
torch.export made it. Which sizes of the inputs it takes is asked by a module of its own, so that copies ask, too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen, _PyTreeCodeGen
from torch.fx.node import map_aggregate, map_arg

from depgraph.errors import CaptureError
from depgraph.operators import Named, named, operator_of

_SIZES = "_taken_sizes"
_BY_TORCH = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
             "_forward_hooks_always_called")  # fmt: skip
_GENERATED = ("_graph", "_code", "_lineno_map", "_prologue_start", "meta")
_KEPT = 2  # sizes up to here torch takes for any

Size = Any  # a number, or an expression of sympy over the symbols of other sizes


class GraphForm(GraphModule):
    """A graph module whose copies, deep or pickled, have its hooks, attributes, buffers and record."""

    @classmethod
    def of(cls, module: GraphModule) -> GraphForm:
        """The same program, with the same tensors; `module` isn't to be used any more."""
        for name, inner in list(module.named_children()):
            if isinstance(inner, GraphModule):
                setattr(module, name, cls.of(inner))
        _ask_sizes(module)
        held = {name: value for name, value in vars(module).items() if name not in _GENERATED}
        held |= {name: type(held[name])() for name in _BY_TORCH}
        held |= {"meta": {}, "shape_env": None, "_tracer_cls": None}
        held.pop("range_constraints", None)
        return cls._made(type(module).__name__, held, module.graph)

    @classmethod
    def _made(cls, name: str, held: dict[str, Any], graph: Graph) -> GraphForm:
        fresh = cls._empty(name)
        fresh._fill(held, graph)
        return fresh

    @classmethod
    def _empty(cls, name: str) -> GraphForm:
        fresh: GraphForm = cls.__new__(cls)
        type(fresh).__name__ = name
        return fresh

    def _fill(self, held: dict[str, Any], graph: Graph) -> None:
        vars(self).update(held)
        graph._tracer_cls = None
        self.graph = graph

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphForm:
        held = {name: value for name, value in vars(self).items() if name not in _GENERATED}
        memo[id(self)] = fresh = self._empty(type(self).__name__)
        fresh._fill({**copy.deepcopy(held, memo), "meta": dict(self.meta)}, copy.deepcopy(self.graph))
        return fresh

    def __reduce__(self) -> tuple[Any, ...]:
        held = {name: value for name, value in vars(self).items() if name not in _GENERATED}
        return _unpickled, (type(self).__name__, {**held, "meta": {}}, _written(self.graph))


def _unpickled(name: str, held: dict[str, Any], written: tuple[list[_Written], Any]) -> GraphForm:
    return GraphForm._made(name, held, _read(*written))


@dataclass(frozen=True)
class _Ref:
    """The result of a node, by its name."""

    name: str


@dataclass(frozen=True)
class _Written:
    """A node as plain data; `target` is the name of an operator, a function that pickle knows, or a name in the module."""

    op: str
    name: str
    target: Named | Callable[..., Any] | str
    args: Any
    kwargs: Any
    origin: dict[str, Any]


def _written(graph: Graph) -> tuple[list[_Written], Any]:
    """All nodes in their order, and how the program takes its arguments."""
    nodes = [
        _Written(
            node.op,
            node.name,
            named(node.target),
            map_arg(node.args, _ref),
            map_arg(node.kwargs, _ref),
            _origin(node.meta),
        )
        for node in graph.nodes
    ]
    return nodes, getattr(graph._codegen, "pytree_info", None)


def _ref(node: Node) -> Any:
    return _Ref(node.name)


def _origin(meta: Mapping[str, Any]) -> dict[str, Any]:
    """From which modules and which line of code a node comes."""
    stack = (meta.get("nn_module_stack") or {}).items()
    plain = {key: (path, kind if isinstance(kind, str) else kind.__qualname__) for key, (path, kind) in stack}
    return {"nn_module_stack": plain, "stack_trace": meta.get("stack_trace")}


def _read(nodes: Iterable[_Written], taken: Any) -> Graph:
    graph, made = Graph(), dict[str, Node]()

    def found(given: Any) -> Any:
        return made[given.name] if isinstance(given, _Ref) else given

    for one in nodes:
        args, kwargs = map_aggregate(one.args, found), map_aggregate(one.kwargs, found)
        made[one.name] = graph.create_node(one.op, operator_of(one.target), args, kwargs, one.name)  # type: ignore[arg-type]
        made[one.name].meta.update(one.origin)
    graph.set_codegen(CodeGen() if taken is None else _PyTreeCodeGen(taken))
    return graph


class _TakenSizes(nn.Module):
    """Refuses inputs of sizes that the program doesn't take: with them it might run, and be wrong."""

    _is_impure = True  # torch.fx takes it for dead code otherwise

    def __init__(self, names: list[str], sizes: list[tuple[Size, ...] | None], ranges: dict[Any, tuple[Any, Any]]):
        super().__init__()
        self.names, self.sizes, self.ranges = names, sizes, ranges

    def forward(self, *given: Any) -> None:
        if torch.compiler.is_dynamo_compiling() or torch.jit.is_tracing():
            return
        with torch._C.DisableTorchFunction():  # who watches torch calls isn't shown this
            listed = [
                (name, d, size, now)
                for name, sizes, tensor in zip(self.names, self.sizes, given, strict=True)
                if sizes is not None and isinstance(tensor, Tensor) and tensor.dim() == len(sizes)
                for d, (size, now) in enumerate(zip(sizes, tensor.shape, strict=True))
                if isinstance(now, int)  # no symbol
            ]
        known: dict[Any, int] = {}
        for name, d, size, now in listed:
            if getattr(size, "is_symbol", False):
                self._check(name, d, known.setdefault(size, now), now)
                least, most = self.ranges.get(size, (now, now))
                self._check(name, d, now if least <= now <= most else f"{least} to {most}", now)
        for name, d, size, now in listed:
            if not getattr(size, "is_symbol", False):
                wanted = size if isinstance(size, int) else size.subs(known)
                self._check(name, d, now if getattr(wanted, "free_symbols", ()) else int(wanted), now)

    def _check(self, name: str, d: int, wanted: int | str, now: int) -> None:
        if wanted != now:
            raise CaptureError(
                f"the graph form takes only size {wanted} of dimension {d} of {name!r}, not {now}, as it was captured so: "
                "cut for the size that you need, or with form='module'"
            )


def _ask_sizes(module: GraphModule) -> None:
    """Let a program of torch.export ask for the sizes that it was captured for, as its hook does that copies are without."""
    bounds = getattr(module, "range_constraints", None)
    given = module.graph.find_nodes(op="placeholder")
    if bounds is None or not given:
        return
    sizes = [_sizes(node.meta.get("val")) for node in given]
    used = {size for shape in sizes for size in shape or () if getattr(size, "is_symbol", False)}
    ranges = {s: (_least(bounds[s].lower), _most(bounds[s].upper)) for s in used if s in bounds}
    module.add_submodule(_SIZES, _TakenSizes([node.name for node in given], sizes, ranges))
    with module.graph.inserting_after(given[-1]):
        module.graph.call_module(_SIZES, tuple(given))


def _sizes(value: Any) -> tuple[Size, ...] | None:
    if not isinstance(value, Tensor):
        return None
    return tuple(size.node.expr if isinstance(size, torch.SymInt) else size for size in value.shape)


def _least(bound: Any) -> int:
    return int(bound) if bound > _KEPT else 0


def _most(bound: Any) -> float:
    return int(bound) if bound.is_Integer else float("inf")
