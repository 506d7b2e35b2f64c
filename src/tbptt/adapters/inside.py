"""State that a module keeps in its own buffers and attributes, made into a state that is passed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tbptt.errors import CapabilityError
from tbptt.side_state import preserved
from tbptt.tree import Tree, copy, detach, leaves, tensors

__all__ = ["Inside"]

Snapshot: TypeAlias = dict[str, Any]
"""The values of attributes and buffers, by "path.of.module:name"; what a module does not have is left out."""

_NOT_STATE = frozenset(vars(nn.Module()))  # training, hooks, parameters, submodules: what every module has


class Inside:
    """Calls a module that keeps its state inside, and takes the state out.

    Between calls the module is as it was before the first one: what it keeps is put in before a call, and
    taken out after it. Which attributes that concerns is found out by running it once.

    Args:
        reset: puts the module, as the first argument, to the start of a sequence; None: it stands there already.
        call: `call(module, inputs) -> outputs`.
    """

    def __init__(self, reset: Callable[[nn.Module], object] | None, call: Callable[[nn.Module, Tree], Tree]) -> None:
        self.reset, self.call = reset, call
        self.names: frozenset[str] | None = None

    def __call__(self, module: nn.Module, inputs: Tree, state: Snapshot | None) -> tuple[Tree, Snapshot]:
        """Run the module from `state`; None for the start of a sequence."""
        if self.names is None:
            self.names = self._find(module, inputs)
        if self.reset is not None:
            self.reset(module)
        start = self._read(module)
        _write(module, self.names, copy(start if state is None else state))  # the call may write into it
        try:
            outputs = self.call(module, inputs)
            return outputs, self._read(module)
        finally:
            # A start that `reset` has computed may have a graph, with which no module could be copied.
            _write(module, self.names, start if self.reset is None else detach(start))

    def _read(self, module: nn.Module) -> Snapshot:
        assert self.names is not None
        found = ((full, *_place(module, full)) for full in self.names)
        return {full: room[name] for full, room, name in found if name in room}

    def _find(self, module: nn.Module, inputs: Tree) -> frozenset[str]:
        """Return the names of what a call changes, in eval mode, where running statistics do not move."""
        modes = {each: each.training for each in module.modules()}  # parts may be frozen
        if self.reset is not None:
            self.reset(module)
        before = _everything(module)
        with torch.inference_mode(False):  # these copies stay in the module
            held = {name: _copied(value) for name, value in before.items()}
        try:
            with torch.no_grad(), preserved(device=tensors(inputs)[0].device):
                module.eval()
                self.call(module, inputs)
        finally:
            for each, mode in modes.items():
                each.training = mode
            after = _everything(module)
            names = frozenset(name for name in {*before, *after} if not _same(held, before, after, name))
            _write(module, names, held)
        if not any(tensors(after[name]) for name in names if name in after):
            raise CapabilityError(
                f"{type(module).__name__} was expected to keep its state inside, but no buffer or attribute that "
                "holds a tensor changed when it was run: there is nothing to carry",
                fix="tbptt.stateful(module, ...) without inside",
            )
        return names


def _everything(module: nn.Module) -> Snapshot:
    found: Snapshot = {}
    for path, each in module.named_modules():
        for name, value in [*vars(each).items(), *each._buffers.items()]:  # pyright: ignore[reportPrivateUsage]
            if name not in _NOT_STATE:
                found[f"{path}:{name}"] = value
    return found


def _write(module: nn.Module, names: frozenset[str], values: Snapshot) -> None:
    """Give the module these values of `names`, and take away what they do not have."""
    for full in names:
        room, name = _place(module, full)
        if full in values:
            room[name] = values[full]
        else:
            room.pop(name, None)


def _place(module: nn.Module, full: str) -> tuple[dict[str, Any], str]:
    """Return where a value is kept: straight in the dicts, as __setattr__ refuses or copies some values."""
    path, _, name = full.rpartition(":")
    owner = module.get_submodule(path)
    buffers: dict[str, Any] = owner._buffers  # pyright: ignore[reportPrivateUsage]
    return (buffers if name in buffers else owner.__dict__), name


def _copied(value: Any) -> Any:
    """Return a copy of a value that a call may write into; what cannot be copied is compared by identity."""
    try:
        return copy(value)
    except CapabilityError:
        return value


def _same(held: Snapshot, before: Snapshot, after: Snapshot, name: str) -> bool:
    """Tell whether a call has left an attribute alone: not replaced by another, nor written into."""
    if name not in before or name not in after:
        return False
    if isinstance(before[name], Tensor) and before[name] is not after[name]:
        return False  # perhaps of equal values, this time
    try:
        old, new = leaves(held[name]), leaves(after[name])
    except CapabilityError:
        return before[name] is after[name]
    return len(old) == len(new) and all(map(_equal, old, new))


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.shape == right.shape and left.dtype == right.dtype and torch.equal(left, right)
    return type(left) is type(right) and bool(left == right)
