"""Numbers on their way into a picture: thinned, smoothed, and put in time. Nothing that is not finite is dropped.

Letters: N points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["MOST_POINTS", "Floats", "Series", "moving_mean", "paired", "running_time", "thinned"]

Floats: TypeAlias = npt.NDArray[np.float64]
Indices: TypeAlias = npt.NDArray[np.intp]

_NUMBERS = (int, float)  # and no bool, which is an int, too
MOST_POINTS = 2000  # of a drawn line: about twice the pixels of a wide screen


@dataclass(frozen=True, eq=False)
class Series:
    """What was measured, against something else.

    Args:
        x: shape (N,).
        y: likewise; may be NaN or infinite, which is a measurement too.
    """

    x: Floats
    y: Floats

    def __len__(self) -> int:
        return len(self.y)

    @property
    def finite(self) -> Series:
        """The points that can be drawn."""
        kept = np.isfinite(self.y) & np.isfinite(self.x)
        return Series(self.x[kept], self.y[kept])

    def where(self, kept: npt.NDArray[np.bool_]) -> Series:
        """Return some of the points."""
        return Series(self.x[kept], self.y[kept])


def paired(x: Sequence[Any], y: Sequence[Any]) -> Series:
    """Return the points of which both are numbers; what is None or text was not measured."""
    kept = [pair for pair in zip(x, y, strict=True) if type(pair[0]) in _NUMBERS and type(pair[1]) in _NUMBERS]
    return Series(*np.array(kept, dtype=np.float64).reshape(-1, 2).T)


def thinned(series: Series, most: int = MOST_POINTS) -> Series:
    """Return at most so many points: of each stretch the lowest and the highest, so that no spike is lost.

    Args:
        series: finite points, in order.
        most: points to keep, an even number.
    """
    if len(series) <= most:
        return series
    edges = np.linspace(0, len(series), most // 2 + 1).astype(np.intp)
    kept: list[int] = []
    for begin, end in pairwise(edges.tolist()):
        stretch = series.y[begin:end]
        kept += sorted({int(begin + stretch.argmin()), int(begin + stretch.argmax())})
    return Series(series.x[kept], series.y[kept])


def moving_mean(series: Series, width: int) -> Series:
    """Return the mean of the `width` finite points around each; fewer at the ends."""
    finite = series.finite
    sums = np.concatenate([[0.0], np.cumsum(finite.y)])
    middle = np.arange(len(finite))
    begin, end = np.maximum(middle - width // 2, 0), np.minimum(middle + (width + 1) // 2, len(finite))
    return Series(finite.x, (sums[end] - sums[begin]) / np.maximum(end - begin, 1))


def running_time(updates: Floats, elapsed_s: Floats) -> Series:
    """Return the seconds of work that each update came after, over all processes that worked on a run.

    Each process counts `elapsed_s` from its own beginning, which is told by a fall of either number. Updates that a
    killed process made after its last checkpoint were made again: their first time gives way, the work still counts.
    A process that lived for a shorter time than the next one took to its first line is not told apart.

    Example:
        >>> found = running_time(np.array([10.0, 20.0, 15.0, 25.0]), np.array([5.0, 10.0, 4.0, 9.0]))
        >>> found.x.tolist(), found.y.tolist()
        ([0.0, 10.0, 15.0, 25.0], [0.0, 5.0, 14.0, 19.0])
    """
    points: list[tuple[float, float]] = [(0.0, 0.0)]
    before_s = last_s = last = 0.0
    for update, seconds in zip(updates.tolist(), elapsed_s.tolist(), strict=True):
        if seconds < last_s or update < last:
            before_s += last_s
        last, last_s = update, seconds
        while len(points) > 1 and points[-1][0] >= update:
            points.pop()
        points.append((update, before_s + seconds))
    x, y = zip(*points, strict=True)
    return Series(np.array(x), np.array(y))
