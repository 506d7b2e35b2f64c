"""Clipping of norms that stand out from those before."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, cast

from tbptt.errors import ConfigError
from tbptt.estimators.base import Estimate
from tbptt.guards.base import Guard
from tbptt.guards.norms import flag, positive, scaled_to, total_norm, whole

__all__ = ["ZClip"]

_EPSILON = 1e-6  # the reference's, added to the deviation
_MODES = ("adaptive_scaling", "mean", "percentile")


class ZClip(Guard):
    """Scale all gradients together where their norm stands out from those of the updates before.

    With the running mean m and variance v of the norm, a norm g is z_g = (g - m) / (sqrt(v) + 1e-6) deviations out. If
    that is above `z`, it is clipped to m + z sqrt(v) (z / z_g): the farther out, the closer to the mean. It follows
    norms that change over a training, where the right number for `ClipNorm` would have to change as well; one that
    rises for good is clipped until the mean has followed.

    The first `warm_up` norms only set mean and variance, clipped by nothing but `max_norm`: a spike among them counts.
    Adds the metrics `gradient_norm`, before any clipping, `clip_scale`, 1 when nothing was clipped, and from the end of
    the warm-up on `gradient_z`, z_g.

    Args:
        z: how many deviations above the mean a norm may be, above 0.
        alpha: how much of mean and variance stays in an update, between 0 and 1.
        warm_up: norms that the first mean and variance are made of, 2 or more.
        max_norm: the largest norm that passes at all, from the first update on; None for any.
        mode: what a norm that stands out is clipped to: "adaptive_scaling" as above; "mean" for m; "percentile" for
            m + z sqrt(v).
        update_on_spike: whether a norm that was clipped enters mean and variance, as what it was clipped to. Without,
            one that rises for good is clipped for ever.
        allow_bias: whether it may be used with an unbiased estimator, whose promise it breaks.

    Raises:
        ConfigError: a setting that cannot be meant.
        NonFiniteError: when called with a gradient that is not finite; mean and variance do not see it.

    Exactness: biased wherever it clips; the published recursion, norm by norm (tests/guards/test_zclip.py).
    Cost: O(P), one more copy of the gradients when it clips.
    Reference: Kumar et al. (2025), arXiv:2504.02507, and its code: the variance is about the mean that has already
        moved; the threshold enters both, not what `max_norm` leaves of it. Other than there, `max_norm` is None: 1.0,
        its default there, would clip nearly every update of many recurrent models before any z counts. The factor on
        the threshold is left out, 1 by default there; `update_on_spike` is its `skip_update_on_spike` turned round.
        While the mean is 0 nothing is clipped: all would be clipped to 0, for ever.

    Example:
        >>> import tbptt
        >>> guards = [tbptt.NonFinite("skip"), ZClip(z=2.5)]
    """

    changes_mean: ClassVar[bool] = True

    def __init__(
        self,
        z: float = 2.5,
        alpha: float = 0.97,
        *,
        warm_up: int = 25,
        max_norm: float | None = None,
        mode: Literal["adaptive_scaling", "mean", "percentile"] = "adaptive_scaling",
        update_on_spike: bool = True,
        allow_bias: bool = False,
    ) -> None:
        self.z = positive("z", z, "ZClip", "every norm above the mean would be clipped, or none", 2.5)
        self.alpha = positive("alpha", alpha, "ZClip", "the mean would be the last norm", 0.97)
        if self.alpha >= 1:
            raise ConfigError(
                f"alpha was expected to be below 1, but is {alpha!r}: mean and variance would never follow",
                fix="ZClip(alpha=0.97)",
            )
        self.warm_up = whole("warm_up", warm_up, 2, "ZClip", "a variance needs two norms", 25)
        why = "every gradient would be lost or none ever clipped"
        self.max_norm = None if max_norm is None else positive("max_norm", max_norm, "ZClip", why)
        if cast(object, mode) not in _MODES:
            raise ConfigError(
                f"mode was expected to be one of {', '.join(map(repr, _MODES))}, but is {mode!r}: it decides what a "
                "norm that stands out is clipped to",
                fix='ZClip(mode="adaptive_scaling")',
            )
        self.mode, self.update_on_spike = mode, flag("update_on_spike", update_on_spike, "ZClip")
        self.allow_bias = flag("allow_bias", allow_bias, "ZClip")
        self._norms: list[float] = []  # of the warm-up; kept after it, as the sign that it is over
        self._mean = self._variance = 0.0

    def __call__(self, estimate: Estimate) -> Estimate:
        """Return the estimate with its gradients scaled."""
        if not estimate.num_injected or not estimate.all_gradients:
            return estimate
        measured = total_norm(estimate.all_gradients)
        norm = measured.item()  # finite, or it would have been refused
        most = math.inf if self.max_norm is None else self.max_norm
        if len(self._norms) < self.warm_up:
            self._warm(norm)
            return scaled_to(estimate, measured, most)
        z = (norm - self._mean) / (math.sqrt(self._variance) + _EPSILON)
        threshold = self._threshold(z)
        if threshold is None or self.update_on_spike:
            self._learn(norm if threshold is None else threshold)
        passed = scaled_to(estimate, measured, most if threshold is None else min(most, threshold))
        return passed.with_gradients(passed.all_gradients, gradient_z=z)

    def _warm(self, norm: float) -> None:
        self._norms.append(norm)
        if len(self._norms) == self.warm_up:
            self._mean = sum(self._norms) / self.warm_up
            self._variance = sum((each - self._mean) ** 2 for each in self._norms) / self.warm_up

    def _threshold(self, z: float) -> float | None:
        """Return what a norm so far out is clipped to; None where it is not."""
        if z <= self.z or not self._mean:
            return None
        if self.mode == "mean":
            return self._mean
        return self._mean + self.z * math.sqrt(self._variance) * (1.0 if self.mode == "percentile" else self.z / z)

    def _learn(self, norm: float) -> None:
        self._mean = self.alpha * self._mean + (1 - self.alpha) * norm
        self._variance = self.alpha * self._variance + (1 - self.alpha) * (norm - self._mean) ** 2

    def state_dict(self) -> dict[str, Any]:
        """Return mean, variance and the norms of the warm-up."""
        return {"norms": list(self._norms), "mean": self._mean, "variance": self._variance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._norms = [float(norm) for norm in state["norms"]]
        self._mean, self._variance = float(state["mean"]), float(state["variance"])
