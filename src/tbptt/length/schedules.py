"""Lengths that follow a plan or a draw, whatever the model does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import numpy as np

from tbptt.errors import ConfigError
from tbptt.length.base import Length, LengthState, RateScaling, check_scaling, check_seed, check_whole, is_whole, scaled

__all__ = ["Choice", "Ramp", "RandomLength"]


@final
@dataclass(frozen=True)
class Ramp(Length):
    """Go from one length to another over the first updates, and stay there.

    Short look-backs first: cheap while a model learns what is near, and steadier.

    Args:
        first: steps at the start.
        last: steps at the end; may be shorter.
        over: updates that the way takes.
        shape: "linear", or "doubling": by equal factors, rounded to powers of two times `first`.

    Raises:
        ConfigError: a length or a number of updates below 1, or another shape.

    Example:
        >>> ramp = Ramp(8, 64, over=1000, shape="doubling")
        >>> [ramp.now(LengthState(updates)) for updates in (0, 400, 900, 5000)]
        [8, 16, 32, 64]
    """

    first: int
    last: int
    over: int
    shape: Literal["linear", "doubling"] = "linear"

    def __post_init__(self) -> None:
        for name in ("first", "last", "over"):
            check_whole(self, name, "Ramp(first=8, last=128, over=5000)")
        if self.shape not in ("linear", "doubling"):
            raise ConfigError(
                f'shape was expected to be "linear" or "doubling", but is {self.shape!r}', fix='shape="linear"'
            )

    @property
    def longest(self) -> int:
        """The longer end."""
        return max(self.first, self.last)

    @property
    def shortest(self) -> int:
        """The shorter end."""
        return min(self.first, self.last)

    @property
    def unit(self) -> int:
        """What all lengths on the way are multiples of."""
        if self.shape == "linear":
            return 1 if self.first != self.last else self.first
        doublings = range(math.ceil(abs(math.log2(self.last / self.first))))
        return math.gcd(self.last, *(self._doubled(math.copysign(n, self.last - self.first)) for n in doublings))

    def now(self, state: LengthState) -> int:
        """Return the length after so many updates."""
        done = state.updates / self.over
        if done >= 1:
            return self.last
        if self.shape == "linear":
            return round(self.first + (self.last - self.first) * done)
        return self._doubled(math.trunc(math.log2(self.last / self.first) * done))

    def _doubled(self, times: float) -> int:
        return max(self.shortest, int(self.first * 2.0**times))


@final
@dataclass(frozen=True)
class Choice(Length):
    """Draw one of some lengths anew for each update.

    As k2: mostly short look-backs, now and then a long one. Biased all the same: the gradient's expectation is the
    weighted mean of those of its lengths.

    Args:
        lengths: steps, each at least 1.
        weights: how often each is drawn, in any unit; left out: equally often.
        seed: of the draws, which depend on it and on the number of updates only.

    Raises:
        ConfigError: no length, one below 1, or weights that are none.

    Example:
        >>> Choice([16, 256], weights=[9, 1]).longest
        256
    """

    lengths: Sequence[int]
    weights: Sequence[float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        fix = "Choice([16, 256], weights=[9, 1])"
        given = list(self.lengths)
        if not given or any(not is_whole(each) or each < 1 for each in given):
            raise ConfigError(
                f"lengths were expected to be whole numbers of steps, at least 1, but are {self.lengths!r}", fix=fix
            )
        object.__setattr__(self, "lengths", tuple(int(each) for each in given))
        check_seed(self, fix)
        if self.weights is None:
            return
        weights = tuple(float(each) for each in self.weights)
        sound = all(0 <= each < math.inf for each in weights) and sum(weights) > 0
        if len(weights) != len(given) or not sound:
            raise ConfigError(
                f"weights were expected to be {len(given)} numbers from 0, not all 0, but are {self.weights!r}", fix=fix
            )
        object.__setattr__(self, "weights", weights)

    @property
    def longest(self) -> int:
        """The longest of the lengths."""
        return max(self.lengths)

    @property
    def shortest(self) -> int:
        """The shortest of the lengths."""
        return min(self.lengths)

    @property
    def unit(self) -> int:
        """What all of the lengths are multiples of."""
        return math.gcd(*self.lengths)

    def now(self, state: LengthState) -> int:
        """Return the length drawn for this update."""
        weights = None if self.weights is None else np.asarray(self.weights) / sum(self.weights)
        return int(_generator(self.seed, state).choice(np.asarray(self.lengths), p=weights))


@final
@dataclass(frozen=True)
class RandomLength(Length):
    """Vary the window's length at random, so that the cuts fall elsewhere in each pass.

    For k1. A normal number around `mean`, and in one update of twenty around half of it, as language models of LSTMs
    are usually trained (AWD-LSTM). The learning rate of an update follows its length, so that each step of the
    sequence weighs the same whatever the window it falls into: see `scaled_rate`.

    It hides where the cuts are; it does not make the gradient unbiased. Each look-back still ends.

    Args:
        mean: steps, the usual length.
        deviation: standard deviation in steps.
        half: how often the draw is around half the mean, 0 to 1.
        shortest: steps; shorter draws become it. The longest draw is mean + 8 deviations, likewise.
        scale_rate: "linear": learning rate times length / mean; "sqrt": its root; "none".
        seed: of the draws, which depend on it and on the number of updates only.

    Raises:
        ConfigError: a length below 1, a negative deviation, a share outside 0 to 1, another scaling.

    Exactness: biased as a fixed length is; weighting updates by their length is exact for plain SGD only.
    Reference: Merity, Keskar & Socher (2018), section 5 ("variable length backpropagation sequences").

    Example:
        >>> length = RandomLength(mean=70)
        >>> drawn = [length.now(LengthState(updates)) for updates in range(1000)]
        >>> 60 < sum(drawn) / 1000 < 75, min(drawn) >= 5, max(drawn) <= 110
        (True, True, True)
    """

    mean: int
    deviation: float = 5.0
    half: float = 0.05
    shortest: int = 5  # pyright: ignore[reportIncompatibleMethodOverride] - a field here, as read-only as a property
    scale_rate: RateScaling = "linear"
    seed: int = 0

    def __post_init__(self) -> None:
        fix = "RandomLength(mean=70)"
        check_whole(self, "mean", fix)
        check_whole(self, "shortest", fix)
        check_seed(self, fix)
        check_scaling(self.scale_rate)
        if not 0 <= self.deviation < math.inf or not 0 <= self.half <= 1:
            raise ConfigError(
                f"a deviation from 0 and a share from 0 to 1 were expected, but {self.deviation!r} and {self.half!r} "
                "came",
                fix=fix,
            )
        if self.shortest > self.mean:
            raise ConfigError(
                f"a shortest length up to the mean of {self.mean} was expected, but it is {self.shortest}: "
                "the mean would not be one",
                fix=f"RandomLength(mean={self.mean}, shortest={max(1, self.mean // 4)})",
            )

    @property
    def longest(self) -> int:
        """The mean and eight deviations."""
        return self.mean + math.ceil(8 * self.deviation)

    def now(self, state: LengthState) -> int:
        """Return the length drawn for this update."""
        generator = _generator(self.seed, state)
        middle = self.mean / 2 if generator.random() < self.half else self.mean
        return max(self.shortest, min(self.longest, int(generator.normal(middle, self.deviation))))

    def rate(self, length: int) -> float:
        """Return what the learning rate is multiplied by."""
        return scaled(length / self.mean, self.scale_rate)


def _generator(seed: int, state: LengthState) -> np.random.Generator:
    return np.random.default_rng((seed, state.updates))
