"""The steps before a window that a look-back may need, and the states to start it from.

Letters: T time, B lanes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tbptt.tree import LaneDims, Tree, detach
from tbptt.unroll import unroll
from tbptt.window import Window

__all__ = ["History", "Stretch"]


@dataclass(frozen=True, eq=False)
class Stretch:
    """Consecutive steps that have been run.

    Args:
        window: the steps, without targets.
        state: the state before the first of them, detached; None for the model's initial state.
    """

    window: Window
    state: Tree | None

    def state_dict(self) -> dict[str, Any]:
        """Return it as plain values and trees."""
        return {"window": self.window.state_dict(), "state": self.state}

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> Stretch:
        """Return what `state_dict` described."""
        return Stretch(Window(**state["window"]), state["state"])


@dataclass(frozen=True, eq=False)
class History:
    """The newest steps of a stream, oldest first, in stretches that each know the state before them."""

    stretches: tuple[Stretch, ...] = ()

    @property
    def steps(self) -> int:
        """The number of steps that are remembered."""
        return sum(stretch.window.steps for stretch in self.stretches)

    def last(self, model: nn.Module, steps: int, dims: LaneDims | None) -> Stretch | None:
        """Return the last `steps` steps as one stretch, all there are if that is fewer; None for none.

        Where they begin inside a stretch, its head is run again, without a graph, to find the state there.
        """
        begin = max(0, self.steps - steps)
        newer: list[Stretch] = []
        for stretch in self.stretches:
            if begin <= 0:
                newer.append(stretch)
            elif begin < stretch.window.steps:
                head, tail = stretch.window[:begin], stretch.window[begin:]
                with torch.no_grad():
                    newer.append(Stretch(tail, detach(unroll(model, head, stretch.state, dims)[1])))
            begin -= stretch.window.steps
        if not newer:
            return None
        return Stretch(Window.join([stretch.window for stretch in newer]), newer[0].state)

    def followed_by(self, news: Sequence[Stretch], replaced: int, keep: int) -> History:
        """Return the history with new stretches in place of its last steps.

        Args:
            news: the newest stretches, oldest first; what they hold of steps known already, they know better.
            replaced: how many of the last steps they hold again.
            keep: how many steps are to be remembered at least; whole stretches before them are forgotten.
        """
        older, begin = [], self.steps - replaced
        for stretch in self.stretches:
            if begin <= 0:
                break
            older.append(Stretch(stretch.window[:begin], stretch.state))
            begin -= stretch.window.steps
        kept: list[Stretch] = []
        steps = 0
        for stretch in reversed([*older, *news]):
            if steps >= keep:
                break
            kept.append(stretch)
            steps += stretch.window.steps
        return History(tuple(kept[::-1]))
