"""Numbers on their way into a picture."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tbptt.report.figure import finite_floor, lines
from tbptt.report.series import Series, moving_mean, paired, running_time, thinned


def series(*y: float) -> Series:
    return Series(np.arange(len(y), dtype=np.float64), np.array(y, dtype=np.float64))


def test_only_numbers_are_points() -> None:
    found = paired([1, 2, None, 4, True, "x", 7], [1.0, None, 3.0, math.nan, 5.0, 6.0, "y"])
    assert found.x.tolist() == [1.0, 4.0]
    assert found.y[0] == 1.0
    assert math.isnan(found.y[1])
    assert len(paired([], [])) == 0


def test_thinning_keeps_every_spike() -> None:
    y = np.zeros(100_000)
    y[[5, 70_001]] = 9.0, -9.0
    found = thinned(Series(np.arange(100_000.0), y), 100)
    assert len(found) <= 100
    assert set(found.x[found.y != 0].tolist()) == {5.0, 70_001.0}
    assert (np.diff(found.x) > 0).all()


def test_few_points_stay_as_they_are() -> None:
    few = series(3.0, 1.0, 2.0)
    assert thinned(few, 4) is few


def test_the_moving_mean_leaves_out_what_is_not_finite() -> None:
    found = moving_mean(series(1.0, 2.0, math.nan, 3.0, math.inf, 4.0), 3)
    assert found.x.tolist() == [0.0, 1.0, 3.0, 5.0]
    np.testing.assert_allclose(found.y, [1.5, 2.0, 3.0, 3.5])
    assert len(moving_mean(series(), 3)) == 0


def test_what_is_not_finite_is_marked_and_counted() -> None:
    drawn, *unusual = lines("loss", series(1.0, math.nan, math.inf, -math.inf, 0.0, math.nan), 0, log_y=True)
    assert drawn["y"] == [1.0]
    assert [(each["name"], each["x"], each["y"][0]) for each in unusual] == [
        ("loss: not a number (2)", [1.0, 5.0], 0.0),
        ("loss: +infinity (1)", [2.0], 1.0),
        ("loss: -infinity (1)", [3.0], 0.0),
        ("loss: 0 or less (1)", [4.0], 0.0),
    ]
    assert len(lines("loss", series(1.0, 0.0), 0)) == 1  # a linear axis has a place for 0


def test_many_marks_are_thinned_and_still_counted() -> None:
    _, mark = lines("loss", series(*[math.nan] * 2000), 0)
    assert len(mark["x"]) == 500
    assert mark["name"].endswith("(2,000)")


@pytest.mark.parametrize(
    ("updates", "elapsed_s", "expected"),
    [
        ([10, 20, 30], [1, 2, 3], {10: 1, 20: 2, 30: 3}),  # one process
        ([10, 20, 30], [1, 2, 0.5], {10: 1, 20: 2, 30: 2.5}),  # stopped, and resumed
        ([10, 20, 15, 25], [1, 2, 3, 4], {10: 1, 15: 5, 25: 6}),  # killed, and resumed from 10: the work counts twice
        ([], [], {}),
    ],
)
def test_time_adds_up_over_processes(
    updates: list[float], elapsed_s: list[float], expected: dict[float, float]
) -> None:
    found = running_time(np.array(updates, dtype=np.float64), np.array(elapsed_s, dtype=np.float64))
    assert dict(zip(found.x.tolist(), found.y.tolist(), strict=True)) == {0.0: 0.0} | expected


def test_the_floor_of_a_logarithmic_picture() -> None:
    assert finite_floor(np.array([0.0, 0.2, math.nan]), np.array([math.inf])) == 0.1
    assert finite_floor(np.array([0.0])) == 1.0
