"""A state taken apart by lane: each lane's numbers as one row.

Letters: B lanes, S numbers of a lane's state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tbptt.errors import CapabilityError
from tbptt.estimators.gradients import Gradients
from tbptt.tree import LaneDims, Tree, as_complex, as_real, differentiable, tensors

__all__ = ["cotangent_of", "known_dims", "rows_of"]

_NOT_FOUND = (
    "it could not be found out which dimension of its tensors the lanes are: the model does not go on after a window "
    "of so many steps, or does not take one lane more"
)


def rows_of(state: Tree, dims: LaneDims | None, gradient: Gradients | None = None) -> Tensor:
    """Return a state's differentiable numbers, or their gradient, as one row for each lane. Shape (B, S).

    Complex numbers count as two, in which the gradient is what it is for real ones. Whole numbers have no gradient
    and are left out.

    Args:
        state: the state.
        dims: the lane dimension of each of its tensors.
        gradient: of each differentiable tensor, None for zeros; left out: the state itself.

    Raises:
        CapabilityError: a tensor that cannot be taken apart by lane.
    """
    values = differentiable(state)
    chosen = values if gradient is None else gradient
    dtype = torch.float32
    parts: list[Tensor] = []
    for leaf, value, dim in zip(values, chosen, _lane_dims(state, dims), strict=True):
        value = torch.zeros_like(leaf) if value is None else value.detach()
        value = as_real(value)
        dtype = torch.promote_types(dtype, value.dtype)  # half precision is too coarse to learn in
        parts.append(value.movedim(dim, 0).reshape(value.shape[dim], -1))
    return torch.cat([part.to(dtype) for part in parts], 1)


def cotangent_of(rows: Tensor, state: Tree, dims: LaneDims | None) -> Gradients:
    """Return rows (B, S) as the gradient of each differentiable tensor of a state: `rows_of` the other way round."""
    begin = 0
    found: Gradients = []
    for leaf, dim in zip(differentiable(state), _lane_dims(state, dims), strict=True):
        like = as_real(leaf.detach())
        shape = like.movedim(dim, 0).shape
        end = begin + shape[1:].numel()
        part = rows[:, begin:end].to(like.dtype).reshape(shape).movedim(0, dim)
        found.append(as_complex(part) if leaf.is_complex() else part.contiguous())
        begin = end
    return found


def known_dims(dims: LaneDims | None) -> LaneDims:
    """Return the lane dimensions of a state, which were looked for.

    Raises:
        CapabilityError: they were not found.
    """
    if dims is None:
        raise _refusal(_NOT_FOUND)
    return dims


def _lane_dims(state: Tree, dims: LaneDims | None) -> list[int]:
    leaves = tensors(state)
    if dims is not None and len(dims) == len(leaves):
        found = [dim for leaf, dim in zip(leaves, dims, strict=True) if leaf.is_floating_point() or leaf.is_complex()]
        known = [dim for dim in found if dim is not None]
        if found and len(known) == len(found):
            return known
        why = (
            "it has no tensor with a gradient" if not found else "a tensor of it has no lanes, or grows with every step"
        )
    else:
        why = _NOT_FOUND
    raise _refusal(why)


def _refusal(why: str) -> CapabilityError:
    return CapabilityError(
        f"a state of a fixed size in each lane was expected, to be taken apart by lane, but {why}",
        fix="TBPTT(k1, k2); windows that the model goes on after; or a lane dimension in each tensor of the state",
    )
