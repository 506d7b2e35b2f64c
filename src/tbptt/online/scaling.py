"""Numbers made comparable by what was seen of them so far, and never by what comes later.

Letters: D numbers of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Scaling"]

Numbers: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Scaling:
    """Running mean and variance of each number of a row, over the rows seen so far.

    A number that has not varied yet is centred and left at its size. Another row makes another `Scaling`; this one
    stays, so that a row can be looked at before it counts.

    Args:
        count: the rows seen.
        mean: of each number. Shape (D,).
        squares: the sum of its squared differences from the mean. Shape (D,).

    Reference: Welford (1962), doi:10.1080/00401706.1962.10490022.

    Example:
        >>> scaling = Scaling.of(1).seen(np.array([1.0])).seen(np.array([3.0]))
        >>> scaling.scaled(np.array([4.0])), scaling.unscaled(np.array([2.0]))
        (array([2.]), array([4.]))
    """

    count: int
    mean: Numbers
    squares: Numbers

    @staticmethod
    def of(numbers: int) -> Scaling:
        """Return the scaling of rows of so many numbers, before the first."""
        return Scaling(0, np.zeros(numbers), np.zeros(numbers))

    @property
    def std(self) -> Numbers:
        """The standard deviation of each number, 1 where it has not varied. Shape (D,)."""
        found = np.sqrt(self.squares / max(1, self.count))
        return np.where(found > 0.0, found, 1.0)

    def seen(self, row: Numbers) -> Scaling:
        """Return the scaling after another row, shape (D,)."""
        count = self.count + 1
        off = row - self.mean
        mean = self.mean + off / count
        return Scaling(count, mean, self.squares + off * (row - mean))

    def scaled(self, row: Numbers) -> Numbers:
        """Return a row in standard deviations from the mean, shape (D,)."""
        return (row - self.mean) / self.std

    def unscaled(self, row: Numbers) -> Numbers:
        """Return what `scaled` would have made `row` of, shape (D,)."""
        return row * self.std + self.mean

    def state_dict(self) -> dict[str, Any]:
        """Return it as plain values and arrays."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    @staticmethod
    def from_state_dict(state: dict[str, Any]) -> Scaling:
        """Return what `state_dict` described."""
        return Scaling(state["count"], state["mean"], state["squares"])
