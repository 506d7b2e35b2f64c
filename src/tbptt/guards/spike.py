"""Going back, once an update has shown that those before it went wrong."""

from __future__ import annotations

import math
from statistics import median
from typing import Any, ClassVar

from tbptt.errors import ConfigError, DivergedError
from tbptt.estimators.base import Estimate
from tbptt.guards.base import Guard, RollBack, SnapshotPlan
from tbptt.guards.norms import positive, whole

__all__ = ["SpikeRollback"]

_MEMORY = 100  # values that the next one is compared with
_PER_MAD = 1.4826  # standard deviations to a median absolute deviation, of normal numbers


class SpikeRollback(Guard):
    """Go back to weights, carry and optimizer of some updates ago where the loss or the gradient norm spikes.

    For long runs where clipping is not enough: what makes a spike has often begun some updates before it, in weights
    and in the optimizer's moments. What is gone back to is the oldest snapshot kept, `every * (keep - 1)` updates old
    or more unless the run has only begun; those after it are dropped. The stream goes on: the data since then are not
    read again. The state carried on has not seen them, so that the next look-backs span a gap in the data; a lane in
    which a new sequence has begun meanwhile is reset.

    A value is a spike if it is not finite; or, after the warm-up, if it is above the median of the last 100 that were
    none, by more than (factor - 1) |median| and by more than `z` of their robust deviations, 1.4826 times the median
    absolute one. Loss and norm are each judged by their own. A loss that falls to nearly zero has a median that chance
    alone goes far above: give `loss_factor=None` then.

    Put it after NonFinite if NaN is to end the run or to be left out instead, and before clipping. Weights, buffers,
    optimizer, scheduler, carry and the other guards go back; the number of updates, random generators and what this
    guard has seen do not. The update counts as refused and has the metric `rolled_back`, the number of updates undone.
    Trainer and `compare` do it; Lightning's mixin refuses it.

    Args:
        every: updates between two snapshots, at least 1.
        keep: how many are kept, at least 2.
        z: how many robust deviations above the median a value may be, above 0.
        loss_factor: how many times the median a loss may be, above 1; None: losses are not watched.
        norm_factor: how many times the median a gradient norm may be, before clipping; None likewise. Norms have long
            tails: healthy runs have been seen to reach 67 times their level, see `tbptt.Alarms`.
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
        z: float = 6.0,
        loss_factor: float | None = 3.0,
        norm_factor: float | None = 100.0,
        warm_up: int = 25,
        limit: int = 3,
        allow_bias: bool = False,
    ) -> None:
        why = "there would be nothing to go back to that is older than what made the spike"
        self.snapshots = self._plan = SnapshotPlan(
            whole("every", every, 1, "SpikeRollback", why, 50), whole("keep", keep, 2, "SpikeRollback", why, 2)
        )
        self.z = positive("z", z, "SpikeRollback", "noise would be a spike, or nothing", 6.0)
        self.loss_factor = _above_1("loss_factor", loss_factor, 3.0)
        self.norm_factor = _above_1("norm_factor", norm_factor, 100.0)
        if self.loss_factor is None and self.norm_factor is None:
            raise ConfigError(
                "a loss_factor or a norm_factor was expected, but both are None: nothing would be watched",
                fix="SpikeRollback(loss_factor=3.0, norm_factor=100.0), or no SpikeRollback",
            )
        self.warm_up = whole("warm_up", warm_up, 2, "SpikeRollback", "a deviation needs two values", 25)
        if self.warm_up > _MEMORY:
            raise ConfigError(
                f"a warm_up of at most {_MEMORY} was expected, but is {warm_up!r}: so many values are remembered, and "
                "the warm-up would never end",
                fix="SpikeRollback(warm_up=25)",
            )
        self.limit = whole("limit", limit, 1, "SpikeRollback", "a run that is lost would go back for ever", 3)
        self.allow_bias = allow_bias
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._in_row = 0  # times that it went back, each soon after the one before
        self._since = 0  # good updates since the last of them

    def __call__(self, estimate: Estimate) -> Estimate | RollBack:
        """Return the estimate with its norm measured, or the verdict to go back."""
        if not estimate.num_injected or not estimate.gradients:
            return estimate
        norm = estimate.gradient_norm().item()
        loss = estimate.loss.item() if estimate.num_terms else None
        faults = [
            *_judged("loss", loss, self._losses, self.loss_factor, self.z, self.warm_up),
            *_judged("gradient norm", norm, self._norms, self.norm_factor, self.z, self.warm_up),
        ]
        if faults:
            return self._roll_back(" and ".join(faults))
        if loss is not None and self.loss_factor is not None:
            self._losses = [*self._losses, loss][-_MEMORY:]
        if self.norm_factor is not None:
            self._norms = [*self._norms, norm][-_MEMORY:]
        self._since += 1
        known = "gradient_norm" in estimate.metrics or not math.isfinite(norm)
        return estimate if known else estimate.with_gradients(estimate.gradients, gradient_norm=norm)

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

    def state_dict(self) -> dict[str, Any]:
        """Return the values that the next are compared with, and how often it went back of late."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "in_row": self._in_row,
            "since": self._since,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._losses = [float(each) for each in state["losses"]]
        self._norms = [float(each) for each in state["norms"]]
        self._in_row, self._since = int(state["in_row"]), int(state["since"])


def _judged(
    name: str, value: float | None, before: list[float], factor: float | None, z: float, warm_up: int
) -> list[str]:
    """Return what is wrong with the value, in no or one sentence."""
    if value is None or factor is None:
        return []
    if not math.isfinite(value):
        return [f"the {name} is {value}"]
    if len(before) < warm_up:
        return []
    middle = median(before)
    deviation = _PER_MAD * median(abs(each - middle) for each in before)
    most = middle + max(z * deviation, (factor - 1) * abs(middle))
    if value <= most:
        return []
    return [f"the {name} is {value:.4g}, where {middle:.4g} is usual and {most:.4g} the most expected"]


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
