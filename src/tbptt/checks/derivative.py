"""Is the gradient that a model sends back the derivative of what it computes? Central differences, call by call.

A detach, a scale or a hook at every step gives the same gradient however a sequence is cut: no comparison of one way
with another sees it. Only the derivative does.

Letters: T time, B lanes, K calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tbptt.checks.trial import Trial
from tbptt.tree import Tree, clone, leaf_names, replace_tensors, tensors

__all__ = ["Mismatch", "find_mismatch"]

_CALLS = 64
"""The most calls that are looked at."""
_FOLLOWING = 3
"""Calls whose outputs must show it, too: a state may hold what cancels out."""


@dataclass(frozen=True)
class Mismatch:
    """Where the gradient that comes back is not the derivative.

    Args:
        step: the first step of the call.
        autograd: the derivative in a random direction of the state, as the backward pass has it.
        differences: the same as central differences have it.
    """

    step: int
    autograd: float
    differences: float


@dataclass(frozen=True)
class _Precision:
    """How central differences are taken: the step, the tolerance of a derivative, and the rounding of a value."""

    step: float
    tolerance: float
    rounding: float

    @staticmethod
    def of(trial: Trial) -> _Precision:
        """Return that of a trial: differences are far better, and a detach or a scale is far worse."""
        if trial.precision == "float64":
            return _Precision(step=1e-5, tolerance=1e-3, rounding=1e-13)
        return _Precision(step=1e-2, tolerance=5e-2, rounding=1e-6)


@dataclass(frozen=True)
class _Start:
    step: int
    state: Tree
    direction: list[Tensor]


def find_mismatch(trial: Trial, names: tuple[str, ...]) -> Mismatch | None:
    """Return the first call of one pass that sends back something else than the derivative of what it computes.

    Args:
        trial: under the conditions to ask it in.
        names: the tensors of the state that are to be looked at.

    Cost: four passes in single steps, one of them backward, of at most 64 steps.
    """
    starts, unit = _starts(trial, names)
    if not starts:
        return None

    def new_state(start: _Start, state: Tree) -> Tensor:
        _, after = trial.run(trial.long[start.step : start.step + unit], state)
        places = dict(zip(leaf_names(after), tensors(after), strict=True))
        return _projected([places[name] for name in names if name in places])

    def following(start: _Start, state: Tree) -> Tensor:
        pieces: list[Tensor] = []
        for begin in range(start.step, min(start.step + _FOLLOWING * unit, trial.long.steps - unit + 1), unit):
            outputs, state = trial.run(trial.long[begin : begin + unit], state)
            pieces.append(_projected([leaf for leaf in tensors(outputs) if leaf.is_floating_point()]))
        return torch.stack(pieces).sum()

    suspects = _mismatches(trial, starts, names, new_state)
    if not suspects:
        return None
    only = [start for start in starts if start.step in {each.step for each in suspects}][:1]
    return suspects[0] if _mismatches(trial, only, names, following) else None


def _mismatches(
    trial: Trial, starts: list[_Start], names: tuple[str, ...], function: Callable[[_Start, Tree], Tensor]
) -> list[Mismatch]:
    """Return where the derivative of a function of the state before a call is not what autograd says."""

    precision = _Precision.of(trial)

    def sweep(offset: float) -> list[float]:
        trial.restart()
        return [float(function(start, _moved(start, names, offset)).detach()) for start in starts]

    above, below = sweep(precision.step), sweep(-precision.step)
    trial.restart()
    here: list[float] = []
    autograd: list[float] = []
    for start in starts:
        leaves = [leaf.detach().clone() for leaf in tensors(start.state)]
        asked = [place for place, name in enumerate(leaf_names(start.state)) if name in names]
        for place in asked:
            leaves[place].requires_grad_()
        total = function(start, replace_tensors(start.state, leaves))
        here.append(float(total.detach()))
        found: list[Tensor | None] = [None] * len(asked)
        if total.requires_grad:
            found = list(torch.autograd.grad(total, [leaves[place] for place in asked], allow_unused=True))
        autograd.append(sum(_inner(each, way) for each, way in zip(found, start.direction, strict=True)))
    differences = [(a - b) / (2 * precision.step) for a, b in zip(above, below, strict=True)]
    scale = max(map(abs, [*differences, *autograd]), default=0.0)
    wrong: list[Mismatch] = []
    for start, a, b, middle, d, g in zip(starts, above, below, here, differences, autograd, strict=True):
        size = max(abs(d), abs(g))
        rounding = precision.rounding * (1 + abs(middle)) / precision.step
        kink = abs(a - 2 * middle + b) / precision.step > precision.tolerance * size + 4 * rounding
        if not kink and not abs(d - g) <= precision.tolerance * (size + 1e-3 * scale) + rounding:
            wrong.append(Mismatch(start.step, g, d))
    return wrong


def _starts(trial: Trial, names: tuple[str, ...]) -> tuple[list[_Start], int]:
    """Return the states before the calls of one pass, single steps where it takes them, and the steps of a call."""
    unit = 1
    try:
        return _states(trial, names, 1), 1
    except Exception:  # it takes no single steps
        unit = trial.plans["chunks"][0]
    return _states(trial, names, unit), unit


def _states(trial: Trial, names: tuple[str, ...], unit: int) -> list[_Start]:
    generator = torch.Generator().manual_seed(2)
    state, found = None, list[_Start]()
    trial.restart()
    for begin in range(0, min(trial.long.steps, _CALLS * unit) - unit + 1, unit):
        if state is not None:
            leaves = dict(zip(leaf_names(state), tensors(state), strict=True))
            directions = [_direction(leaves[name], generator) for name in leaves if name in names]
            found.append(_Start(begin, state, directions))
        _, state = trial.run(trial.long[begin : begin + unit], None if state is None else clone(state))
        state = clone(state)
    return found


def _direction(leaf: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random direction of about the size of a tensor."""
    size = leaf.abs().mean() + 1e-2 if leaf.numel() else 1.0
    return torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf) * size


def _moved(start: _Start, names: tuple[str, ...], offset: float) -> Tree:
    directions = iter(start.direction)
    moved = [
        leaf + offset * next(directions) if name in names else leaf.clone()
        for name, leaf in zip(leaf_names(start.state), tensors(start.state), strict=True)
    ]
    return replace_tensors(start.state, moved)


def _inner(gradient: Tensor | None, direction: Tensor) -> float:
    return 0.0 if gradient is None else float((gradient.conj() * direction).sum().real)


def _projected(leaves: list[Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    parts = [
        (leaf * torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)).sum().real
        for leaf in leaves
    ]
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)
