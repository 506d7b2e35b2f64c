"""What a curve of gradient norms by lag says: how fast it decays, what a look-back cuts off, how long it must be.

phi_k is the mean norm of the gradient of a loss with respect to the state k steps before; a look-back of K steps,
the loss's own included, keeps the lags 0..K-1 and cuts off the rest.

Letters: k lag in steps, K look-back in steps, R the longest lag measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "Floats",
    "cut_off",
    "decay_rate",
    "dense",
    "interpolated",
    "lag_grid",
    "needed_lookback",
    "needed_window",
    "relative_bound",
]

Floats: TypeAlias = npt.NDArray[np.float64]

_LEAST_LOG = -50.0  # a norm below exp of it is no measurement


def lag_grid(longest: int, dense_up_to: int = 16, ratio: float = 1.1) -> tuple[int, ...]:
    """Return lags from 1 to `longest`: each of the first ones, then in steps that grow with the lag.

    Example:
        >>> lag_grid(32, dense_up_to=4, ratio=1.5)
        (1, 2, 3, 4, 6, 9, 13, 19, 28, 32)
    """
    lags = list(range(1, min(dense_up_to, longest) + 1))
    while lags[-1] < longest:
        lags.append(min(longest, max(lags[-1] + 1, int(lags[-1] * ratio))))
    return tuple(lags)


def dense(lags: Sequence[int], norms: Sequence[float] | Floats) -> Floats:
    """Return phi_0..phi_R: lags between two measured ones by geometric interpolation, linear next to a zero.

    A state's gradient at lag 0 cannot be seen from outside the model: where it is not given it is taken to be that
    of lag 1, which makes a look-back longer rather than shorter when the curve falls.

    Args:
        lags: rising, from 0 or 1 on.
        norms: phi at those lags, 0 or more.
    """
    return interpolated(range(lags[-1] + 1), lags, norms)


def interpolated(at: Sequence[int], known: Sequence[int], values: Sequence[float] | Floats) -> Floats:
    """Return values at some lags from those at `known` ones: geometric between two, linear next to a zero.

    Before the first and after the last known lag the value is that of the nearest.
    """
    values = np.asarray(values, dtype=np.float64)
    linear = np.interp(at, known, values)
    with np.errstate(divide="ignore", invalid="ignore"):
        geometric = np.exp(np.interp(at, known, np.log(values)))
    return np.where(np.isfinite(geometric) & (geometric > 0), geometric, linear)


def decay_rate(phi: Floats) -> float:
    """Return beta of phi_k ~ beta^k, by least squares on log phi; 1 or more for a curve that does not fall.

    Of the fits to the whole curve and to its second half the slower one counts: a curve that falls late has not
    earned a fast rate, and one that falls early must not hide a slow rest.

    Args:
        phi: phi_0..phi_R. Norms below exp(-50) are left out; fewer than two others: the rate is 0.

    Reference: Aicher, Foti & Fox (2019), equation 22; there over all lags.

    Example:
        >>> round(decay_rate(0.9 ** np.arange(50)), 6)
        0.9
    """
    return max(_slope(phi, 0), _slope(phi, len(phi) // 2))


def _slope(phi: Floats, begin: int) -> float:
    with np.errstate(divide="ignore"):
        logs = np.log(phi[begin:])
    kept = logs > _LEAST_LOG
    if kept.sum() < 2:
        return 0.0
    k = np.arange(len(logs))[kept].astype(np.float64)
    k -= k.mean()
    return float(np.exp((k * logs[kept]).sum() / (k * k).sum()))


def cut_off(phi: Floats) -> Floats:
    """Return E(K) for K = 0..R, what a look-back of K cuts off: phi_K + phi_{K+1} + ..., in the units of phi.

    What lies beyond R is phi_R beta / (1 - beta), with `decay_rate`'s beta; infinite for a curve that does not fall.

    Reference: Aicher, Foti & Fox (2019), theorem 1 with tau = R, without the factor M that cancels from every ratio.
    """
    rate = decay_rate(phi)
    last = phi[-1]
    beyond = 0.0 if last == 0 else last * rate / (1 - rate) if rate < 1 else np.inf
    return np.cumsum(phi[::-1])[::-1] + beyond


def relative_bound(phi: Floats) -> Floats:
    """Return Delta(K) for K = 0..R, a bound of the relative bias of a look-back of K.

    E(K) over the largest lower bound of the full gradient's norm, max_k (phi_0 + ... + phi_{k-1} - E(k)); infinite
    where that bound is not positive: too little of the curve has been measured.

    Exactness: a bound when E phi decays by beta from R on and no sign cancels; for phi_k = beta^k it is beta^K.
    Reference: Aicher, Foti & Fox (2019), section 3; there the maximum runs over k <= K, which bounds more loosely.
    """
    off = cut_off(phi)
    least = float(np.max(np.concatenate([[0.0], np.cumsum(phi)[:-1]]) - off))
    return off / least if least > 0 else np.full_like(off, np.inf)


def needed_lookback(phi: Floats, tolerance: float) -> int | None:
    """Return kappa, the shortest look-back whose relative bias is bounded below `tolerance`.

    Returns:
        Steps, the loss's own included, at least 1; None when it is not among those measured.

    Example:
        >>> needed_lookback(0.9 ** np.arange(200), 0.1), needed_lookback(0.9 ** np.arange(200), 0.5)
        (22, 7)
    """
    enough = np.flatnonzero(relative_bound(phi)[1:] < tolerance)
    return int(enough[0]) + 1 if len(enough) else None


def needed_window(phi: Floats, tolerance: float) -> int | None:
    """Return the shortest window without overlap whose losses, reaching 1..W steps back, are bounded in the mean.

    Returns:
        Steps W, at least 1; None when it is not among those measured.

    Example:
        >>> needed_window(0.9 ** np.arange(400), 0.1)  # the mean of 0.9^1 .. 0.9^W is near 9 / W
        90
    """
    bound = relative_bound(phi)[1:]
    enough = np.flatnonzero(np.cumsum(bound) / np.arange(1, len(bound) + 1) < tolerance)
    return int(enough[0]) + 1 if len(enough) else None
