"""Trees of tensors: the states, inputs, targets and outputs of models.

A tree is a tensor, None, a number, or any nesting of tuples, named tuples, lists and dicts of trees.
Numbers and None are carried along untouched.

Letters: T time, B lanes, S number of state leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor

from tbptt.errors import CapabilityError, ShapeError

Tree: TypeAlias = Any
"""A tensor, None, a number, or any nesting of tuples, named tuples, lists and dicts of them."""

LaneDims: TypeAlias = tuple[int | None, ...]
"""For each tensor leaf of a state its lane dimension; None for a leaf that all lanes share."""

_PLAIN = (Tensor, bool, int, float, complex, str)


def tree_map(function: Callable[[Tensor], Any], tree: Tree) -> Tree:
    """Apply `function` to every tensor of `tree`; everything else stays as it is."""
    if isinstance(tree, Tensor):  # these two are the common cases, and a fifth of the time
        return function(tree)
    if _is_flat(tree):
        return tuple([function(leaf) for leaf in tree])

    def on_tensors(leaf: Any) -> Any:
        return function(leaf) if isinstance(leaf, Tensor) else leaf

    return optree.tree_map(on_tensors, tree)


def _is_flat(tree: Tree) -> bool:
    """Tell whether `tree` is a plain tuple of tensors, as the state of an LSTM is."""
    if type(tree) is not tuple:
        return False
    for leaf in tree:
        if not isinstance(leaf, Tensor):
            return False
    return True


def tensors(tree: Tree) -> list[Tensor]:
    """Return the tensors of `tree`, in a fixed order.

    Raises:
        CapabilityError: a leaf is neither a tensor nor a plain value, so that it could hide state.
    """
    if isinstance(tree, Tensor):
        return [tree]
    if _is_flat(tree):
        return list(tree)
    leaves = optree.tree_leaves(tree)
    for leaf in leaves:
        if not isinstance(leaf, _PLAIN):
            raise CapabilityError(
                f"a tree of tensors was expected, but it holds a {type(leaf).__name__}, which cannot be "
                "looked into: what it carries could be neither detached, reset nor saved",
                fix="return the state as tensors in tuples, named tuples, lists or dicts",
            )
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def replace_tensors(tree: Tree, new: Sequence[Tensor]) -> Tree:
    """Return `tree` with its tensors replaced, in the order of `tensors`."""
    supply = iter(new)
    return tree_map(lambda _: next(supply), tree)


def detach(tree: Tree) -> Tree:
    """Return `tree` with every tensor cut from its graph (sharing memory)."""
    return tree_map(Tensor.detach, tree)


def clone(tree: Tree) -> Tree:
    """Return `tree` with every tensor copied and cut from its graph."""
    return tree_map(lambda leaf: leaf.detach().clone(), tree)


def to(tree: Tree, device: torch.device | str) -> Tree:
    """Return `tree` with every tensor on `device`."""
    return tree_map(lambda leaf: leaf.to(device, non_blocking=True), tree)


def time_slice(tree: Tree, begin: int, end: int) -> Tree:
    """Return the steps `begin:end` of a tree whose leaves are (T, ...), as views."""
    return tree_map(lambda leaf: leaf[begin:end], tree)


def time_cat(trees: Sequence[Tree]) -> Tree:
    """Join trees of leaves (T_i, ...) along time."""
    if len(trees) == 1:
        return trees[0]
    if isinstance(trees[0], Tensor):
        return torch.cat(list(trees))
    return replace_tensors(trees[0], [torch.cat(parts) for parts in zip(*map(tensors, trees), strict=True)])


def differentiable(tree: Tree) -> list[Tensor]:
    """Return the tensors of `tree` that can have a gradient: floating-point or complex."""
    return [leaf for leaf in tensors(tree) if leaf.is_floating_point() or leaf.is_complex()]


def as_leaves(tree: Tree) -> Tree:
    """Return `tree` detached, its differentiable tensors as new leaves that require a gradient."""

    def leaf_of(leaf: Tensor) -> Tensor:
        fresh = leaf.detach()
        return fresh.requires_grad_() if fresh.is_floating_point() or fresh.is_complex() else fresh

    return tree_map(leaf_of, tree)


def num_bytes(tree: Tree) -> int:
    """Return the memory that the tensors of `tree` refer to, in bytes."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tensors(tree))


def all_finite(tree: Tree) -> bool:
    """Tell whether no tensor of `tree` holds NaN or infinity."""
    return all(bool(torch.isfinite(leaf).all()) for leaf in differentiable(tree))


def check_lanes(state: Tree, dims: LaneDims, lanes: int) -> None:
    """Refuse a state that does not have `lanes` lanes.

    Raises:
        ShapeError: the number of leaves, or the size of a leaf's lane dimension, has changed.
    """
    leaves = tensors(state)
    if len(leaves) != len(dims):
        raise ShapeError(
            f"the model's state had {len(dims)} tensors when it was first seen and now has {len(leaves)}: "
            "it cannot be told which of them belongs to which lane",
            fix="let the model return a state of the same structure at every call",
        )
    for index, (leaf, dim) in enumerate(zip(leaves, dims, strict=True)):
        if dim is not None and (leaf.ndim <= dim or leaf.shape[dim] != lanes):
            raise ShapeError(
                f"state tensor {index} was expected to have {lanes} lanes in dimension {dim}, but has shape "
                f"{tuple(leaf.shape)}: the lanes of its past are no longer the lanes of its future",
                fix="let the model keep the lane dimension of its state, and feed windows of one number of lanes",
            )


def where_lanes(chosen: Tensor, fresh: Tree, state: Tree, dims: LaneDims) -> Tree:
    """Return `state` with the `chosen` lanes taken from `fresh`; no gradient crosses into those.

    Args:
        chosen: the lanes to replace. Shape (B,), bool.
        fresh: a tree like `state`, or None for zeros.
        state: the tree to take the other lanes from.
        dims: the lane dimension of each tensor of `state`.

    Raises:
        CapabilityError: a leaf has no lane dimension, so that no single lane of it can be replaced.
    """
    old = tensors(state)
    new = [torch.zeros_like(leaf) for leaf in old] if fresh is None else tensors(fresh)
    if len(new) != len(old):
        raise ShapeError(
            f"initial_state() returned {len(new)} tensors, but the model's state has {len(old)}",
            fix="return the same structure from initial_state(lanes) as from the model itself",
        )
    merged: list[Tensor] = []
    for index, (fresh_leaf, leaf, dim) in enumerate(zip(new, old, dims, strict=True)):
        if dim is None:
            raise CapabilityError(
                f"state tensor {index} of shape {tuple(leaf.shape)} is shared by all lanes, so one lane "
                "cannot be reset without the others",
                fix="give every tensor of the state a lane dimension, or reset all lanes at the same step",
            )
        shape = [1] * leaf.ndim
        shape[dim] = -1
        merged.append(torch.where(chosen.view(shape), fresh_leaf, leaf))
    return replace_tensors(state, merged)
