"""Trees of tensors: the states, inputs, targets and outputs of models.

A tree is a tensor, None, a number, or any nesting of tuples, named tuples, lists, dicts and objects of trees:
an object of a Python class is taken apart by its attributes and put together again as a new one. Numbers and
None are carried along untouched.

Letters: T time, B lanes, S number of state leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor

from tbptt.errors import CapabilityError, ShapeError
from tbptt.opaque import CONSTANTS, is_container, parts, rebuild, refuse

Tree: TypeAlias = Any
"""A tensor, None, a number, or any nesting of tuples, named tuples, lists, dicts and objects of them."""

LaneDims: TypeAlias = tuple[int | None, ...]
"""For each tensor leaf of a state its lane dimension; None for a leaf that belongs to all lanes together."""

_NAMESPACE = "tbptt"  # of the classes that were made known to optree here, and are for nobody else
_LEAVES = (Tensor, *CONSTANTS)


def tree_map(function: Callable[[Tensor], Any], tree: Tree) -> Tree:
    """Apply `function` to every tensor of `tree`; everything else stays as it is."""
    if isinstance(tree, Tensor):  # these two are the common cases, and a fifth of the time
        return function(tree)
    if _is_flat(tree):
        return tuple([function(leaf) for leaf in tree])

    leaves, spec = _flatten(tree)
    return spec.unflatten([function(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves])


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
    return [leaf for leaf in _flatten(tree)[0] if isinstance(leaf, Tensor)]


def leaves(tree: Tree) -> list[Any]:
    """Return what `tree` holds in its containers: the tensors, and the plain values too."""
    return _flatten(tree)[0]


def _flatten(tree: Tree) -> tuple[list[Any], optree.PyTreeSpec]:
    """Return the leaves of `tree` and its structure; classes met for the first time are made known."""
    while True:
        try:
            leaves, spec = optree.tree_flatten(tree, namespace=_NAMESPACE)
        except RecursionError:
            raise CapabilityError(
                "a tree of tensors was expected, but an object in it leads back to itself: there would be no end "
                "to what is detached, reset or saved",
                fix="leave the reference back out of the state",
            ) from None
        strange = [leaf for leaf in leaves if not isinstance(leaf, _LEAVES)]
        if not strange:
            return leaves, spec
        for leaf in strange:
            _make_known(leaf)


def _make_known(value: Any) -> None:
    kind: type[Any] = type(value)
    if not is_container(kind):
        raise refuse(value)

    def apart(obj: Any) -> tuple[tuple[Any, ...], tuple[str, ...], tuple[str, ...]]:
        found = parts(obj)
        names = sorted(found)  # two objects may have got their attributes in another order
        return tuple(found[name] for name in names), tuple(found), tuple(names)

    def together(names: Any, values: Iterable[Any]) -> Any:
        found = dict(zip(sorted(names), values, strict=True))
        return rebuild(kind, {name: found[name] for name in names})

    if not optree.register_pytree_node.get(kind, namespace=_NAMESPACE):  # it may stand there twice
        optree.register_pytree_node(kind, apart, together, namespace=_NAMESPACE)


def leaf_names(tree: Tree) -> list[str]:
    """Return the place of each tensor of `tree`, in the order of `tensors`.

    Example:
        >>> leaf_names({"h": (torch.zeros(1), torch.zeros(2))})
        ['h[0]', 'h[1]']
    """
    leaves = _flatten(tree)[0]
    paths = optree.tree_paths(tree, namespace=_NAMESPACE)
    return [_place(path) for path, leaf in zip(paths, leaves, strict=True) if isinstance(leaf, Tensor)]


def _place(path: tuple[Any, ...]) -> str:
    place = ""
    for entry in path:
        if entry not in ("{}", "[]"):  # the items of an object that is itself a dict or a list
            place += f".{entry}" if isinstance(entry, str) else f"[{entry}]"
    return place.removeprefix(".") or "state"


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


def copy(tree: Tree) -> Tree:
    """Return `tree` with every tensor copied, in its graph, and every container and object a new one."""
    return tree_map(Tensor.clone, tree)


def select_lanes(tree: Tree, lanes: Tensor, dims: LaneDims) -> Tree:
    """Return a state of some of its lanes, in the order given; what all lanes share stays as it is.

    Args:
        tree: the state.
        lanes: their indices; one may come twice. Shape (L,), int64.
        dims: the lane dimension of each tensor of the state.
    """
    old = tensors(tree)
    chosen = [
        leaf if dim is None else leaf.index_select(dim, lanes.to(leaf.device))
        for leaf, dim in zip(old, dims, strict=True)
    ]
    return replace_tensors(tree, chosen)


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


def as_real(value: Tensor) -> Tensor:
    """Return a complex tensor (...) as its two parts (..., 2), a real one as it is; shares memory where it can."""
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def as_complex(parts: Tensor) -> Tensor:
    """Return two parts (..., 2) as a complex tensor (...), wherever in memory they lie.

    A copy: torch views as complex only what begins at an even place, and a part of a packed row need not.
    """
    return torch.view_as_complex(parts.clone(memory_format=torch.contiguous_format))


def num_bytes(tree: Tree) -> int:
    """Return the memory that the tensors of `tree` refer to, in bytes."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tensors(tree))


