"""A length that follows what the gradient needs, measured while the model trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

import numpy as np

from tbptt.curve import Floats, dense, lag_grid, needed_lookback, needed_window
from tbptt.errors import ConfigError
from tbptt.length.base import Length, LengthState, RateScaling, check_scaling, check_whole, scaled

__all__ = ["Adaptive"]

_STEPS_A_PROBE, _UPDATES_A_PROBE = 40, 300
"""Where `Adaptive.every` is left out: a probe comes after so many times its steps have been run forward and back, and
after so many updates. The first bounds its share of the time in large models, whose time goes into steps; the second in
small ones, where a probe's many short pieces count."""
_SETTLED = 4
"""Probes after which they are so rare; before, they come sooner."""
_NEWEST_PROBE = 0.25
"""The weight of the newest probe in the running mean of the curve; of the first ones, that of a plain mean."""
_CHANGE = 0.5
"""The share of the way, in log steps, that a length goes towards what the curve asks for."""


@final
@dataclass(frozen=True)
class Adaptive(Length):
    """Measure, while the model trains, how far back the gradient is worth following, and follow it so far.

    Now and then a probe sends the gradient of single losses `max` steps back, and the norms phi_k of the state's
    gradient by lag go into a running mean. The length wanted is kappa, the shortest whose relative bias is bounded
    below `tolerance`: see `tbptt.curve.needed_lookback`.

    As k2 it is what every loss is to reach at least, so that k2 = kappa + k1 - 1; as k1 it is kappa itself. Both
    together, `TBPTT(k1=adaptive, k2=adaptive)`, is the method of the paper, windows of kappa and a look-back of twice
    that. With `windows="plain"` both together are windows without overlap, k1 = k2, so long that the *mean* of the
    bound over their losses, the first of which reaches one step back and the last all of them, is below `tolerance`:
    longer, but half the work for each step of the stream. That is the one to take where time counts.

    The bound takes for granted that weights act all along the way. Where they act at its far end alone, as behind a
    delay, a look-back that has most of the state's gradient may have none of the parameters'. So each probe also tries
    the look-back asked for on the parameters' gradient itself: where that leaves out more than `tolerance`, in the
    running mean, the length is what the parameters' gradient asks for, rounded up to the next measured lag.

    Guards of the method: a floor, `min`; every probe is `max` long whatever the length is, so that a short one cannot
    confirm itself; a length goes only half of the way (in log steps) at each probe; a curve that does not fall within
    `max` asks for `max`. A model that has not learned yet to look back has a short curve: choose a `min` that it can
    start to learn with.

    Not recommended where the state is large and nothing makes its gradient decay: beta is near 1, and the length goes
    to `max` (section 5.4 of the paper).

    Args:
        tolerance: of the relative bias, above 0 and below 1. Smaller is longer.
        min: the floor, steps.
        max: the longest, steps: of memory, too, are `max + k1 - 1` steps needed.
        every: updates between two probes; left out: after 300 updates and 40 times `max` steps, the first few sooner.
            Measured: 3 to 5 % of the time; 8 % in a tiny model with short plain windows
            (benchmarks/results/speed_adaptive.json).
        first: steps at the start; left out: 16, within the bounds.
        windows: "overlapping", every loss reaches kappa; or "plain", k1 = k2, in the mean over a window's losses.
        scale_rate: what the learning rate does as the length changes, relative to `first`: "none"; "sqrt", as in the
            paper; "linear".
        multiple: lengths, and the lags of the probes, are multiples of so many steps: the segment of a model that is
            cut at the ends of segments only, as `SegmentTransformer`. Rounded up.

    Raises:
        ConfigError: bounds, a tolerance or a number of updates that cannot be meant.

    Exactness: biased, up to `tolerance` where the curve decays geometrically and no sign cancels; the closed form
        is in tests/test_length.py. What lies beyond `max` cannot be seen: a curve that does not fall asks for `max`.
    Cost: a probe is a forward and two backward passes over `max` steps, in about 25 pieces, with memory of `max` steps;
        the inputs of the last `max` steps are kept between.
    Reference: Aicher, Foti & Fox (2019), "Adaptively truncating backpropagation through time to control gradient
        bias", arXiv:1905.07473. There one probe an epoch on other sequences, no floor, no damping.
    """

    tolerance: float = 0.1
    min: int = 4
    max: int = 256
    every: int | None = None
    first: int | None = None
    windows: Literal["overlapping", "plain"] = "overlapping"
    scale_rate: RateScaling = "none"
    multiple: int = 1

    def __post_init__(self) -> None:
        fix = "Adaptive(tolerance=0.1, min=4, max=256)"
        check_whole(self, "min", fix)
        check_whole(self, "max", fix)
        check_whole(self, "multiple", fix)
        for name in ("every", "first"):
            if getattr(self, name) is not None:
                check_whole(self, name, fix)
        for name in ("max", "first"):
            value = getattr(self, name)
            if value is not None and value % self.multiple:
                whole = -(-value // self.multiple) * self.multiple
                raise ConfigError(
                    f"{name} was expected in multiples of {self.multiple}, as multiple={self.multiple} says, but is "
                    f"{value}: a model that needs one could not be cut there",
                    fix=f"{name}={whole}",
                )
        check_scaling(self.scale_rate)
        if self.windows not in ("overlapping", "plain"):
            raise ConfigError(
                f'windows were expected to be "overlapping" or "plain", but are {self.windows!r}', fix='windows="plain"'
            )
        if isinstance(self.tolerance, bool) or not 0 < self.tolerance < 1:
            raise ConfigError(
                f"a tolerance above 0 and below 1 was expected, the relative bias to allow, but it is "
                f"{self.tolerance!r}: at 1 the gradient need not even point the right way",
                fix=fix,
            )
        if self.min > self.max:
            raise ConfigError(f"min <= max was expected, but min is {self.min} and max {self.max}", fix=fix)
        if self.first is not None and not self.min <= self.first <= self.max:
            raise ConfigError(
                f"first was expected from min = {self.min} to max = {self.max}, but is {self.first}",
                fix=f"first={self.min}",
            )

    @property
    def longest(self) -> int:
        """`max`."""
        return self.max

    @property
    def shortest(self) -> int:
        """`min`."""
        return self._within(self.min)

    @property
    def unit(self) -> int:
        """`multiple`."""
        return self.multiple

    @property
    def lags(self) -> tuple[int, ...]:
        """The lags at which the curve is kept."""
        return tuple(self.multiple * each for each in lag_grid(self.max // self.multiple, dense_up_to=8, ratio=1.25))

    @property
    def start_length(self) -> int:
        """The length before the first probe."""
        return self._within(16) if self.first is None else self.first

    def start(self) -> LengthState:
        """Return the state before the first update; the first probe is due at once."""
        return LengthState(length=float(self.start_length), waited=self.every or 0)

    def now(self, state: LengthState) -> int:
        """Return the length in force."""
        return self._within(round(state.length))

    def is_due(self, state: LengthState) -> bool:
        """Tell whether it is time for a probe."""
        if self.every is not None:
            return state.waited >= self.every
        share = min(1.0, state.probes / _SETTLED)
        return state.worked >= share * _STEPS_A_PROBE * self.max and state.waited >= share * _UPDATES_A_PROBE

    def asked(self, state: LengthState) -> int:
        """Return kappa by the state's gradient as it is known so far: what the next probe tries on the parameters'."""
        return self.needed(np.asarray(state.norms)) if state.norms else self.now(state)

    def probed(
        self, state: LengthState, norms: Sequence[float], weights: Sequence[float] = (), missed: float = 0.0
    ) -> tuple[LengthState, int]:
        """Take in one probe.

        Args:
            norms: mean norm of the state's gradient at `lags`.
            weights: norms of what is added to the parameters' gradient by look-backs from 1 to above each lag; left
                out: not measured.
            missed: the share of the parameters' gradient that a look-back of `asked(state)` leaves out.

        Returns:
            The state with a new length, and kappa, what the running means ask for.
        """
        new = np.asarray([*norms, *weights, missed], dtype=np.float64)
        if not np.isfinite(new).all():  # an update that explodes is for the guards to say; no length follows from it
            return replace(state, waited=0, worked=0), self.now(state)
        weight = max(_NEWEST_PROBE, 1 / (state.probes + 1))
        before = np.asarray([*state.norms, *state.weights, state.missed])
        mean = (1 - weight) * before + weight * new if len(before) == len(new) else new
        curve, added, left_out = mean[: len(norms)], mean[len(norms) : -1], float(mean[-1])
        kappa = self.needed(curve)
        if left_out > self.tolerance:  # what acts at the far end of a delay alone is in no norm on the way
            kappa = max(kappa, self._needed_by_weights(added))
        length = math.exp((1 - _CHANGE) * math.log(state.length) + _CHANGE * math.log(kappa))
        if left_out > self.tolerance:  # a length in between would leave as much out
            length = max(length, kappa)
        state = replace(state, length=length, norms=tuple(curve.tolist()), weights=tuple(added.tolist()))
        return replace(state, missed=left_out, probes=state.probes + 1, waited=0, worked=0), kappa

    def _needed_by_weights(self, added: Floats) -> int:
        """Return what the parameters' gradient asks for: each part of it counts as being as far back as it may be."""
        far = np.zeros(self.max + 1)
        far[[0, *self.lags]] = added
        wanted = needed_window if self.windows == "plain" else needed_lookback
        found = wanted(far, self.tolerance)
        return self.max if found is None else self._within(found)

    def needed(self, norms: Floats) -> int:
        """Return kappa for norms at `lags`, within the bounds; `max` for a curve that does not fall in time."""
        if not norms.any():  # no gradient arrives at any lag: nothing is cut off
            return self.shortest
        wanted = needed_window if self.windows == "plain" else needed_lookback
        found = wanted(dense(self.lags, norms), self.tolerance)
        return self.max if found is None else self._within(found)

    def rate(self, length: int) -> float:
        """Return what the learning rate is multiplied by."""
        return scaled(length / self.start_length, self.scale_rate)

    def _within(self, length: int) -> int:
        return min(self.max, -(-max(self.min, length) // self.multiple) * self.multiple)
