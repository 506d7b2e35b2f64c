"""Modules that overwrite, within a call, what the backward pass of that call needs.

Torch has `torch.autograd.graph.allow_mutation_on_saved_tensors`, whose graphs live no longer than its context:
too short for a graph that is kept from window to window. This is the same idea with graphs that live as long
as anyone holds them, at little more than half the time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from tbptt.side_state import preserved
from tbptt.tree import Tree, as_leaves, copy, differentiable, tensors, tree_map
from tbptt.weights import Saved, copy_to_save

__all__ = ["overwrites_what_it_needs", "protected"]

_SYMPTOMS = ("modified by an inplace operation", "has been modified inplace")


class _CopyBeforeWrite(TorchDispatchMode):
    """Keeps a list of what was saved, by storage, and copies it before an operation writes there."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: defaultdict[int, WeakSet[Saved]] = defaultdict(WeakSet)

    def pack(self, tensor: Tensor) -> Saved | Tensor:
        kept = copy_to_save(tensor)
        if kept is not None:
            return kept
        saved = Saved(tensor)
        self.saved[_address(tensor)].add(saved)
        return saved

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for index, name in _written(func):
            target = args[index] if index < len(args) else kwargs.get(name)
            for tensor in target if isinstance(target, (list, tuple)) else (target,):
                for saved in self.saved.pop(_address(tensor), ()) if isinstance(tensor, Tensor) else ():
                    saved.save()
        return func(*args, **kwargs)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


@cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Return place and name of the arguments that an operation writes to."""
    arguments = enumerate(func._schema.arguments)
    return tuple((index, each.name) for index, each in arguments if each.alias_info and each.alias_info.is_write)


@contextmanager
def protected() -> Generator[None]:
    """Let the operations inside overwrite each other's tensors, and still have the right gradient.

    What was saved for the backward pass is copied just before it is overwritten. Writing to it after the
    context is an error in the backward pass, as without it.

    Cost: a call of Python for each operation, 2.3 times the time of a tiny Mamba2 and 1.2 of one of 512 x 4 layers
        (benchmarks/speed/protection.py); memory of the copies.
    """
    mode = _CopyBeforeWrite()
    with saved_tensors_hooks(mode.pack, Saved.unpack), mode:
        yield


def overwrites_what_it_needs(
    module: nn.Module,
    call: Callable[[nn.Module, Tree, Tree | None], tuple[Tree, Tree]],
    inputs: Tree,
    start: Callable[[int], Tree | None],
) -> bool:
    """Find out by experiment whether a call breaks its own backward pass, or that of the call before.

    Args:
        module: the module; its buffers, attributes and the random generators are afterwards as they were.
        call: how to call it.
        inputs: what to call it with, twice. Leaves (T, B, ...); one lane is tried first.
        start: number of lanes -> what the first call is given as its state.
    """
    one_lane = tree_map(lambda leaf: leaf[:, :1].detach(), inputs)
    with torch.enable_grad(), preserved(module, device=tensors(inputs)[0].device):
        for sample in (one_lane, tree_map(Tensor.detach, inputs)):
            try:
                outputs, state = call(module, sample, start(tensors(sample)[0].shape[1]))
                given = as_leaves(state)
                later, end = call(module, sample, copy(given))
                for roots in ([*differentiable(outputs), *differentiable(state)], [later, end]):
                    _pull(roots, [*module.parameters(), *differentiable(given)])
            except RuntimeError as error:
                if any(symptom in str(error) for symptom in _SYMPTOMS):
                    return True
            except Exception:  # it takes no single lane; if it cannot be run at all, that shows when it is run
                continue
            else:
                return False
    return False


def _pull(roots: Tree, leaves: list[Tensor]) -> None:
    total = [leaf.abs().sum() for leaf in differentiable(roots) if leaf.requires_grad]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if total and wanted:
        torch.autograd.grad(sum(total[1:], total[0]), wanted, allow_unused=True, retain_graph=True)
