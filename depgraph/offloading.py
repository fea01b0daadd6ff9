"""Models whose weights lie elsewhere until they are used, as accelerate's hooks put them: on disk, or in the CPU's memory.

Such a model holds tensors on the meta device and its forwards are wrapped, so that each fetches the weights of its module and
lets them go after. It is captured without the wrapping, and a weight is read where it lies when somebody asks for it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from depgraph.closures import follow_copy
from depgraph.errors import CutError

Read = Callable[[], torch.Tensor]
_HOOK, _FORWARD = "_hf_hook", "_old_forward"  # what accelerate leaves on a module that it has wrapped


class Weights(Mapping[str, torch.Tensor]):
    """The tensors of a model by name, each read where it lies when it is asked for."""

    def __init__(self, held: Mapping[str, torch.Tensor], away: Mapping[str, Read]) -> None:
        self.held, self.away = held, away

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.away[name]() if name in self.away else self.held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


def offloaded(model: nn.Module) -> dict[str, Read]:
    """How to read each of the model's tensors that lies elsewhere, by name."""
    modules = model.named_modules(remove_duplicate=False)
    hooks = ((path, module, hook) for path, module in modules for hook in _hooks(module) if _offloads(hook))
    return {
        f"{path}.{name}" if path else name: _reader(hook, name)
        for path, module, hook in hooks
        for name, tensor in _placed(module, hook)
        if tensor.is_meta
    }


def computed_on(model: nn.Module) -> dict[int, torch.device]:
    """By the identity of each tensor that lies elsewhere, the device that the code finds it on."""
    found: dict[int, torch.device] = {}
    for module in model.modules():
        for hook in _hooks(module):
            if _offloads(hook):
                device = torch.device(getattr(hook, "execution_device", None) or "cpu")
                found |= {id(tensor): device for _, tensor in _placed(module, hook) if tensor.is_meta}
    return found


@contextlib.contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Meanwhile the forwards of the model's modules are their own, without what moves weights about."""
    wrapped = [m for m in model.modules() if _HOOK in vars(m) and _FORWARD in vars(m) and "forward" in vars(m)]
    before = [(module, vars(module)["forward"]) for module in wrapped]
    try:
        for module in wrapped:
            module.forward = vars(module)[_FORWARD]
        yield
    finally:
        for module, forward in before:
            module.forward = forward


def own_copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy that holds all of its weights itself; `memo` says, by identity, what stands for what in it.

    Raises CutError where the model can't be copied.
    """
    hooks = [vars(module)[_HOOK] for module in model.modules() if _HOOK in vars(module)]
    if hooks:
        memo = {**memo, **{id(hook): None for hook in hooks}}
        memo |= {id(tensor): new for tensor, new in _brought(model, memo)}
    try:
        fresh: nn.Module = copy.deepcopy(model, memo)
    except Exception as error:
        raise CutError(
            f"{type(model).__name__} can't be copied ({type(error).__name__}: {error}); use plan.apply_() to cut in place"
        ) from error
    follow_copy(fresh, memo)
    _refill_scripted(model, fresh, memo)
    if hooks:
        _unhook(fresh)
        getattr(fresh, "tie_weights", lambda: None)()  # which offloading has parted
    return fresh


def _refill_scripted(model: nn.Module, fresh: nn.Module, memo: Mapping[int, Any]) -> None:
    """Give modules of TorchScript in a copy what `memo` says: they are copied where Python's memo isn't looked at."""
    for path, module in [*model.named_modules()]:
        copied = fresh.get_submodule(path) if isinstance(module, torch.jit.ScriptModule) else None
        if copied is None:
            continue
        for held, new in ((module._parameters, copied._parameters), (module._buffers, copied._buffers)):
            for name, tensor in list(held.items()):
                new[name] = memo.get(id(tensor), new[name])


def _brought(model: nn.Module, memo: Mapping[int, Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What lies elsewhere, and the same brought here, but for what `memo` replaces."""
    away = offloaded(model)
    gone = {f"{path}." for path, module in model.named_modules(remove_duplicate=False) if id(module) in memo}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in away and id(tensor) not in memo and not name.startswith(tuple(gone)):
            yield tensor, like(tensor, away[name]())


def like(held: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """A tensor with these numbers, of the same kind as `held`: a parameter, or not."""
    numbers = numbers.detach().clone()
    return nn.Parameter(numbers, held.requires_grad) if isinstance(held, nn.Parameter) else numbers


def _unhook(model: nn.Module) -> None:
    """Take the wrapping off a copy of a model; its tensors are left as they are."""
    for module in model.modules():
        own = vars(module)
        own.pop(_HOOK, None)
        forward = own.pop(_FORWARD, None)
        if forward is not None:
            own.pop("forward", None)
            if getattr(forward, "__func__", None) is not type(module).forward:
                module.forward = forward


def _hooks(module: nn.Module) -> list[Any]:
    hook = vars(module).get(_HOOK)
    return list(getattr(hook, "hooks", [hook])) if hook is not None else []


def _offloads(hook: Any) -> bool:
    return bool(getattr(hook, "offload", False)) and getattr(hook, "weights_map", None) is not None


def _placed(module: nn.Module, hook: Any) -> list[tuple[str, torch.Tensor]]:
    """The tensors of a module that a hook looks after."""
    below = bool(getattr(hook, "place_submodules", False))
    named: list[tuple[str, torch.Tensor]] = [*module.named_parameters(recurse=below, remove_duplicate=False)]
    return [*named, *module.named_buffers(recurse=below)] if getattr(hook, "offload_buffers", False) else named


def _reader(hook: Any, name: str) -> Read:
    def read() -> torch.Tensor:
        tensor: torch.Tensor = hook.weights_map[name]
        device = getattr(hook, "execution_device", None)
        return tensor if device is None else tensor.to(device)

    return read
