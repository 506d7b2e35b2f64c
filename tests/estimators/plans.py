"""Runs drawn by hypothesis: data with resets and windows that must be refused, lengths that change, and stops.

What must happen is `counting.Plain`; the fronts are Trainer, Online and Lightning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from counting import Plain, Step
from hypothesis import strategies as st

import tbptt
from tbptt import TBPTT, Ramp

__all__ = ["Drive", "Plan", "plans", "refused"]


@dataclass(frozen=True)
class Plan:
    """What is run.

    Args:
        lanes: sequences side by side.
        steps: of the recording, one pass.
        k1, k2: each a number, or (first, last, over) of a Ramp.
        losses, replay: of TBPTT.
    """

    lanes: int
    steps: tuple[Step, ...]
    k1: int | tuple[int, int, int]
    k2: int | tuple[int, int, int]
    losses: str
    replay: str

    @property
    def numbers(self) -> int:
        """The parameters: one for each step and lane."""
        return len(self.steps) * self.lanes

    def estimator(self) -> TBPTT:
        lengths: list[Any] = [each if isinstance(each, int) else Ramp(*each) for each in (self.k1, self.k2)]
        changes = not all(isinstance(each, int) for each in lengths)
        return TBPTT(*lengths, losses=self.losses, replay="recompute" if changes else self.replay)  # type: ignore[arg-type]

    def rows(self) -> dict[str, Any]:
        """The recording as ArrayStream takes it: lane after lane."""
        inputs = [[(s.numbers[b], float(s.spoiled[b])) for s in self.steps] for b in range(self.lanes)]
        targets = [[s.weights[b] for s in self.steps] for b in range(self.lanes)]
        resets = [[s.resets[b] for s in self.steps] for b in range(self.lanes)]
        return {
            "inputs": np.concatenate(inputs).astype(np.float64),
            "targets": np.concatenate(targets),
            "reset": np.concatenate(resets),
        }

    def stream(self) -> tbptt.ArrayStream:
        return tbptt.ArrayStream(**self.rows(), lanes=self.lanes)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    lanes, length = draw(st.integers(1, 2)), draw(st.integers(8, 16))
    spots = st.tuples(st.integers(0, length - 1), st.integers(0, lanes - 1))
    resets, spoiled, infinite = (draw(st.sets(spots, max_size=most)) for most in (4, 2, 2))
    steps = tuple(
        Step(
            numbers=tuple(lane * length + at for lane in range(lanes)),
            weights=tuple(-1.0 if (at, lane) in infinite else float(1 + at % 3 + lane) for lane in range(lanes)),
            spoiled=tuple((at, lane) in spoiled for lane in range(lanes)),
            resets=tuple((at, lane) in resets for lane in range(lanes)),
        )
        for at in range(length)
    )

    def lengths(most: int) -> st.SearchStrategy[Any]:
        return st.integers(1, most) | st.tuples(st.integers(1, most), st.integers(1, most), st.integers(1, 5))

    return Plan(
        lanes,
        steps,
        draw(lengths(5)),
        draw(lengths(8)),
        draw(st.sampled_from(["tail", "all"])),
        draw(st.sampled_from(["recompute", "retain"])),
    )


def refused() -> Plan:
    """A window that begins a sequence in one lane, and breaks the state: refused, and its reset is owed."""

    def one(at: int) -> Step:
        return Step((at, 12 + at), (1.0, 2.0), (at == 5, False), (False, at == 4))

    return Plan(2, tuple(one(at) for at in range(12)), 2, 6, "tail", "recompute")


class Drive:
    """What must happen to a plan, window by window, pass after pass."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.at, self.windows = plan, 0, 0
        self.plain = Plain(plan.numbers, plan.losses)

    def lengths(self) -> tuple[int, int]:
        """k1 and k2 of the next update: what was not carried on does not count."""
        found = []
        for each in (self.plan.k1, self.plan.k2):
            if isinstance(each, int):
                found.append(each)
            else:
                first, last, over = each
                done = self.plain.carried / over
                found.append(last if done >= 1 else round(first + (last - first) * done))
        return found[0], found[1]

    def advance(self) -> bool:
        """Make one update, of this pass or of the next; return whether the weights moved."""
        steps, k1_k2 = list(self.plan.steps), self.lengths()
        if self.at == len(steps):
            self.at = 0
        window = steps[self.at : self.at + k1_k2[0]]
        if self.at == 0:  # a pass begins: all lanes begin a sequence
            first = window[0]
            window[0] = Step(first.numbers, first.weights, first.spoiled, (True,) * self.plan.lanes)
        self.at += len(window)
        self.windows += 1
        return self.learn(window, *k1_k2)

    def learn(self, window: list[Step], k1: int, k2: int) -> bool:
        used = self.plain.used
        self.plain.update(window, k1, k2)
        return self.plain.used > used
