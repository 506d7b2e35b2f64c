"""The largest Lyapunov exponent of a model along its data.

Letters: T time, n real numbers of one lane's state, m directions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tbptt.tree import (
    LaneDims,
    Tree,
    as_leaves,
    as_real,
    detach,
    differentiable,
    replace_tensors,
    select_lanes,
    tensors,
    tree_map,
)
from tbptt.unroll import unroll
from tbptt.window import Window

__all__ = ["lyapunov_exponents"]


def lyapunov_exponents(
    model: nn.Module, window: Window, state: Tree, dims: LaneDims | None, count: int = 1, burn_in: int = 20
) -> Tensor | None:
    """Return the largest exponents of lane 0, by the QR method: nearby states part by exp(exponent) a step.

    Above 0 the model is chaotic along these data, and gradients explode with the lag, whatever is clipped; below 0
    they vanish in the long run. Neither says how long a look-back must be: a matrix whose powers vanish at last may
    carry an influence far before that.

    Args:
        window: the steps. The Jacobians are taken at each of them.
        state: the state before them.
        dims: the lane dimension of each tensor of it.
        count: how many exponents, m.
        burn_in: steps by which the directions settle, not counted.

    Returns:
        Exponents a step (natural logarithm), falling. Shape (m,), float64. None where the lanes of the state are not
        known, or the model is not run by single steps.

    Cost: for each step one pass forward and back in n lanes, and a QR of n x m.
    Reference: Benettin et al. (1980), doi:10.1007/BF02128236; Engelken, Wolf & Abbott (2023), "Lyapunov spectra of
        chaotic recurrent neural networks".
    """
    if dims is None or any(dim is None for dim in dims):
        return None
    one = select_lanes(state, torch.zeros(1, dtype=torch.int64, device=window.mask.device), dims)
    size = _flat(one, dims).numel()
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(size, min(count, size), generator=generator, dtype=torch.float64))[0]
    sums = torch.zeros(directions.shape[1], dtype=torch.float64)
    lanes = torch.zeros(size, dtype=torch.int64, device=window.mask.device)
    for step in range(window.steps):
        inputs = tree_map(lambda leaf, step=step: leaf[step : step + 1, :1], window.inputs)
        wide = tree_map(lambda leaf: leaf.expand(1, size, *leaf.shape[2:]), inputs)
        try:
            jacobian, one = _jacobian(model, Window(wide), select_lanes(one, lanes, dims), dims)
        except RuntimeError:  # a model that takes no single steps, or not so many lanes
            return None
        directions, scale = torch.linalg.qr(jacobian @ directions)
        if step >= burn_in:
            sums += scale.diagonal().abs().log()
    return (sums / (window.steps - burn_in)).sort(descending=True).values


def _jacobian(model: nn.Module, window: Window, state: Tree, dims: LaneDims) -> tuple[Tensor, Tree]:
    """Return the derivative of the next state of one lane, n x n, from n lanes that are all alike; and that state."""
    start = as_leaves(state)
    with torch.enable_grad():
        _, end = unroll(model, window, start, dims)
        by_lane = _flat(end, dims)
        found = torch.autograd.grad(by_lane.diagonal().sum(), differentiable(start), materialize_grads=True)
    replaced = iter(found)
    gradient = replace_tensors(start, [next(replaced) if leaf.requires_grad else leaf for leaf in tensors(start)])
    first = torch.zeros(1, dtype=torch.int64, device=window.mask.device)
    return _flat(gradient, dims).double().cpu(), select_lanes(detach(end), first, dims)


def _flat(state: Tree, dims: LaneDims) -> Tensor:
    """Return the differentiable tensors of a state as one matrix, a lane a row; of complex ones both parts."""
    rows: list[Tensor] = []
    for leaf, dim in zip(tensors(state), dims, strict=True):
        if dim is not None and (leaf.is_floating_point() or leaf.is_complex()):
            rows.append(as_real(leaf).movedim(dim, 0).reshape(leaf.shape[dim], -1))
    return torch.cat(rows, 1)