def all_finite(tree: Tree) -> bool:
    """Tell whether no tensor of `tree` holds NaN or infinity."""
    return all(bool(torch.isfinite(leaf).all()) for leaf in differentiable(tree))


def check_lanes(state: Tree, dims: LaneDims, lanes: int) -> None:
    """Refuse a state that does not have `lanes` lanes.

    Raises:
        ShapeError: the size of a leaf's lane dimension has changed.
    """
    leaves = tensors(state)
    if len(leaves) != len(dims):
        return  # some caches fill up step by step; their lanes are asked for, by name, when one is reset
    for index, (leaf, dim) in enumerate(zip(leaves, dims, strict=True)):
        if dim is not None and (leaf.ndim <= dim or leaf.shape[dim] != lanes):
            raise ShapeError(
                f"state tensor {index} was expected to have {lanes} lanes in dimension {dim}, but has shape "
                f"{tuple(leaf.shape)}: the lanes of its past are no longer the lanes of its future",
                fix="let the model keep the lane dimension of its state, and feed windows of one number of lanes",
            )


def numbers(tree: Tree) -> list[complex]:
    """Return the Python numbers in `tree`, which all lanes share.

    Example:
        >>> numbers({"h": torch.zeros(2), "steps": 3, "name": "a"})
        [3]
    """
    return [leaf for leaf in _flatten(tree)[0] if isinstance(leaf, (int, float, complex))]


def where_lanes(chosen: Tensor, fresh: Tree, state: Tree, dims: LaneDims) -> Tree:
    """Return `state` with the `chosen` lanes taken from `fresh`; no gradient crosses into those.

    Args:
        chosen: the lanes to replace. Shape (B,), bool.
        fresh: a tree like `state`, or None for zeros.
        state: the tree to take the other lanes from.
        dims: the lane dimension of each tensor of `state`.

    Raises:
        CapabilityError: a leaf has no lane dimension, so that no single lane of it can be replaced.
        ShapeError: `state` or `fresh` has another number of tensors than `dims`.
    """
    old = tensors(state)
    if len(old) != len(dims):
        raise ShapeError(
            f"the model's state had {len(dims)} tensors when it was first seen and now has {len(old)}: it cannot be "
            "told which of them belongs to which lane, so no single lane can be reset",
            fix="let the model return a state of the same structure at every call, or reset all lanes together",
        )
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
                f"state tensor {index} of shape {tuple(leaf.shape)} has no lanes of its own, or grows with every "
                "step, so one lane cannot be reset without the others",
                fix="give every tensor of the state a lane dimension, or reset all lanes at the same step",
            )
        shape = [1] * leaf.ndim
        shape[dim] = -1
        merged.append(torch.where(chosen.view(shape), fresh_leaf, leaf))
    return replace_tensors(state, merged)
