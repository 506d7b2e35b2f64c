"""From probes to figures with an uncertainty.

Letters: N probes, K lags or look-backs, M numbers of a gradient (or of its sketch).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tbptt.curve import Floats

__all__ = ["Band", "GradientStatistics", "Sketch", "band", "bootstrap"]

RESAMPLES = 400


@dataclass(frozen=True)
class Band:
    """A curve and how sure it is.

    Args:
        at: the lags or look-backs, in steps.
        mean: the values; nan where there is none.
        low: lower end of the 95 % interval.
        high: upper end.
    """

    at: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def value(self, step: int) -> float:
        """Return the value at a lag or look-back that was measured."""
        return self.mean[self.at.index(step)]


def band(at: Sequence[int], samples: Floats, seed: int = 0) -> Band:
    """Return the mean over probes with a bootstrap interval.

    Args:
        samples: one curve a probe. Shape (N, K).
    """
    spread = bootstrap(samples, lambda chosen: chosen.mean(0), seed)
    low, high = np.quantile(spread, [0.025, 0.975], axis=0)
    return Band(tuple(at), tuple(samples.mean(0).tolist()), tuple(low.tolist()), tuple(high.tolist()))


def bootstrap(samples: Floats, statistic: Callable[[Floats], Floats], seed: int = 0) -> Floats:
    """Return `statistic` of resampled probes, one row a resample; always the same ones."""
    draws = np.random.default_rng(seed).integers(len(samples), size=(RESAMPLES, len(samples)))
    return np.stack([statistic(samples[chosen]) for chosen in draws])


class Sketch:
    """Shortens long gradients so that their inner products stay.

    Up to `size` numbers nothing is lost. Beyond, each is added with a random sign to one of `size` sums: inner
    products keep their expectation, and squared norms vary by sqrt(2 / size), 0.8 % of them.

    Reference: Charikar, Chen & Farach-Colton (2002), "Finding frequent items in data streams" (count sketch).
    """

    def __init__(self, num_parameters: int, size: int = 2**15, seed: int = 0) -> None:
        self.exact = num_parameters <= size
        self.length = num_parameters if self.exact else size
        if not self.exact:
            generator = torch.Generator().manual_seed(seed)
            self._bucket = torch.randint(size, (num_parameters,), generator=generator, dtype=torch.int32)
            self._sign = torch.randint(2, (num_parameters,), generator=generator, dtype=torch.int8) * 2 - 1

    def __call__(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return the sketch of gradients. Shape (M,), float64, on the CPU."""
        flat = torch.cat([each.detach().flatten() for each in gradients]).double().cpu()
        if self.exact:
            return flat
        return torch.zeros(self.length, dtype=torch.float64).index_add_(0, self._bucket.long(), flat * self._sign)


class GradientStatistics:
    """Bias, cosine and signed share of truncated gradients, from their inner products over probes.

    All three are ratios of inner products of *expected* gradients. Products of one probe with itself hold the noise
    of that probe, so only pairs of different probes are counted (a U-statistic); intervals are by the jackknife.

    Args:
        gradients: of each probe, for each look-back, the longest last. Shape (N, K, M).
    """

    def __init__(self, gradients: Tensor) -> None:
        longest = gradients[:, -1]
        self._num, self._count = gradients.shape[:2]
        self._own = torch.stack([each @ each.T for each in gradients.unbind(1)]).numpy()
        self._with_longest = torch.stack([each @ longest.T for each in gradients.unbind(1)]).numpy()
        off = gradients - longest[:, None]
        self._off = torch.stack([each @ each.T for each in off.unbind(1)]).numpy()

    @property
    def single(self) -> Floats:
        """Squared norms of each probe's own gradients: what each look-back leaves out, and all of it; (N, K + 1)."""
        left_out = np.stack([np.diagonal(each) for each in self._off], 1)
        return np.concatenate([left_out, np.diagonal(self._own[-1])[:, None]], 1)

    @property
    def is_measurable(self) -> bool:
        """Whether the expected gradient of the longest look-back stands out of the noise of its probes."""
        if self._num == 1:
            return bool(self._own[-1].sum() > 0)
        value, error = self._jackknife(lambda keep: _pairs(self._own[-1], keep))
        return bool(value > 3 * error)

    def bias(self, at: Sequence[int]) -> Band:
        """Return ||E g_K - E g|| / ||E g|| for each look-back K, g the gradient of the longest."""
        return self._band(at, lambda k, keep: _ratio(_root(_pairs(self._off[k], keep)), _root(self._full(keep))))

    def cosine(self, at: Sequence[int]) -> Band:
        """Return the cosine of E g_K and E g; nan where E g_K is lost in the noise."""
        return self._band(
            at,
            lambda k, keep: _ratio(
                _pairs(self._with_longest[k], keep), _root(_pairs(self._own[k], keep)) * _root(self._full(keep))
            ),
        )

    def signed(self, at: Sequence[int]) -> Band:
        """Return <E g_K, E g> / ||E g||^2, which is negative where the look-back points the wrong way."""
        return self._band(at, lambda k, keep: _ratio(_pairs(self._with_longest[k], keep), self._full(keep)))

    def _full(self, keep: Floats) -> float:
        return _pairs(self._own[-1], keep)

    def _band(self, at: Sequence[int], statistic: Callable[[int, Floats], float]) -> Band:
        rows: list[tuple[float, float, float]] = []
        for k in range(self._count):
            if not self.is_measurable:
                rows.append((math.nan, math.nan, math.nan))
                continue
            value, error = self._jackknife(lambda keep, k=k: statistic(k, keep))
            rows.append((value, value - 2 * error, value + 2 * error))
        mean, low, high = zip(*rows, strict=True)
        return Band(tuple(at), mean, low, high)

    def _jackknife(self, statistic: Callable[[Floats], float]) -> tuple[float, float]:
        """Return a statistic and its standard error."""
        everyone = np.ones(self._num)
        with np.errstate(invalid="ignore", divide="ignore"):
            value = statistic(everyone)
            if self._num < 3:
                return value, 0.0 if self._num == 1 else math.inf
            left = np.array([statistic(everyone - (np.arange(self._num) == out)) for out in range(self._num)])
        error = math.sqrt((self._num - 1) / self._num * float(((left - left.mean()) ** 2).sum()))
        return value, error


def _pairs(products: Floats, keep: Floats) -> float:
    """Return the mean product of two different probes among those kept; of the one with itself where it is alone."""
    kept = products * np.outer(keep, keep)
    num = keep.sum()
    if num == 1:
        return float(kept.sum())
    return float((kept.sum() - np.trace(kept)) / (num * (num - 1)))


def _root(square: float) -> float:
    return math.sqrt(max(0.0, square))


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.nan
