"""Clipping: gradients larger than meant are made smaller."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from tbptt.errors import ConfigError, NonFiniteError
from tbptt.estimators.base import Estimate
from tbptt.guards.base import Guard

__all__ = ["ClipNorm", "ClipValue"]

_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_'s


class ClipNorm(Guard):
    """Scale all gradients together, so that their 2-norm is at most `max_norm`.

    The usual remedy for exploding gradients: the direction stays, g <- g min(1, max_norm / (||g|| + 1e-6)).
    Where one rare explosion is the problem, that is all it takes; where most updates are clipped, the
    learning rate is in truth another one than was set.

    Adds the metrics `gradient_norm`, before any clipping, and `clip_scale`, 1 when nothing was clipped.

    Args:
        max_norm: the largest norm that passes unchanged, above 0.

    Raises:
        ConfigError: `max_norm` is not a positive, finite number.
        NonFiniteError: when called with a gradient that is not finite; no scale could mend it.

    Exactness: biased wherever it clips; bit for bit what torch.nn.utils.clip_grad_norm_ gives, except that
        a norm too large for the gradients' dtype is measured in float64 instead of being taken for infinite.
    Cost: O(P), one more copy of the gradients when it clips.
    Reference: Pascanu, Mikolov, Bengio (2013), algorithm 1, arXiv:1211.5063.
    """

    def __init__(self, max_norm: float) -> None:
        self.max_norm = _positive("max_norm", max_norm, "ClipNorm")

    def __call__(self, estimate: Estimate) -> Estimate:
        """Return the estimate with its gradients scaled."""
        gradients = estimate.gradients
        if not estimate.num_injected or not gradients:
            return estimate
        norm = _total_norm(gradients)
        factor = (self.max_norm / (norm + _EPSILON)).clamp(max=1.0)
        scale = factor.item()
        metrics = _with_norm(estimate, norm, clip_scale=scale)
        if scale == 1.0:
            return estimate.with_gradients(gradients, **metrics)
        by = _factor(factor, gradients)
        scaled = torch._foreach_mul(list(gradients.values()), by)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        return estimate.with_gradients(dict(zip(gradients, scaled, strict=True)), **metrics)


class ClipValue(Guard):
    """Clamp each element of each gradient to at most `max_value` in size.

    Simpler than ClipNorm and seldom better: it turns the gradient away from its direction. Some recipes
    for recurrent nets with RMSprop were published with it, and need it to be repeated.

    Adds the metrics `gradient_norm`, before any clipping, and `clipped_share`, of all elements.

    Args:
        max_value: the largest size of an element that passes unchanged, above 0. The real and the imaginary
            part of a complex one are clamped each.

    Raises:
        ConfigError: `max_value` is not a positive, finite number.
        NonFiniteError: when called with a gradient that is not finite; clamping would invent a number.

    Exactness: biased wherever it clips; what torch.nn.utils.clip_grad_value_ gives.
    Cost: O(P), two more copies of the gradients when it clips.
    Reference: Graves (2013), section 2.1, arXiv:1308.0850.
    """

    def __init__(self, max_value: float) -> None:
        self.max_value = _positive("max_value", max_value, "ClipValue")

    def __call__(self, estimate: Estimate) -> Estimate:
        """Return the estimate with its gradients clamped."""
        gradients = estimate.gradients
        if not estimate.num_injected or not gradients:
            return estimate
        norm = _total_norm(gradients)
        parts = [torch.view_as_real(g) if g.is_complex() else g for g in gradients.values()]
        largest = _norms([part for part in parts if part.numel()], math.inf).max()
        if largest.item() <= self.max_value:
            return estimate.with_gradients(gradients, **_with_norm(estimate, norm, clipped_share=0.0))
        clamped = [part.clamp(-self.max_value, self.max_value) for part in parts]
        num_clipped = sum(int(torch.count_nonzero(a != b)) for a, b in zip(clamped, parts, strict=True))
        share = num_clipped / sum(part.numel() for part in parts)
        whole = [
            torch.view_as_complex(part) if gradient.is_complex() else part
            for gradient, part in zip(gradients.values(), clamped, strict=True)
        ]
        metrics = _with_norm(estimate, norm, clipped_share=share)
        return estimate.with_gradients(dict(zip(gradients, whole, strict=True)), **metrics)


def _positive(name: str, value: float, owner: str) -> float:
    """Return `value`, or say why it cannot be meant."""
    number = cast(object, value)  # whatever a caller without a type checker gave
    if not isinstance(number, int | float) or isinstance(number, bool) or not 0 < number < math.inf:
        raise ConfigError(
            f"{name} was expected to be a positive, finite number, but is {number!r}: every gradient "
            "would be "
            "lost or none ever clipped",
            fix=f"{owner}({name}=1.0)",
        )
    return float(number)


def _total_norm(gradients: dict[str, Tensor]) -> Tensor:
    """Return the 2-norm of all gradients together, 0-dim and finite.

    Raises:
        NonFiniteError: a gradient is not finite, or the norm is beyond even float64.
    """
    norm = _norm(list(gradients.values()))
    if math.isfinite(norm.item()):
        return norm
    for name, gradient in gradients.items():
        if not bool(torch.isfinite(gradient).all()):
            raise NonFiniteError(
                f"finite gradients were expected, but that of {name!r} holds NaN or infinity: clipping "
                "would spread "
                "it to every parameter, or hide it behind a number that nothing computed",
                fix='guards=[NonFinite("skip"), ClipNorm(1.0)]  # NonFinite before clipping',
            )
    # Every number is finite and only the sum of squares has overflowed: to be clipped, not refused.
    wide = torch.complex128 if any(gradient.is_complex() for gradient in gradients.values()) else torch.float64
    norm = _norm([gradient.to(wide) for gradient in gradients.values()])
    if not math.isfinite(norm.item()):
        raise NonFiniteError(
            "gradients of a measurable size were expected, but their norm is beyond 1e154: the training has diverged",
            fix="lower the learning rate, or shorten k2",
        )
    return norm


def _norm(gradients: list[Tensor]) -> Tensor:
    # What torch.nn.utils.get_total_norm does, in half its time where there are few parameters.
    return torch.linalg.vector_norm(_norms(gradients, 2.0))


def _norms(gradients: list[Tensor], order: float) -> Tensor:
    norms = torch._foreach_norm(gradients, order)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    return torch.stack([norm.to(gradients[0].device) for norm in norms])


def _with_norm(estimate: Estimate, norm: Tensor, **metrics: float) -> dict[str, float]:
    """Return `metrics` with the gradient norm, unless an earlier guard measured it before any change."""
    return metrics if "gradient_norm" in estimate.metrics else {"gradient_norm": norm.item(), **metrics}


def _factor(factor: Tensor, gradients: dict[str, Tensor]) -> Tensor | float:
    # A tensor on the gradients' device needs no transfer, and rounds as clip_grad_norm_ does; one number
    # serves all devices, and keeps a float64 norm from widening float32 gradients.
    first = next(iter(gradients.values()))
    uniform = all(g.device == first.device and g.dtype == first.dtype for g in gradients.values())
    return factor if uniform and factor.dtype == first.dtype else factor.item()
