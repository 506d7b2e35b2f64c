"""Randomized telescopes over look-backs: a short one mostly, a long one seldom, with weights that make up for it.

Letters: N look-backs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Literal, cast, final

import numpy as np
from torch import nn

from tbptt.errors import ConfigError
from tbptt.estimators.base import Estimate, Estimator
from tbptt.estimators.carry import ChainCarry, unit_of
from tbptt.estimators.drawn import Drawn, check_lookbacks, drawn_estimate
from tbptt.length.base import check_seed, check_whole, is_whole
from tbptt.loss import Loss
from tbptt.model import check_trainable
from tbptt.window import Window

__all__ = ["Telescope"]

_EXAMPLE = "Telescope(k1=16, lengths=(16, 32, 64, 128))"
_NEWEST = 0.1
"""The weight of the newest squared norm in its running mean."""
_LEAST = 0.1
"""The least probability, as a share of the one at the start: what is never drawn is never measured again."""


@final
@dataclass(frozen=True)
class Telescope(Estimator):
    """Draw the look-back of each window, and weigh what each longer one adds by how seldom it is drawn.

    With look-backs K_0 < K_1 < ..., g_n the gradient of a window's losses with look-back K_n, and D_n = g_n - g_(n-1):
    Russian roulette draws N and takes sum_(n <= N) D_n / P(N >= n); the single sample takes D_N / P(N). The mean of
    both is the gradient with the longest look-back, at the mean cost of a short one.

    Not recommended where what the long look-backs add falls more slowly than their probability: the variance is then
    that of a few rare, huge estimates. A `Mixture` of two lengths is easier to keep in hand.

    Args:
        k1: steps run forward between updates.
        lengths: the look-backs, rising, as by doubling; the first at least k1.
        sampling: "roulette", or "single", which needs less of a long look-back's graph and has more variance.
        distribution: "optimal": from running means of |D_n|^2 and the lengths, P(N >= n) in proportion to
            (E|D_n|^2 / (K_n - K_(n-1)))^(1/2) for the roulette, P(N = n) to (E|D_n|^2 / K_n)^(1/2) for the single
            sample; before anything is known, and a tenth of it at least, 1 / K_n. Or the probabilities of the lengths.
        segment: steps run with a graph at a time, the look-back being run once more; None: all of it at once.
        seed: of the draws.
        keep_outputs: whether estimates hold the window's outputs.

    Raises:
        ConfigError: lengths that do not rise, or numbers that cannot be meant.

    Exactness: unbiased for the gradient with the longest look-back, at weights that stay
        (tests/estimators/test_unbiased.py); what lies farther back is missing. With one length it is that gradient.
    Cost: a forward and a backward pass over the look-back that was drawn, and the inputs of the longest in memory.
    Reference: Beatson & Adams (2019), "Efficient optimization of loops and limits with randomized telescoping sums",
        arXiv:1905.07006; probabilities of each n as there, without the greedy choice of lengths.

    Example:
        >>> Telescope(k1=8, lengths=(8, 16, 32)).kind
        'unbiased'
    """

    k1: int
    lengths: tuple[int, ...]
    sampling: Literal["roulette", "single"] = "roulette"
    distribution: Literal["optimal"] | tuple[float, ...] = "optimal"
    segment: int | None = None
    seed: int = 0
    keep_outputs: bool = False

    kind: ClassVar[str] = "unbiased"

    @classmethod
    def examples(cls) -> tuple[Telescope, ...]:
        """Return settings of both ways to sample and of both distributions; see `Estimator.examples`."""
        given = cls(4, (6, 9, 12), distribution=(0.5, 0.3, 0.2), segment=3)
        return cls(3, (3, 6, 12)), cls(3, (4, 8), sampling="single"), given

    def __post_init__(self) -> None:
        check_whole(self, "k1", _EXAMPLE)
        if self.segment is not None:
            check_whole(self, "segment", _EXAMPLE)
        check_seed(self)
        lengths = cast("Sequence[object]", self.lengths)
        if isinstance(lengths, str) or not all(is_whole(each) for each in lengths):
            raise ConfigError(f"lengths were expected to be whole numbers, but are {lengths!r}", fix=_EXAMPLE)
        object.__setattr__(self, "lengths", tuple(int(each) for each in self.lengths))
        check_lookbacks("Telescope", self.k1, self.lengths, _EXAMPLE)
        if self.sampling not in ("roulette", "single"):
            raise ConfigError(
                f'sampling was expected to be "roulette" or "single", but is {self.sampling!r}',
                fix='sampling="roulette"',
            )
        if isinstance(self.distribution, str):
            if self.distribution != "optimal":
                raise ConfigError(
                    f'distribution was expected to be "optimal" or probabilities, but is {self.distribution!r}',
                    fix='distribution="optimal"',
                )
            return
        object.__setattr__(self, "distribution", tuple(float(each) for each in self.distribution))
        given = self.distribution
        if len(given) != len(self.lengths) or not all(0 < each <= 1 for each in given) or abs(sum(given) - 1) > 1e-6:
            raise ConfigError(
                f"{len(self.lengths)} probabilities above 0 that add up to 1 were expected, one a length, but the "
                f"distribution is {given}: a length that is never drawn would be missing from the mean",
                fix='distribution="optimal"',
            )

    def probabilities(self, running: Sequence[float | None]) -> list[float]:
        """Return P(N = n), given running means of |D_n|^2, None where nothing is known yet."""
        if not isinstance(self.distribution, str):
            return list(self.distribution)
        before = [self.lengths[0] / length for length in self.lengths]
        added = self.lengths if self.sampling == "single" else [b - a for a, b in pairwise([0, *self.lengths])]
        wanted = [None if mean is None else math.sqrt(mean / more) for mean, more in zip(running, added, strict=True)]
        found = _scaled_to(before, wanted)
        if self.sampling == "single":
            return [each / sum(found) for each in found]
        tails: list[float] = []
        for each in found:
            tails.append(1.0 if not tails else min(tails[-1], each))
        return [a - b for a, b in zip(tails, [*tails[1:], 0.0], strict=True)]

    def draw(self, carry: ChainCarry) -> Drawn:
        """Return the look-back of the next window, and the weights of its parts."""
        chances = self.probabilities(carry.running)
        draw = float(np.random.default_rng((self.seed, carry.draws)).random())
        tails = [math.fsum(chances[n:]) for n in range(len(chances))]
        reached = max(n for n, tail in enumerate(tails) if n == 0 or tail > draw)
        if self.sampling == "single":
            return Drawn(reached, (*[0.0] * reached, 1 / chances[reached]))
        return Drawn(reached, tuple(1 / tail if n else 1.0 for n, tail in enumerate(tails[: reached + 1])))

    def next_steps(self, carry: ChainCarry) -> int:
        """Return k1."""
        del carry  # always the same
        return self.k1

    def fixed(self, carry: ChainCarry) -> Telescope:
        """Return the estimator that always goes back over the longest look-back."""
        del carry  # always the same
        return replace(self, lengths=self.lengths[-1:], distribution="optimal")

    def init(self, model: nn.Module, lanes: int) -> ChainCarry:
        """Return the carry before the first window; see `Estimator.init`."""
        check_trainable(model)
        unit = unit_of(model, k1=self.k1, lengths=self.lengths, segment=self.segment)
        return ChainCarry(lanes, running=(None,) * len(self.lengths), unit=unit)

    def reach(self, steps: int) -> tuple[int, ...]:
        """Return how far each loss of a window reaches at most; see `Estimator.reach`."""
        oldest = self.lengths[-1] if self.lengths[-1] > self.k1 else steps
        return tuple(oldest - (steps - 1 - step) for step in range(steps))

    def estimate(self, model: nn.Module, loss: Loss, carry: ChainCarry, window: Window) -> tuple[Estimate, ChainCarry]:
        """Run the model over the look-back that is drawn, and estimate the gradient of the window's losses.

        Raises:
            ShapeError: a window longer than k1 or of another number of lanes, without targets for the loss, or a model
                or loss of another shape than agreed.
            CapabilityError: a model that does not return (outputs, state).
        """
        estimate, after, squares = drawn_estimate(
            model,
            loss,
            carry,
            window,
            k1=self.k1,
            lookbacks=self.lengths,
            drawn=self.draw(carry),
            segment=self.segment,
            keep_outputs=self.keep_outputs,
        )
        running = list(carry.running)
        for n, square in enumerate(squares):
            mean = running[n]
            if math.isfinite(square):  # else: for the guards to say; no probability follows from it
                running[n] = square if mean is None else (1 - _NEWEST) * mean + _NEWEST * square
        return estimate, replace(after, running=tuple(running))


def _scaled_to(before: Sequence[float], wanted: Sequence[float | None]) -> list[float]:
    """Return weights in proportion to what is wanted, the first of them 1; those of before where nothing is known."""
    first = wanted[0]
    if first is None or first == 0:
        return list(before)
    return [
        each if value is None else max(_LEAST * each, value / first) for each, value in zip(before, wanted, strict=True)
    ]
