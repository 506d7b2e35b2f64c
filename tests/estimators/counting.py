"""A model whose gradients are whole numbers, and a plain account of what they must be.

y_t = sum of delta_s over the steps s from the start of the sequence to t. The loss of a step is a power of two times y,
so that the gradient of delta_s, times the number of losses, says in its binary digits which losses reached step s.

Letters: T time, B lanes, N steps of the recording.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

__all__ = ["Counting", "Plain", "Step", "counted_loss", "recorded"]


class Counting(nn.Module):
    """Adds up one parameter for each step and lane; inputs are its number, and 1 where NaN comes into the state."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(numbers, dtype=torch.float64))

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state = inputs.new_zeros(inputs.shape[1], dtype=torch.float64) if state is None else state
        spoiled = torch.where(inputs[..., 1] > 0, math.nan, 0.0)  # not in the inputs, where a stream would refuse it
        sums = state + (self.delta[inputs[..., 0].long()] + spoiled).cumsum(0)
        return sums, sums[-1]


def counted_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """The target times the output; one below 0 stands for infinity. Its gradient is NaN where the output is."""
    return torch.where(targets < 0, math.inf, targets) * outputs + 0.0 * outputs * outputs


@dataclass(frozen=True)
class Step:
    """One step of all lanes: numbers, weights of losses, where NaN comes into the state, where a sequence begins."""

    numbers: tuple[int, ...]
    weights: tuple[float, ...]
    spoiled: tuple[bool, ...]
    resets: tuple[bool, ...]


def recorded(steps: list[Step]) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs (N, B, 2), targets (N, B) and resets (N, B)."""
    inputs = [[[n, float(bad)] for n, bad in zip(s.numbers, s.spoiled, strict=True)] for s in steps]
    targets, resets = [step.weights for step in steps], [step.resets for step in steps]
    return (
        torch.tensor(inputs, dtype=torch.float64),
        torch.tensor(targets, dtype=torch.float64),
        torch.tensor(resets, dtype=torch.bool),
    )


@dataclass
class Plain:
    """What must happen, in lists and loops: which losses reach which steps, what is refused, and what is owed for it.

    Args:
        numbers: of parameters.
        losses: "tail" or "all".
        past: the steps carried, oldest first.
        owed: the lanes that are to be reset with the next window.
        total: the sum of all gradients used, which is minus the weights after steps of plain SGD at a rate of 1.
        used: updates that were made.
        carried: windows whose state was carried on.
    """

    numbers: int
    losses: str = "tail"
    past: list[Step] = field(default_factory=list)
    owed: tuple[bool, ...] = ()
    used: int = 0
    carried: int = 0

    def __post_init__(self) -> None:
        self.total: npt.NDArray[np.float64] = np.zeros(self.numbers)

    def pieces(self, steps: int, k1: int, k2: int) -> list[tuple[int, int, int]]:
        """Return (where the gradient ends, first loss, end) of each piece, counted from the first step of the past."""
        news = len(self.past)
        end = news + steps
        if k2 > k1:
            return [(max(0, end - k2), news, end)]
        if steps <= k2:
            return [(news, news, end)]
        if self.losses == "tail":
            return [(end - k2, end - k2, end)]
        return [(begin, begin, min(begin + k2, end)) for begin in range(news, end, k2)]

    def update(self, window: list[Step], k1: int, k2: int) -> npt.NDArray[np.float64] | None:
        """Return the gradient that an update makes of a window; None where it is to be refused."""
        if any(self.owed):
            first = window[0]
            both = tuple(a or b for a, b in zip(first.resets, self.owed, strict=True))
            window = [Step(first.numbers, first.weights, first.spoiled, both), *window[1:]]
        whole, news = [*self.past, *window], len(self.past)
        gradient = np.zeros(self.numbers)
        injected, sound = 0, True
        for ends, first, end in self.pieces(len(window), k1, k2):
            for at in range(first, end):
                for lane, weight in enumerate(whole[at].weights):
                    injected += 1
                    sound &= weight >= 0 and not _is_spoiled(whole, news, at, lane)
                    for before in range(at, ends - 1, -1):
                        if sound:
                            gradient[whole[before].numbers[lane]] += weight
                        if whole[before].resets[lane]:
                            break
        lanes = len(window[0].numbers)
        lost = any(_is_spoiled(whole, news, len(whole) - 1, lane) for lane in range(lanes))
        if lost:  # the window counts as never seen, but for the sequences that it begins
            self.owed = tuple(any(step.resets[lane] for step in window) for lane in range(lanes))
            return None
        self.past, self.owed = whole, ()
        self.carried += 1
        if not sound:
            return None
        gradient /= injected
        self.total += gradient
        self.used += 1
        return gradient


def _is_spoiled(whole: list[Step], news: int, at: int, lane: int) -> bool:
    """Tell whether the output of a step of the window is NaN: what is carried never is."""
    for step in range(at, news - 1, -1):
        if whole[step].spoiled[lane]:
            return True
        if whole[step].resets[lane]:
            return False
    return False
