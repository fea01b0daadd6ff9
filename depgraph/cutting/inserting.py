"""Products put into the graph form of a model, on edges along which a stream flows: each with a square weight, at first the identity.

What a product reads and what it writes are dims of their own from then on, so that they can be cut, or turned, apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from depgraph.cutting.inputs import describe_inputs
from depgraph.cutting.module import Undo, take_back
from depgraph.cutting.omitting import Alike
from depgraph.cutting.program import Way, cut_programs
from depgraph.cutting.record import FORMAT, Record, original_of
from depgraph.cutting.varying import fixed_sizes
from depgraph.errors import CutError

if TYPE_CHECKING:
    from depgraph.dependency import DependencyGraph

Path = tuple[int | str, ...]
_OUTPUT = ""


@dataclass(frozen=True)
class Place:
    """Where an operator takes an operand: its name in a traced graph (empty for what the model puts out), and the way to the
    operand among its arguments."""

    user: str
    path: Path


@dataclass(frozen=True)
class Product:
    """A product with a weight [size, size] over dimension `dim` of what stands at all of `places`, which is the same."""

    places: tuple[Place, ...]
    dim: int
    size: int

    @staticmethod
    def weight(number: int) -> str:
        """The name of the weight of the product of that number."""
        return f"{holder(number)}.weight"


def holder(number: int) -> str:
    """The name of the module that holds the weight of a product."""
    return f"product_{number}"


def places_of(user: Node, given: Node) -> list[Place]:
    """Where an operator of a traced graph takes what a node made."""
    name = _OUTPUT if user.op == "output" else user.name
    return [Place(name, path) for path in _paths((user.args, user.kwargs), given)]


def _paths(held: Any, given: Node, path: Path = ()) -> Iterator[Path]:
    if held is given:
        yield path
    elif isinstance(held, (list, tuple, dict)):
        items = held.items() if isinstance(held, dict) else enumerate(held)
        for key, item in items:
            yield from _paths(item, given, (*path, key))


def with_products(
    graph: DependencyGraph, products: Sequence[Product], untied: Sequence[str] = ()
) -> tuple[GraphModule, tuple[str, ...]]:
    """The graph form of a graph's model with these products, which computes what the model does, and notes on its sizes.

    Its weights are copies. `untied`: names of tensors that have been untied (`untie`) in the model before it was traced. Raises
    CutError where the model has no graph form, or none with such places.
    """
    found = next(_ways(graph, products))
    found.model.depgraph_record = {**_record(graph, products), "untied": list(untied)}  # type: ignore[assignment]
    return found.model, fixed_sizes(graph, found.model, found.inputs)


def untie(model: nn.Module, names: Iterable[str]) -> Undo:
    """Let parameters, by name, be ones of their own, with the same values; the function returned takes it back."""
    undo: list[Undo] = []
    for name in names:
        path, _, key = name.rpartition(".")
        held = model.get_submodule(path)._parameters
        old = held[key]
        assert old is not None
        held[key] = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
        undo.append(lambda held=held, key=key, old=old: held.__setitem__(key, old))  # type: ignore[misc]
    return lambda: take_back(undo)


def _ways(graph: DependencyGraph, products: Sequence[Product]) -> Iterator[Way]:
    return cut_programs(graph.cut_plan({}), lambda module, nodes: _put(module, nodes, products))


def _put(module: GraphModule, nodes: Alike, products: Sequence[Product]) -> None:
    order = {node: k for k, node in enumerate(module.graph.nodes)}
    for number, product in enumerate(products):
        users = [(_user(module, nodes, place.user), place.path) for place in product.places]
        given = _at(*users[0])
        first = min((user for user, _ in users), key=order.__getitem__)
        made = _product(module, given, first, number, product)
        for user, path in users:
            if _at(user, path) is not given:
                raise CutError(
                    f"{user.name} takes something else than {given.name} in the graph form: use form='module'"
                )
            _replace(user, path, made)


def _user(module: GraphModule, nodes: Alike, name: str) -> Node:
    if name != _OUTPUT:
        return nodes[name]
    return next(iter(module.graph.find_nodes(op="output")))


def _at(user: Node, path: Path) -> Node:
    held: Any = (user.args, user.kwargs)
    for key in path:
        held = held[key]
    if not isinstance(held, Node):
        raise CutError(f"{user.name} has no operand where one was seen: use form='module'")
    return held


def _replace(user: Node, path: Path, made: Node) -> None:
    def changed(held: Any, rest: Path) -> Any:
        if not rest:
            return made
        items = dict(held) if isinstance(held, dict) else dict(enumerate(held))
        items[rest[0]] = changed(items[rest[0]], rest[1:])
        return items if isinstance(held, dict) else type(held)(items.values())

    user.args, user.kwargs = changed((user.args, user.kwargs), path)


def _product(module: GraphModule, given: Node, before: Node, number: int, product: Product) -> Node:
    """Nodes that multiply a dim of what a node made with a fresh weight, in front of `before`."""
    like = given.meta["val"]
    weight = torch.eye(product.size, dtype=like.dtype, device=_device(module))
    module.add_submodule(holder(number), nn.Module())
    module.get_submodule(holder(number)).register_parameter("weight", nn.Parameter(weight))
    aten = torch.ops.aten
    with module.graph.inserting_before(before):
        held = module.graph.get_attr(product.weight(number))
        last = product.dim % like.ndim == like.ndim - 1
        here = given if last else module.graph.call_function(aten.transpose.int, (given, product.dim, -1))
        here = module.graph.call_function(aten.linear.default, (here, held))
        return here if last else module.graph.call_function(aten.transpose.int, (here, product.dim, -1))


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _record(graph: DependencyGraph, products: Iterable[Product]) -> Record:
    """JSON-able: all that is needed to put the same products in again, and the record of earlier cuts."""
    earlier = getattr(graph.model, "depgraph_record", None)
    cost = asdict(graph.dense_cost)
    return {
        "format": FORMAT,
        "form": "products",
        "products": [asdict(product) for product in products],
        "added": [{"target": p.weight(k), "shape": [p.size, p.size]} for k, p in enumerate(products)],
        "removed": [],
        "attributes": [],
        "axes": {},
        "groups": {},
        "branches": [],
        "config": {},
        "free": sorted(graph.free),
        "inputs": describe_inputs(graph.args, graph.kwargs),
        "vocabulary": {},
        "cost": {"before": cost, "after": cost},
        "original": original_of(graph.model, graph.held()),
        "earlier": [*earlier["earlier"], {k: v for k, v in earlier.items() if k != "earlier"}] if earlier else [],
    }


def again(graph: DependencyGraph, record: Record) -> GraphModule:
    """What `with_products` made of a graph like this one, without its values. Raises CutError as that does."""
    products = [
        Product(tuple(Place(p["user"], tuple(p["path"])) for p in one["places"]), one["dim"], one["size"])
        for one in record["products"]
    ]
    model: GraphModule = next(_ways(graph, products)).model
    return model
