"""What the guards share: settings checked, the norm of a gradient, and gradients scaled by what follows from it."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from tbptt.errors import ConfigError, NonFiniteError
from tbptt.estimators.base import Estimate
from tbptt.estimators.gradients import numbers_of

__all__ = ["flag", "norms", "positive", "scaled_to", "total_norm", "whole", "with_norm"]

_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_'s


def positive(name: str, value: float, owner: str, why: str, default: float = 1.0) -> float:
    """Return `value` as a float.

    Raises:
        ConfigError: it is not a positive, finite number.
    """
    number = cast(object, value)  # whatever a caller without a type checker gave
    if not isinstance(number, int | float) or isinstance(number, bool) or not 0 < number < math.inf:
        raise ConfigError(
            f"{name} was expected to be a positive, finite number, but is {number!r}: {why}",
            fix=f"{owner}({name}={default})",
        )
    return float(number)


def whole(name: str, value: int, least: int, owner: str, why: str, default: int) -> int:
    """Return `value`.

    Raises:
        ConfigError: it is not a whole number, or below `least`.
    """
    number = cast(object, value)
    if not isinstance(number, int) or isinstance(number, bool) or number < least:
        raise ConfigError(
            f"{name} was expected to be a whole number, at least {least}, but is {number!r}: {why}",
            fix=f"{owner}({name}={default})",
        )
    return number


def flag(name: str, value: bool, owner: str) -> bool:
    """Return `value`.

    Raises:
        ConfigError: it is neither True nor False.
    """
    if not isinstance(cast(object, value), bool):
        raise ConfigError(
            f"{name} was expected to be True or False, but is {value!r}: it would count as one of them by chance",
            fix=f"{owner}(..., {name}=True)",
        )
    return value


def total_norm(gradients: dict[str, Tensor]) -> Tensor:
    """Return the 2-norm of all gradients together, 0-dim and finite; in float64 where it overflows their dtype.

    Raises:
        NonFiniteError: a gradient is not finite, or the norm is beyond even float64.
    """
    norm = _norm(list(gradients.values()))
    if math.isfinite(norm.item()):
        return norm
    for name, gradient in gradients.items():
        if not bool(torch.isfinite(numbers_of(gradient)).all()):
            raise NonFiniteError(
                f"finite gradients were expected, but that of {name!r} holds NaN or infinity: clipping would spread "
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


def norms(gradients: list[Tensor], order: float) -> Tensor:
    """Return the norm of each gradient. Shape (P,), on the first one's device."""
    found = torch._foreach_norm([numbers_of(each) for each in gradients], order)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    return torch.stack([norm.to(gradients[0].device) for norm in found])


def with_norm(estimate: Estimate, norm: Tensor, **metrics: float) -> dict[str, float]:
    """Return `metrics` with the gradient norm, unless an earlier guard measured it before any change."""
    return metrics if "gradient_norm" in estimate.metrics else {"gradient_norm": norm.item(), **metrics}


def scaled_to(estimate: Estimate, norm: Tensor, most: float) -> Estimate:
    """Return the estimate with all gradients scaled together, so that their norm is `most` if it was above.

    The metric `clip_scale` is the product over all guards that scale so.
    """
    factor = (most / (norm + _EPSILON)).clamp(max=1.0)
    scale, gradients = factor.item(), estimate.all_gradients
    metrics = with_norm(estimate, norm, clip_scale=estimate.metrics.get("clip_scale", 1.0) * scale)
    if scale == 1.0:
        return estimate.with_gradients(gradients, **metrics)
    by = _factor(factor, gradients)
    scaled = torch._foreach_mul(list(gradients.values()), by)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    return estimate.with_gradients(dict(zip(gradients, scaled, strict=True)), **metrics)


def _norm(gradients: list[Tensor]) -> Tensor:
    # What torch.nn.utils.get_total_norm does, in half its time where there are few parameters.
    return torch.linalg.vector_norm(norms(gradients, 2.0))


def _factor(factor: Tensor, gradients: dict[str, Tensor]) -> Tensor | float:
    # A tensor on the gradients' device needs no transfer, and rounds as clip_grad_norm_ does; one number
    # serves all devices, and keeps a float64 norm from widening float32 gradients.
    first = next(iter(gradients.values()))
    uniform = all(g.device == first.device and g.dtype == first.dtype for g in gradients.values())
    return factor if uniform and factor.dtype == first.dtype else factor.item()
