"""What a look-back costs: seconds and memory, measured.

Letters: K look-back in steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from tbptt.cost import held_for_backward, in_turn
from tbptt.estimators import TBPTT
from tbptt.horizon.sent import Place
from tbptt.loss import StepLoss

__all__ = ["Costs", "measure_costs"]


@dataclass(frozen=True)
class Costs:
    """The cost of one update by look-back.

    Args:
        lookbacks: steps.
        seconds: of running so many steps forward and back, the optimizer not included.
        held_bytes: that autograd holds for it, all lanes together.
        lanes: sequences side by side.
    """

    lookbacks: tuple[int, ...]
    seconds: tuple[float, ...]
    held_bytes: tuple[int, ...]
    lanes: int

    def seconds_at(self, lookback: int) -> float:
        """Return the seconds for a look-back between those measured, or in proportion beyond them."""
        return self._at(lookback, self.seconds)

    def bytes_at(self, lookback: int) -> float:
        """Return the bytes for a look-back between those measured, or in proportion beyond them."""
        return self._at(lookback, self.held_bytes)

    def longest_within(self, memory: float) -> int:
        """Return the longest look-back whose bytes stay within `memory`; 0 for none."""
        low, high = 0, self.lookbacks[-1] * 1024
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.bytes_at(middle) <= memory else (low, middle - 1)
        return low

    def _at(self, lookback: int, values: Sequence[float]) -> float:
        if lookback > self.lookbacks[-1]:
            return values[-1] * lookback / self.lookbacks[-1]
        return float(np.interp(lookback, self.lookbacks, values))


def measure_costs(model: nn.Module, loss: StepLoss, place: Place, lookbacks: Sequence[int], rounds: int = 5) -> Costs:
    """Measure the cost of an update of k1 = k2 = K steps, for each K, all in turn; medians.

    Cost: `rounds` + 2 updates for each look-back.
    """
    parameters = list(model.parameters())
    held: list[int] = []

    def update(steps: int) -> None:
        estimator = TBPTT(steps, steps)
        carry = estimator.init(model, place.window.lanes)
        carry.state, carry.dims, carry.looked, carry.loss_looked = place.state, place.dims, True, True
        estimator.estimate(model, loss, carry, place.window[place.window.steps - steps :])

    for steps in lookbacks:
        with held_for_backward(parameters) as bytes_of:
            update(steps)
        held.append(bytes_of.peak)
    taken = in_turn({str(steps): lambda steps=steps: update(steps) for steps in lookbacks}, rounds)
    seconds = tuple(taken[str(steps)] for steps in lookbacks)
    return Costs(tuple(lookbacks), seconds, tuple(held), place.window.lanes)
