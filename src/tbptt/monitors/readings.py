"""What several monitors measure: means that forget, losses, the size of a state, the change of weights.

Letters: P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tbptt.estimators.base import Estimate
from tbptt.tree import Tree, differentiable

__all__ = ["SATURATED", "LossSum", "Movement", "Running", "StateReading", "movement", "read_state", "state_norm"]

SATURATED = 0.97
"""The size of a value of a bounded unit beyond which it counts as saturated: tanh's slope is below 0.06 there."""

_MOST_PENDING = 256  # losses kept as tensors, so that a device is not waited for at every update


@dataclass
class Running:
    """A mean that forgets: a plain one of the first 1 / `newest` values, then the newest weighs `newest`.

    Example:
        >>> mean = Running(0.5)
        >>> for value in (1.0, 3.0, 4.0):
        ...     mean.add(value)
        >>> mean.mean
        3.0
    """

    newest: float
    mean: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        """Take in a finite value."""
        self.count += 1
        self.mean += max(self.newest, 1 / self.count) * (value - self.mean)

    def state_dict(self) -> dict[str, Any]:
        """Return how far it has come."""
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.mean, self.count = state["mean"], state["count"]


class LossSum:
    """The losses of several updates, and how many they are; a device is waited for only when they are asked for."""

    def __init__(self, total: float = 0.0, num_terms: int = 0, weight: float | None = None) -> None:
        self._total = total
        self._pending: list[Tensor] = []
        self.num_terms = num_terms
        self._weight = float(num_terms) if weight is None else weight

    def add(self, estimate: Estimate) -> None:
        """Take in the losses of one update."""
        self._pending.append(estimate.loss_sum)
        self.num_terms += estimate.num_terms
        self._weight += estimate.loss_weight
        if len(self._pending) >= _MOST_PENDING:
            self.total()

    def total(self) -> float:
        """Return their sum."""
        # One transfer for all, then Python's additions in order: when it happens changes no bit of the sum.
        pending, self._pending = self._pending, []
        if pending:
            for value in [pending[0].item()] if len(pending) == 1 else torch.stack(pending).tolist():
                self._total += value
        return self._total

    def mean(self) -> float | None:
        """Return the mean of all of them, by class weights where the loss has some; None for no loss."""
        total = self.total()
        return total / self._weight if self._weight else None

    def state_dict(self) -> dict[str, Any]:
        """Return it as plain numbers."""
        return {"loss_sum": self.total(), "terms": self.num_terms, "weight": self._weight}

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> LossSum:
        """Return what `state_dict` described; of nothing, one of no losses."""
        return LossSum(state.get("loss_sum", 0.0), state.get("terms", 0), state.get("weight"))


@dataclass(frozen=True)
class StateReading:
    """The size of a state.

    Args:
        norm: see `state_norm`.
        saturated: the share of values with |v| > `SATURATED` among the state's tensors whose values all lie in
            [-1, 1]; None when there is no such tensor.
    """

    norm: float | None
    saturated: float | None


def read_state(state: Tree | None) -> StateReading:
    """Measure a state.

    Cost: a few passes over its values, and two copies of the largest tensor.
    """
    squares, size, bounded, saturated = 0.0, 0, 0, 0.0
    for leaf in _measurable(state):
        sizes = leaf.detach().abs().double()
        facts = torch.stack([sizes.square().sum(), sizes.max(), (sizes > SATURATED).sum().double()]).tolist()
        squares, size = squares + facts[0], size + leaf.numel()
        if facts[1] <= 1:
            bounded, saturated = bounded + leaf.numel(), saturated + facts[2]
    return StateReading(_root_mean(squares, size), saturated / bounded if bounded else None)


def state_norm(state: Tree | None) -> float | None:
    """Return the root mean square of a state's values, sqrt(sum |v|^2 / count), in float64.

    Over all lanes and all floating-point or complex tensors together, so that it does not grow with their size. It
    is the quadratic mean of the lanes' own: a single lane that runs away shows. None for a state without values.
    """
    leaves = _measurable(state)
    squares = sum(float(torch.linalg.vector_norm(leaf.detach().abs(), dtype=torch.float64)) ** 2 for leaf in leaves)
    return _root_mean(squares, sum(leaf.numel() for leaf in leaves))


def _measurable(state: Tree | None) -> list[Tensor]:
    return [leaf for leaf in differentiable(state) if leaf.numel()]


def _root_mean(squares: float, size: int) -> float | None:
    return math.sqrt(squares / size) if size else None


@dataclass(frozen=True)
class Movement:
    """How far one update has moved the weights.

    Args:
        ratio: norm of the change of all weights over their norm before it; None for weights of norm 0, or none.
        largest: the largest such ratio of a single parameter whose norm was not 0; None for none.
        parameter: its name.
    """

    ratio: float | None = None
    largest: float | None = None
    parameter: str | None = None


def movement(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Movement:
    """Compare weights with a copy that was taken one update before.

    Cost: O(P), and memory of one more copy meanwhile.
    """
    names = [name for name in after if name in before]
    if not names:
        return Movement()
    old = [before[name] for name in names]
    with torch.no_grad():
        changes = torch._foreach_sub([after[name] for name in names], old)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        norms = torch._foreach_norm([*changes, *old])  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    values: list[float] = torch.stack([norm.to(old[0].device).double() for norm in norms]).tolist()
    moved, sizes = values[: len(names)], values[len(names) :]
    whole = math.hypot(*sizes)
    ratios = [(m / s, name) for m, s, name in zip(moved, sizes, names, strict=True) if s != 0]
    largest, parameter = max(ratios, key=_nan_first) if ratios else (None, None)
    return Movement(math.hypot(*moved) / whole if whole else None, largest, parameter)


def _nan_first(entry: tuple[float, str]) -> float:
    return math.inf if math.isnan(entry[0]) else entry[0]
