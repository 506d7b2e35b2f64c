"""Closed forms of the curve of gradients by lag."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from tbptt.curve import cut_off, decay_rate, dense, lag_grid, needed_lookback, relative_bound


@pytest.mark.parametrize(
    ("beta", "tolerance", "steps"), [(0.9, 0.1, 22), (0.9, 0.5, 7), (0.5, 0.1, 4), (0.99, 0.3, 120)]
)
def test_geometric_decay(beta: float, tolerance: float, steps: int) -> None:
    phi = beta ** np.arange(2000.0)
    assert needed_lookback(phi, tolerance) == steps == math.ceil(math.log(tolerance) / math.log(beta))


@pytest.mark.parametrize("beta", [0.3, 0.9, 0.98])
@pytest.mark.parametrize("longest", [60, 200])
def test_what_lies_beyond_the_longest_lag_is_part_of_what_is_cut_off(beta: float, longest: int) -> None:
    phi = beta ** np.arange(longest + 1.0)
    exact = beta ** np.arange(longest + 1.0) / (1 - beta)  # the whole geometric series from K on
    np.testing.assert_allclose(cut_off(phi), exact, rtol=1e-6)
    assert decay_rate(phi) == pytest.approx(beta, rel=1e-9)


def test_the_bound_of_a_whole_curve_is_the_decay_itself() -> None:
    np.testing.assert_allclose(relative_bound(0.9 ** np.arange(400.0))[:50], 0.9 ** np.arange(50.0), rtol=1e-6)


def test_a_curve_that_does_not_fall_needs_more_than_was_measured() -> None:
    assert needed_lookback(np.ones(50), 0.5) is None
    assert needed_lookback(np.linspace(1, 2, 50), 0.5) is None


def test_a_late_fall_is_not_taken_for_a_fast_one() -> None:
    phi = np.where(np.arange(100) < 60, 1.0, 1e-6)
    needed = needed_lookback(phi, 0.1)
    assert needed is not None
    assert needed > 50


def test_an_early_fall_does_not_hide_a_slow_rest() -> None:
    """Beyond the lags measured such a curve holds as much again: with one rate for all of it that would be nothing."""
    k = np.arange(60.0)
    phi = 0.5**k + 1e-3 * 0.999**k
    assert decay_rate(phi) > 0.99
    assert needed_lookback(phi, 0.1) is None
    assert needed_lookback(0.5**k, 0.1) == 4


def test_a_curve_of_zeros_beyond_a_lag_ends_there() -> None:
    """As after a reset, or where a model holds a fixed number of steps."""
    phi = np.where(np.arange(100) < 10, 1.0, 0.0)
    assert cut_off(phi)[10] == 0
    assert needed_lookback(phi, 0.05) == 10


def test_lags_between_are_interpolated_and_lag_0_is_taken_from_lag_1() -> None:
    np.testing.assert_allclose(dense((1, 2, 4), [8.0, 4.0, 1.0]), [8, 8, 4, 2, 1])
    np.testing.assert_allclose(dense((1, 2, 4), [8.0, 4.0, 0.0]), [8, 8, 4, 2, 0])  # next to a zero: linear
    np.testing.assert_array_equal(dense((1, 3), [0.0, 0.0]), np.zeros(4))


@pytest.mark.parametrize("longest", [1, 2, 16, 17, 100, 1000])
def test_lags_rise_to_the_longest(longest: int) -> None:
    lags = lag_grid(longest)
    assert lags[0] == 1
    assert lags[-1] == longest
    assert all(a < b for a, b in itertools.pairwise(lags))
    assert all(b <= a + max(1, 0.1 * a) for a, b in itertools.pairwise(lags))
