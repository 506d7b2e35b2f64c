"""Clipping: gradients larger than meant are made smaller."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from tbptt.estimators.base import Estimate
from tbptt.estimators.gradients import numbers_of, with_numbers
from tbptt.guards.base import Guard
from tbptt.guards.norms import flag, norms, positive, scaled_to, total_norm, with_norm
from tbptt.tree import as_complex, as_real

__all__ = ["ClipNorm", "ClipValue"]

_WHY = "every gradient would be lost or none ever clipped"


class ClipNorm(Guard):
    """Scale all gradients together, so that their 2-norm is at most `max_norm`.

    The usual remedy for exploding gradients: the direction stays, g <- g min(1, max_norm / (||g|| + 1e-6)).
    Where one rare explosion is the problem, that is all it takes; where most updates are clipped, the
    learning rate is in truth another one than was set.

    Adds the metrics `gradient_norm`, before any clipping, and `clip_scale`, 1 when nothing was clipped.

    Args:
        max_norm: the largest norm that passes unchanged, above 0.
        allow_bias: whether it may be used with an unbiased estimator, whose promise it breaks.

    Raises:
        ConfigError: `max_norm` is not a positive, finite number.
        NonFiniteError: when called with a gradient that is not finite; no scale could mend it.

    Exactness: biased wherever it clips; bit for bit what torch.nn.utils.clip_grad_norm_ gives, except that
        a norm too large for the gradients' dtype is measured in float64 instead of being taken for infinite.
    Cost: O(P), one more copy of the gradients when it clips.
    Reference: Pascanu, Mikolov, Bengio (2013), algorithm 1, arXiv:1211.5063.
    """

    changes_mean: ClassVar[bool] = True

    def __init__(self, max_norm: float, *, allow_bias: bool = False) -> None:
        self.max_norm = positive("max_norm", max_norm, "ClipNorm", _WHY)
        self.allow_bias = flag("allow_bias", allow_bias, "ClipNorm")

    def __call__(self, estimate: Estimate) -> Estimate:
        """Return the estimate with its gradients scaled."""
        if not estimate.num_injected or not estimate.all_gradients:
            return estimate
        return scaled_to(estimate, total_norm(estimate.all_gradients), self.max_norm)


class ClipValue(Guard):
    """Clamp each element of each gradient to at most `max_value` in size.

    Simpler than ClipNorm and seldom better: it turns the gradient away from its direction. Some recipes
    for recurrent nets with RMSprop were published with it, and need it to be repeated.

    Adds the metrics `gradient_norm`, before any clipping, and `clipped_share`, of all elements.

    Args:
        max_value: the largest size of an element that passes unchanged, above 0. The real and the imaginary
            part of a complex one are clamped each.
        allow_bias: whether it may be used with an unbiased estimator, whose promise it breaks.

    Raises:
        ConfigError: `max_value` is not a positive, finite number.
        NonFiniteError: when called with a gradient that is not finite; clamping would invent a number.

    Exactness: biased wherever it clips; what torch.nn.utils.clip_grad_value_ gives.
    Cost: O(P), two more copies of the gradients when it clips.
    Reference: Graves (2013), section 2.1, arXiv:1308.0850.
    """

    changes_mean: ClassVar[bool] = True

    def __init__(self, max_value: float, *, allow_bias: bool = False) -> None:
        self.max_value = positive("max_value", max_value, "ClipValue", _WHY)
        self.allow_bias = flag("allow_bias", allow_bias, "ClipValue")

    def __call__(self, estimate: Estimate) -> Estimate:
        """Return the estimate with its gradients clamped."""
        gradients = estimate.all_gradients
        if not estimate.num_injected or not gradients:
            return estimate
        norm = total_norm(gradients)
        parts = [as_real(numbers_of(each)) for each in gradients.values()]
        largest = norms([part for part in parts if part.numel()], math.inf).max()
        if largest.item() <= self.max_value:
            return estimate.with_gradients(gradients, **with_norm(estimate, norm, clipped_share=0.0))
        clamped = [part.clamp(-self.max_value, self.max_value) for part in parts]
        num_clipped = sum(int(torch.count_nonzero(a != b)) for a, b in zip(clamped, parts, strict=True))
        share = num_clipped / sum(part.numel() for part in parts)
        whole = [
            with_numbers(gradient, as_complex(part) if gradient.is_complex() else part)
            for gradient, part in zip(gradients.values(), clamped, strict=True)
        ]
        metrics = with_norm(estimate, norm, clipped_share=share)
        return estimate.with_gradients(dict(zip(gradients, whole, strict=True)), **metrics)
