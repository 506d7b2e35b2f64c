"""What an estimator costs: seconds a step, and the memory that its backward passes hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median

from torch import nn

from tbptt.comparison.excerpt import Excerpt
from tbptt.comparison.failures import Failures
from tbptt.comparison.settings import prepared
from tbptt.cost import held_for_backward, in_turn
from tbptt.estimators.base import Carry, Estimator
from tbptt.loss import StepLoss
from tbptt.randomness import seed_everything

__all__ = ["Cost", "costs"]

_ROUNDS = 7


@dataclass(frozen=True)
class Cost:
    """What estimates cost; reading, guards and the optimizer's step are not in it.

    Args:
        seconds_per_step: of the stream, all lanes together.
        held_bytes: the most that was held for backward passes at one time, all lanes together.
    """

    seconds_per_step: float = math.nan
    held_bytes: float = math.nan


class _Side:
    """An estimator at work on the excerpt, round and round, its weights never updated."""

    def __init__(self, model: nn.Module, estimator: Estimator, loss: StepLoss, excerpt: Excerpt) -> None:
        example = excerpt.window[: excerpt.sizes.span].inputs
        self.model, self.loss = prepared(model, loss, estimator, example)
        self.estimator, self.excerpt = estimator, excerpt
        self.carry: Carry = estimator.init(self.model, excerpt.window.lanes)
        self.at = self.steps = 0
        self.kinds: set[tuple[int, int]] = set()
        self.samples: list[float] = []

    def advance(self, steps: int) -> None:
        """Run over at least so many steps."""
        goal = self.steps + steps
        while self.steps < goal:
            wanted = self.estimator.next_steps(self.carry)
            if self.at >= self.excerpt.sizes.steps:
                self.at = self.excerpt.sizes.burn_in
            window = self.excerpt.window[self.at : self.at + wanted]
            estimate, self.carry = self.estimator.estimate(self.model, self.loss, self.carry, window)
            self.kinds.add((window.steps, estimate.lookback))
            self.at += window.steps
            self.steps += window.steps

    def fill(self) -> float:
        """Run until states and look-backs are filled, and one span more; return the bytes held at the peak."""
        self.advance(max(1, self.excerpt.sizes.burn_in))  # what is found out once of a model is not counted
        with held_for_backward(self.model.parameters()) as held:
            self.advance(self.excerpt.sizes.span)
        self.steps = 0
        self.kinds.clear()
        return float(held.peak)

    @property
    def typical(self) -> float:
        """Seconds a step: the median of the rounds; their mean where the windows were not all alike."""
        return median(self.samples) if len(self.kinds) == 1 else fmean(self.samples)


def costs(
    model: nn.Module,
    estimators: Mapping[str, Estimator],
    loss: StepLoss,
    excerpt: Excerpt,
    seed: int,
    failures: Failures,
) -> dict[str, Cost]:
    """Measure time and memory of all estimators, in turn, so that a busy machine is busy for all.

    In the mode the model is in; weights as given. Those that fail are left out, and said so in `failures`.

    Cost: for each estimator the burn-in and eight spans.
    """
    sides: dict[str, _Side] = {}
    held: dict[str, float] = {}
    for name, estimator in estimators.items():
        with failures.kept(name):
            seed_everything(seed)
            side = _Side(model, estimator, loss, excerpt)
            held[name] = side.fill()
            sides[name] = side
    for _ in range(_ROUNDS):
        before = {name: side.steps for name, side in sides.items()}
        taken = in_turn(
            {name: lambda side=side: side.advance(excerpt.sizes.span) for name, side in sides.items()}, 1, warm_up=0
        )
        for name, side in sides.items():
            side.samples.append(taken[name] / (side.steps - before[name]))
    return {name: Cost(side.typical, held[name]) for name, side in sides.items()}
