"""Gradients as lists and by name, and what a backward pass does to parameters besides giving them one.

Letters: P parameters.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from tbptt.errors import CapabilityError

__all__ = ["Gradients", "add", "after_hooks", "gradients_of", "numbers_of", "own", "scaled", "with_numbers"]

Gradients: TypeAlias = list[Tensor | None]
"""One for each tensor asked about; None where nothing arrived, which is a zero."""


def gradients_of(
    roots: Sequence[Tensor], seeds: Sequence[Tensor], asked: Sequence[Tensor], *, keep: bool = False
) -> Gradients:
    """Return the gradients of `roots` with respect to the tensors asked about, as parts of an update.

    Hooks on these tensors are not called, as this may be a part of the gradient only: `after_hooks` calls them on the
    whole. A function that calls `backward()` within its own backward pass, as adjoint solvers and reversible layers do,
    adds to `.grad` on the side: that is counted in, and `.grad` stays as it was.

    Args:
        roots: each requires a gradient.
        seeds: the gradient of each.
        asked: parameters and states.
        keep: whether the graph will be used again.

    Raises:
        CapabilityError: activation checkpointing of the older kind, which cannot be asked for single gradients.
    """
    leaves = [each for each in asked if each.is_leaf]
    standing = [each.grad for each in leaves]
    with _without_hooks(leaves):
        for each, gradient in zip(leaves, standing, strict=True):
            if gradient is not None:
                each.grad = None
        try:
            found = list(_grad(roots, seeds, asked, keep))
            if any(each.grad is not None for each in leaves):
                found = add(found, [each.grad if each.is_leaf else None for each in asked])
        finally:
            for each, gradient in zip(leaves, standing, strict=True):
                each.grad = gradient
    return found


def _without_hooks(leaves: Sequence[Any]) -> AbstractContextManager[None]:
    hooks = [each._backward_hooks for each in leaves] + [each._post_accumulate_grad_hooks for each in leaves]
    hooks = [each for each in hooks if each]
    return _emptied(hooks) if hooks else nullcontext()


@contextmanager
def _emptied(hooks: Sequence[dict[int, Any]]) -> Generator[None]:
    held = [dict(each) for each in hooks]
    for each in hooks:
        each.clear()
    try:
        yield
    finally:
        for each, before in zip(hooks, held, strict=True):
            each.update(before)


def _outside_autocast(device: str) -> AbstractContextManager[Any]:
    """Go back as torch advises: each operation in the type that it had on the way forward, not narrowed once more."""
    narrowed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if narrowed else nullcontext()


def _grad(
    roots: Sequence[Tensor], seeds: Sequence[Tensor], asked: Sequence[Tensor], keep: bool
) -> Sequence[Tensor | None]:
    try:
        with _outside_autocast(roots[0].device.type):
            found = torch.autograd.grad(roots, asked, seeds, retain_graph=keep, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant=True" not in str(error):
            raise
        raise CapabilityError(
            "activation checkpointing that can be asked for single gradients was expected, but the model uses "
            "torch.utils.checkpoint with use_reentrant=True: it would send the gradient to all weights there are, "
            "at every boundary",
            fix="torch.utils.checkpoint.checkpoint(..., use_reentrant=False)",
        ) from error
    return cast("Sequence[Tensor | None]", found)


def after_hooks(parameters: Mapping[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return gradients as the hooks of their parameters leave them (`Tensor.register_hook`).

    Args:
        parameters: by name; those without a gradient are not asked.
        gradients: of a whole update, by name, each with memory of its own.
    """
    for name, parameter in parameters.items():
        hooks: Mapping[int, Any] | None = parameter._backward_hooks  # pyright: ignore[reportPrivateUsage]
        if not hooks or name not in gradients:
            continue
        for hook in tuple(hooks.values()):
            with torch.no_grad():
                changed = hook(gradients[name])
            if changed is not None:
                gradients[name] = changed
    return gradients


def add(left: Gradients, right: Gradients) -> Gradients:
    """Return the sum of two lists of gradients; the operands stay as they are."""
    both = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    if any(a.is_sparse != b.is_sparse for a, b in both):  # torch adds a sparse one to a dense one, not the other way
        both = [(b, a) if a.is_sparse else (a, b) for a, b in both]
    sums = iter(torch._foreach_add([a for a, _ in both], [b for _, b in both]) if both else [])  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    return [
        next(sums) if a is not None and b is not None else (b if a is None else a)
        for a, b in zip(left, right, strict=True)
    ]


def scaled(gradients: Gradients, factor: float) -> Gradients:
    """Return gradients times a number; the operand stays as it is."""
    return gradients if factor == 1.0 else [None if each is None else each * factor for each in gradients]


def own(names: Iterable[str], gradients: Gradients) -> dict[str, Tensor]:
    """Return the gradients that there are by name, each with memory of its own.

    Autograd may hand out one tensor twice (both biases of an LSTM), or an expanded scalar: whoever
    scales such gradients in place would scale them twice. Sparse ones come coalesced, so that each row is there once.
    """
    seen: set[int] = set()
    result: dict[str, Tensor] = {}
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is None:
            continue
        numbers = gradient
        if gradient.is_sparse:
            gradient = gradient.coalesce()
            numbers = gradient.values()
        if not numbers.is_contiguous() or numbers.data_ptr() in seen:
            gradient = (
                gradient.clone(memory_format=torch.contiguous_format) if numbers is gradient else gradient.clone()
            )
            numbers = numbers_of(gradient)
        seen.add(numbers.data_ptr())
        result[name] = gradient
    return result


def numbers_of(gradient: Tensor) -> Tensor:
    """Return the numbers of a gradient that are stored: those of its rows for a sparse one, else all of it."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def with_numbers(gradient: Tensor, numbers: Tensor) -> Tensor:
    """Return a gradient with other numbers in the place of those that are stored; see `numbers_of`."""
    if not gradient.is_sparse:
        return numbers
    rows = gradient.coalesce().indices()
    return torch.sparse_coo_tensor(rows, numbers, gradient.shape, is_coalesced=True, check_invariants=False)
