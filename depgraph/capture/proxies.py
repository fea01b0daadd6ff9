"""All that recording needs from private parts of torch, in one place.

`tests/capture/test_recording.py` checks each function here against torch, so that a version that moves them is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.compiler
import torch.fx
import torch.nn.functional
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._library import utils as _library_utils
from torch.fx.experimental import proxy_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_OVERRIDE_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
_COMPILER_FLAGS = ("_is_compiling_flag", "_is_exporting_flag")


class Tracer:
    """Base of a tracer of this library's own."""

    def node_of(self, tensor: Tensor) -> torch.fx.Node | None:
        """The node that stands for a tensor, None for a tensor that wasn't seen."""
        raise NotImplementedError

    def device_of(self, tensor: Tensor) -> torch.device | None:
        """The device that the code is told, None for a tensor that wasn't seen."""
        raise NotImplementedError


class OperatorMode(proxy_tensor.ProxyTorchDispatchMode):
    """Base of a mode that sees every ATen operator before autograd and before composite ones are taken apart.

    torch lets only its own modes see them so early; this one is of that class, and takes none of its behaviour. Within
    autocast and the transforms of torch.func, operators are seen only after these have done their part (`_Below`): they are
    the ones that run.
    """

    def __init__(self, tracer: Any) -> None:
        super().__init__(tracer, "real", pre_dispatch=True)
        self.passing = False
        self._within: list[ExitStack] = []

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operator."""
        raise NotImplementedError

    def see_autocast(self) -> None:
        """Autocast is on: raise what says that it can't be."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See an operator now, or let it pass to where it is taken apart."""
        if self.passing or not _transforming():
            return self.see(func, args, kwargs or {})
        if torch._C._is_any_autocast_enabled():
            self.see_autocast()
        self.passing = True
        try:
            with _Below(self):
                return at_once(func, args, kwargs or {})
        finally:
            self.passing = False

    def __enter__(self) -> Any:
        within = ExitStack()
        within.enter_context(enable_python_dispatcher())
        within.enter_context(_types_unasked())
        self._within.append(within)
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        try:
            return super().__exit__(*error)
        finally:
            self._within.pop().__exit__(*error)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # no wrapper around every call: nothing here is compiled


@contextmanager
def _types_unasked() -> Iterator[None]:
    """Spare torch the search of every operator's arguments for the types of tensors: an `OperatorMode` doesn't read them."""
    before = _library_utils.handle_dispatch_mode

    def handle(mode: Any, func: Any, /, *args: Any, **kwargs: Any) -> Any:
        if isinstance(mode, OperatorMode):
            return mode.__torch_dispatch__(func, (), args, kwargs)
        return before(mode, func, *args, **kwargs)

    _library_utils.handle_dispatch_mode = handle  # type: ignore[assignment]
    try:
        yield
    finally:
        _library_utils.handle_dispatch_mode = before


class _Below(TorchDispatchMode):
    """Shows to the mode above what it let pass, as the operators that it came to."""

    def __init__(self, above: OperatorMode) -> None:
        super().__init__()
        self.above = above

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator."""
        return self.above.see(func, args, kwargs or {})


def at_once(call: Any, args: Any, kwargs: Any) -> Any:
    """Call an operator by torch's C++ dispatcher alone, within an `OperatorMode` that works with its Python one."""
    guard = torch._C._DisablePythonDispatcher()
    try:
        return call(*args, **kwargs)
    finally:
        del guard


def must_be_apart(func: Any, operands: Any) -> bool:
    """Is `func` made of others, of which autograd may keep what no one sees?"""
    if not isinstance(func, torch._ops.OpOverload) or not torch.is_grad_enabled():
        return False
    if not any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(operands)):
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def held_by_torch(tensor: Tensor) -> bool:
    """Does torch itself refer to a tensor, as to the base of a view? Then it refers to the Python object, too."""
    count: int = tensor._use_count()  # type: ignore[attr-defined]
    return count > 1


