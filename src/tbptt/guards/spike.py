"""Going back, once an update has shown that those before it went wrong."""

from __future__ import annotations

import math
from statistics import median
from typing import Any, ClassVar

from tbptt.errors import ConfigError, DivergedError, NonFiniteError
from tbptt.estimators.base import Estimate
from tbptt.guards.base import Guard, RollBack, SnapshotPlan, Start
from tbptt.guards.norms import flag, positive, total_norm, whole

__all__ = ["SpikeRollback"]

_MEMORY = 100  # values that the next one is compared with
_PER_MAD = 1.4826  # standard deviations to a median absolute deviation, of normal numbers
_EXPLOSION = 1000.0  # times the largest value remembered: a spike however far these are scattered
_LARGEST = 709.0  # the largest logarithm of a number that a float holds, about
_LOOSE = 100.0  # times what was seen from a state that was not usual: a spike even while the next values are high


class SpikeRollback(Guard):
    """Go back to weights, carry and optimizer of some updates ago where the loss or the gradient norm spikes.

    For long runs where clipping is not enough: what makes a spike has often begun some updates before it, in weights
    and in the optimizer's moments. What is gone back to is the oldest snapshot kept, `every * (keep - 1)` updates old
    or more unless the run has only begun; those after it are dropped. The stream goes on: the data since then are not
    read again. The state carried on has not seen them, so that the next look-backs span a gap in the data; a lane in
    which a new sequence has begun meanwhile is reset.

    A value is a spike if it is not finite; or, after the warm-up, if it is above the median of the last 100 that were
    none, by more than `z` of their robust deviations, 1.4826 times the median absolute one, and by more than the
    factor. Both are counted in logarithms, as losses and norms spread by factors; 1000 times the largest of the 100 is
    always too much. Where one of them is not above 0 the values are taken as they are, and (factor - 1) |median| is
    what the factor asks for.

    What follows a state that is not the usual one is high for no fault of the weights: where all lanes begin a
    sequence a value is compared with those of other such windows, if there are enough; after going back the first is
    taken as it comes. For 100 updates after it, what is below 100 times that value passes, too: a spike just there is
    not seen, unless it is that large.

    Put it after NonFinite if NaN is to end the run or to be left out instead, and before clipping. Weights, buffers,
    optimizer, scheduler, carry and what guards have seen go back; the number of updates, random generators and how
    often it went back do not. The update counts as refused and has the metric `rolled_back`, the number of updates
    undone. Trainer and `compare` do it; Lightning's mixin refuses it.

    Args:
        every: updates between two snapshots, at least 1.
        keep: how many are kept, at least 2.
        z: how many robust deviations above the median a value may be, above 0. The default's origin: with it healthy
            runs do not go back (tests/guards/test_healthy.py).
        loss_factor: how many times the median a loss may always be, above 1; None: losses are not watched.
        norm_factor: how many times the median a gradient norm may always be, before clipping; None likewise. NaN and
            infinity are seen even so.
        warm_up: values without which none is judged, from 2 to 100.
        limit: how often it may go back with fewer than `every * keep` good updates in between.
        allow_bias: whether it may be used with an unbiased estimator, whose promise it breaks.

    Raises:
        ConfigError: a setting that cannot be meant.
        DivergedError: when called with one spike more than `limit` allows for.

    Exactness: biased, as windows with large losses are left out; the estimate of any other update passes unchanged
        (tests/guards/test_spike.py).
    Cost: `keep` copies of weights, optimizer and carry, in memory and in each checkpoint; loss and norm are read.
    Reference: Chowdhery et al. (2022), section 5.1, arXiv:2204.02311, who went back about 100 updates and left 200 to
        500 batches out. There a person decided when to; the test above is ours.

    Example:
        >>> import tbptt
        >>> guards = [tbptt.NonFinite("skip"), SpikeRollback(every=50), tbptt.ClipNorm(1.0)]
    """

    changes_mean: ClassVar[bool] = True

    def __init__(
        self,
        every: int = 50,
        *,
        keep: int = 2,
        z: float = 10.0,
        loss_factor: float | None = 2.0,
        norm_factor: float | None = 10.0,
        warm_up: int = 25,
        limit: int = 3,
        allow_bias: bool = False,
    ) -> None:
        why = "there would be nothing to go back to that is older than what made the spike"
        self.snapshots = self._plan = SnapshotPlan(
            whole("every", every, 1, "SpikeRollback", why, 50), whole("keep", keep, 2, "SpikeRollback", why, 2)
        )
        self.z = positive("z", z, "SpikeRollback", "noise would be a spike, or nothing", 10.0)
        self.loss_factor = _above_1("loss_factor", loss_factor, 2.0)
        self.norm_factor = _above_1("norm_factor", norm_factor, 10.0)
        if self.loss_factor is None and self.norm_factor is None:
            raise ConfigError(
                "a loss_factor or a norm_factor was expected, but both are None: nothing would be watched",
                fix="SpikeRollback(loss_factor=2.0, norm_factor=10.0), or no SpikeRollback",
            )
        self.warm_up = whole("warm_up", warm_up, 2, "SpikeRollback", "a deviation needs two values", 25)
        if self.warm_up > _MEMORY:
            raise ConfigError(
                f"a warm_up of at most {_MEMORY} was expected, but is {warm_up!r}: so many values are remembered, and "
                "the warm-up would never end",
                fix="SpikeRollback(warm_up=25)",
            )
        self.limit = whole("limit", limit, 1, "SpikeRollback", "a run that is lost would go back for ever", 3)
        self.allow_bias = flag("allow_bias", allow_bias, "SpikeRollback")
        self._losses = _Series("loss", self.loss_factor, self.z, self.warm_up)
        self._norms = _Series("gradient norm", self.norm_factor, self.z, self.warm_up)
        self._start: Start = "usual"  # of the next estimate
        self._in_row = 0  # times that it went back, each soon after the one before
        self._since = 0  # good updates since the last of them

    def unsettle(self, start: Start) -> None:
        """Hear that the next estimate is not from the usual state, so that its numbers may not be usual either."""
        self._start = start

    def __call__(self, estimate: Estimate) -> Estimate | RollBack:
        """Return the estimate with its norm measured, or the verdict to go back."""
        start, self._start = self._start, "usual"
        if not estimate.num_injected or not estimate.all_gradients:
            return estimate
        norm = _norm(estimate)
        seen = [(self._losses, estimate.loss.item())] if estimate.num_terms else []
        seen.append((self._norms, norm))
        faults = [fault for series, value in seen if (fault := series.fault(value, start))]
        if faults:
            return self._roll_back(" and ".join(faults))
        for series, value in seen:
            series.remember(value, start)
        self._since += 1
        known = "gradient_norm" in estimate.metrics
        return estimate if known else estimate.with_gradients(estimate.all_gradients, gradient_norm=norm)

    def _roll_back(self, reason: str) -> RollBack:
        soon = self._plan.every * self._plan.keep
        if self._since >= soon:
            self._in_row = 0
        if self._in_row >= self.limit:
            raise DivergedError(
                f"training was expected to go on after going back, but {self.limit} times in a row, with fewer than "
                f"{soon} good updates in between, it has spiked again: {reason}; going back once more would find the "
                "same",
                fix="lower the learning rate and resume; or, if the data have changed for good, "
                "SpikeRollback(loss_factor=None) or a larger norm_factor",
            )
        self._in_row += 1
        self._since = 0
        return RollBack(reason)

    def went_back(self, state: dict[str, Any]) -> None:
        """Take over what was usual at the weights of then; how often it went back is not forgotten."""
        self.load_state_dict(state | {"in_row": self._in_row, "since": self._since})

    def state_dict(self) -> dict[str, Any]:
        """Return the values that the next are compared with, and how often it went back of late."""
        return {
            "losses": self._losses.state_dict(),
            "norms": self._norms.state_dict(),
            "in_row": self._in_row,
            "since": self._since,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._losses.load_state_dict(state["losses"])
        self._norms.load_state_dict(state["norms"])
        self._in_row, self._since = int(state["in_row"]), int(state["since"])


class _Series:
    """One number of each update: what it has been of late, and what it may be next.

    Args:
        name: for people.
        factor: how many times the median it may be in any case; None: only what is not finite is a fault.
        z: how many robust deviations above the median it may be.
        warm_up: the number of values without which none is judged.
    """

    def __init__(self, name: str, factor: float | None, z: float, warm_up: int) -> None:
        self.name, self.factor, self.z, self.warm_up = name, factor, z, warm_up
        self._usual: list[float] = []
        self._first: list[float] = []  # of windows in which all lanes begin a sequence
        self._raised = 0.0  # what it was from a state that was not usual
        self._left = 0  # usual windows for which that matters: until the memory is of later ones alone

    def fault(self, value: float, start: Start) -> str:
        """Return what is wrong with a value, as a sentence; nothing for nothing."""
        if not math.isfinite(value):
            return f"the {self.name} is {value}"
        most = math.inf if self.factor is None or start == "gap" else self._most(start)
        if value <= most:
            return ""
        middle = median(self._first if start == "sequence" else self._usual)
        return f"the {self.name} is {value:.4g}, where {middle:.4g} is usual and {most:.4g} the most expected"

    def remember(self, value: float, start: Start) -> None:
        """Take in a value without fault."""
        if self.factor is None:
            return
        if start == "usual":
            self._usual, self._left = [*self._usual, value][-_MEMORY:], max(0, self._left - 1)
            return
        self._raised, self._left = value, _MEMORY
        if start == "sequence":
            self._first = [*self._first, value][-_MEMORY:]

    def _most(self, start: Start) -> float:
        """Return the largest value that is no spike."""
        assert self.factor is not None
        if start == "sequence":
            return _most(self._first, self.factor, self.z, self.warm_up)
        most = _most(self._usual, self.factor, self.z, self.warm_up)
        return max(most, _times(_LOOSE, self._raised)) if self._left else most

    def state_dict(self) -> dict[str, Any]:
        return {"usual": list(self._usual), "first": list(self._first), "raised": self._raised, "left": self._left}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._usual, self._first = list(state["usual"]), list(state["first"])
        self._raised, self._left = state["raised"], state["left"]


def _most(before: list[float], factor: float, z: float, warm_up: int) -> float:
    """Return the largest value that is no spike after these; infinity where they are too few to tell."""
    if len(before) < warm_up:
        return math.inf
    by_factors = min(before) > 0
    values = [math.log(each) for each in before] if by_factors else before
    middle = median(values)
    deviation = _PER_MAD * median(abs(each - middle) for each in values)
    if not by_factors:
        return max(_times(factor, middle), middle + z * deviation)
    scattered = min(middle + z * deviation, max(values) + math.log(_EXPLOSION))
    return math.exp(min(max(middle + math.log(factor), scattered), _LARGEST))


def _times(factor: float, value: float) -> float:
    """Return `factor` times a value, counted from it upwards if it is below 0."""
    return value + (factor - 1) * abs(value)


def _norm(estimate: Estimate) -> float:
    """Return the gradient's norm before clipping; not finite only where a gradient is not, or where none could be."""
    norm = estimate.gradient_norm().item()
    if math.isfinite(norm):
        return norm
    try:
        return total_norm(estimate.all_gradients).item()  # in float64, if only the sum of squares has overflowed
    except NonFiniteError:
        return norm


def _above_1(name: str, value: float | None, default: float) -> float | None:
    if value is None:
        return None
    found = positive(name, value, "SpikeRollback", "every value would be a spike, or none", default)
    if found <= 1:
        raise ConfigError(
            f"{name} was expected to be above 1, but is {value!r}: usual values would be spikes",
            fix=f"SpikeRollback({name}={default})",
        )
    return found
