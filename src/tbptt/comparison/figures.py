"""Bias, variance and cosine of gradient estimates, with what noise does to these figures taken out and told.

Letters: R repeats, K points, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

__all__ = ["Figures", "figures"]

_CHUNK = 1 << 20
"""Parameters that are multiplied in double precision at a time."""
_NORMAL = 1.959964
"""Standard errors to each side of a figure, for 95 %, where there are many points and repeats."""


@dataclass(frozen=True)
class Figures:
    """What gradient estimates are worth, against the gradients g of the whole past.

    With e = ĝ - g at a point, E over repeats and < > over points:

    Args:
        relative_bias: |<E e>| / |<g>|.
        bias_low: the lower end of its 95 % interval, over points and over repeats; 0 where it is within noise.
        bias_high: the upper end.
        mean_relative_error: (<|E e|^2> / <|g|^2>)^½: point by point, so that what cancels between points counts, too.
        relative_variance: <E |ĝ - E ĝ|^2> / <|g|^2>; 0 for estimates that are no random numbers.
        cosine: <E cos(ĝ, g)>, over the points where neither is zero.
        cosine_low: the lower end of its 95 % interval, over points.
        cosine_high: the upper end.
    """

    relative_bias: float
    bias_low: float
    bias_high: float
    mean_relative_error: float
    relative_variance: float
    cosine: float
    cosine_low: float
    cosine_high: float


@dataclass(frozen=True, eq=False)
class _Products:
    """Inner products, in double precision.

    Args:
        errors: of errors, shape (K, K, R, R).
        mixed: of errors with the reference of their point, shape (R, K).
        reference: of references, shape (K, K).
    """

    errors: Tensor
    mixed: Tensor
    reference: Tensor


def figures(errors: Tensor, reference: Tensor) -> Figures:
    """Return the figures of estimates.

    The squares of biases are U-statistics: only products of different repeats enter, so that the noise of few repeats
    is not taken for a bias. Their intervals are jackknifed, over points and over repeats, and added as independent
    errors are.

    Args:
        errors: estimates less references. Shape (R, K, P); R = 1 says that the estimates are not random.
        reference: shape (K, P).

    Exactness: squared figures are unbiased in the repeats, their roots are not (tests/comparison/test_figures.py).
    Cost: O((R K)^2 P).
    """
    products = _products(errors, reference)
    repeats, points = errors.shape[:2]
    size, over_points = float(products.reference.mean()), products.errors.mean((0, 1))
    squared = _ratio(float(_different(over_points)), size)
    less = [_ratio(float(_different(_without(over_points, each))), size) for each in range(repeats)]
    over_repeats = _different(products.errors)
    fewer = [
        _ratio(float(_without(over_repeats, each).mean()), float(_without(products.reference, each).mean()))
        for each in range(points)
    ]
    margin = math.hypot(_jackknife(less), _jackknife(fewer))
    by_point = _by_point(products)
    sizes = float(products.reference.diagonal().sum())
    cosine, spread = _cosine(products)
    return Figures(
        relative_bias=_root(squared),
        bias_low=_root(squared - margin),
        bias_high=_root(squared + margin),
        mean_relative_error=_root(_ratio(float(_different(by_point).sum()), sizes)),
        relative_variance=_ratio(float(_variances(by_point).sum()), sizes),
        cosine=cosine,
        cosine_low=max(-1.0, cosine - spread),
        cosine_high=min(1.0, cosine + spread),
    )


def _products(errors: Tensor, reference: Tensor) -> _Products:
    repeats, points, size = errors.shape
    rows = torch.cat([errors.flatten(0, 1), reference])
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for begin in range(0, size, _CHUNK):
        part = rows[:, begin : begin + _CHUNK].double()
        gram += part @ part.T
    count = repeats * points
    mixed = gram[:count, count:].view(repeats, points, points).diagonal(dim1=1, dim2=2)
    own = gram[:count, :count].reshape(repeats, points, repeats, points).permute(1, 3, 0, 2)
    return _Products(own, mixed, gram[count:, count:])


def _different(products: Tensor) -> Tensor:
    """Return the mean product of two different repeats, the only one where there is one; shape (..., R, R) to (...)."""
    repeats = products.shape[-1]
    if repeats == 1:
        return products[..., 0, 0]
    return (products.sum((-2, -1)) - _same(products)) / (repeats * (repeats - 1))


def _variances(products: Tensor) -> Tensor:
    """Return the variance over repeats; shape (..., R, R) to (...)."""
    repeats = products.shape[-1]
    if repeats == 1:
        return torch.zeros(products.shape[:-2], dtype=torch.float64)
    return (_same(products) - products.sum((-2, -1)) / repeats) / (repeats - 1)


def _same(products: Tensor) -> Tensor:
    return products.diagonal(dim1=-2, dim2=-1).sum(-1)


def _by_point(products: _Products) -> Tensor:
    """Return the products of errors of one point, shape (K, R, R)."""
    return products.errors.diagonal(dim1=0, dim2=1).permute(2, 0, 1)


def _cosine(products: _Products) -> tuple[float, float]:
    """Return the mean cosine, and how far its 95 % interval goes to each side."""
    sizes = products.reference.diagonal()
    own = _by_point(products).diagonal(dim1=-2, dim2=-1).T
    lengths = (own + 2 * products.mixed + sizes).clamp(min=0).sqrt() * sizes.sqrt()
    cosines = ((products.mixed + sizes) / lengths).clamp(-1, 1)
    known = [column[column.isfinite()] for column in cosines.T]  # 0 / 0 has no direction
    means = [each.mean() for each in known if len(each)]
    if not means:
        return math.nan, math.nan
    sample = torch.stack(means) if len(means) > 1 else next(each for each in known if len(each))
    count = len(sample)
    spread = float(sample.std()) / math.sqrt(count) * _errors(count - 1) if count > 1 else 0.0
    return float(torch.stack(means).mean()), spread


def _without(products: Tensor, left_out: int) -> Tensor:
    """Return a square of products without one row and column; as it is where that is all there is."""
    kept = [each for each in range(len(products)) if each != left_out]
    return products[kept][:, kept] if kept else products


def _jackknife(values: Sequence[float]) -> float:
    """Return how far the 95 % interval of a figure goes, from its values with each part of the sample left out."""
    count, mean = len(values), fmean(values)
    if count == 1:
        return 0.0
    variance = (count - 1) / count * sum((each - mean) ** 2 for each in values)
    return _errors(count - 1) * math.sqrt(variance)


def _errors(freedom: int) -> float:
    """Return the standard errors to each side of a 95 % interval: Student's t, in the expansion of Cornish and Fisher.

    Example:
        >>> [round(_errors(freedom), 2) for freedom in (3, 7, 30)]  # 3.18, 2.36, 2.04 in tables
        [3.16, 2.36, 2.04]
    """
    z = _NORMAL
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _root(squared: float) -> float:
    return math.nan if math.isnan(squared) else math.sqrt(max(0.0, squared))