def storage_key(tensor: Tensor) -> int:
    """The identity of a tensor's storage, for as long as it lives; of a tensor without one (a sparse one), its own."""
    if tensor.layout is not torch.strided:
        return id(tensor)
    return int(tensor.untyped_storage()._cdata)


def is_wrapped(tensor: Tensor) -> bool:
    """Does a transform of torch.func stand in for several tensors, or for another one, with this?"""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _transforming() -> bool:
    return torch._C._is_any_autocast_enabled() or torch._C._functorch.maybe_current_level() is not None


def in_backward() -> bool:
    """Does autograd's engine run now?"""
    return torch._C._current_graph_task_id() != -1


def active_tracer() -> Any | None:
    """The tracer of the capture in progress, None when there is none."""
    mode = proxy_tensor.get_proxy_mode()
    return None if mode is None else mode.tracer


def node_of(tensor: Tensor, tracer: Any) -> torch.fx.Node | None:
    """The graph node that stands for `tensor` in the capture of `tracer`, None for a tensor it has not seen."""
    if isinstance(tracer, Tracer):
        return tracer.node_of(tensor)
    slot = proxy_tensor.get_proxy_slot(tensor, tracer, None)
    return None if slot is None else slot.proxy.node


def device_of(tensor: Tensor, tracer: Any) -> torch.device | None:
    """The device that the code must be told a tensor is on; None where the tensor's own answer is right."""
    return tracer.device_of(tensor) if isinstance(tracer, Tracer) else None


def last_node(tracer: Any) -> torch.fx.Node:
    """The newest node of the graph that `tracer` builds."""
    return tracer.graph._root._prev


def nodes_after(tracer: Any, node: torch.fx.Node) -> list[torch.fx.Node]:
    """The nodes of `tracer`'s graph that are newer than `node`, oldest first."""
    newer: list[torch.fx.Node] = []
    newest = last_node(tracer)
    while newest is not node:
        newer.append(newest)
        newest = newest._prev
    return newer[::-1]


def size_hint(size: Any) -> int:
    """A dim's size as an int; of a symbolic size its example value, without adding a guard."""
    return size.node.hint if isinstance(size, torch.SymInt) else int(size)


@contextmanager
def function_mode_stack_kept() -> Iterator[None]:
    """Take modes that were left on torch's stack of function modes off again, even after a KeyboardInterrupt."""
    depth = torch._C._len_torch_function_stack()
    try:
        yield
    finally:
        while torch._C._len_torch_function_stack() > depth:
            torch._C._pop_torch_function_stack()


@contextmanager
def exporting_flags() -> Iterator[None]:
    """Let `torch.compiler.is_compiling()` and `is_exporting()` answer as they do during `torch.export.export`."""
    with _flags(True):
        yield


@contextmanager
def no_flags() -> Iterator[None]:
    """Let them answer as they do when a model simply runs."""
    with _flags(False):
        yield


@contextmanager
def _flags(value: bool) -> Iterator[None]:
    before = {name: getattr(torch.compiler, name) for name in _COMPILER_FLAGS}
    try:
        for name in before:
            setattr(torch.compiler, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(torch.compiler, name, value)


@contextmanager
def open_functionals() -> Iterator[None]:
    """Let function modes see the calls inside the Python functions of `torch.nn.functional`, not these as a whole.

    Tensor subclasses that override torch functions are still asked first.
    """
    module = torch.nn.functional
    before = {name: getattr(module, name) for name in _OVERRIDE_CHECKS}
    try:
        for name, check in before.items():
            setattr(module, name, _subclasses_only(check, spread=name == "has_torch_function"))
        yield
    finally:
        for name, check in before.items():
            setattr(module, name, check)


def _subclasses_only(check: Callable[..., bool], spread: bool) -> Callable[..., bool]:
    def subclasses_only(*args: Any) -> bool:
        return any(_overrides(arg) for arg in (args[0] if spread else args)) and check(*args)

    return subclasses_only


def _overrides(value: Any) -> bool:
    kind = type(value)
    if kind is Tensor:
        return False
    handler = getattr(kind, "__torch_function__", torch._C._disabled_torch_function_impl)
    return handler is not torch._C._disabled_torch_function_impl
