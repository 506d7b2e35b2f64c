"""The steps before a window that a look-back may need, and the states to start it from.

Letters: T time, B lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from tbptt.side_state import SideState, as_then
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
        side: what else the model found before the first of them; None where that is not known.
        calls: the steps at which calls of the model began, the first of them 0.
    """

    window: Window
    state: Tree | None
    side: SideState | None = None
    calls: tuple[int, ...] = (0,)


@dataclass(frozen=True, eq=False)
class History:
    """The newest steps of a stream, oldest first, in stretches that each know the state before them."""

    stretches: tuple[Stretch, ...] = ()

    @property
    def steps(self) -> int:
        """The number of steps that are remembered."""
        return sum(stretch.window.steps for stretch in self.stretches)

    def last(self, model: nn.Module, steps: int, dims: LaneDims | None, *, whole_calls: bool = False) -> Stretch | None:
        """Return the last `steps` steps as one stretch, all there are if that is fewer; None for none.

        Where they begin inside a stretch, its head is run again, without a graph, to find the state there.

        Args:
            whole_calls: begin where a call of the model began, with fewer steps if need be: for a model that is another
                one when its calls are cut elsewhere.
        """
        begin = max(0, self.steps - steps)
        newer: list[Stretch] = []
        for stretch in self.stretches:
            if begin <= 0:
                newer.append(stretch)
            elif begin < stretch.window.steps:
                newer += _tail(model, stretch, begin, dims, whole_calls)
            begin -= stretch.window.steps
        if not newer:
            return None
        calls: list[int] = []
        offset = 0
        for stretch in newer:
            calls += [offset + call for call in stretch.calls]
            offset += stretch.window.steps
        window = newer[0].window if len(newer) == 1 else Window.join([stretch.window for stretch in newer])
        return Stretch(window, newer[0].state, newer[0].side, tuple(calls))

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
            calls = tuple(call for call in stretch.calls if call < begin)
            older.append(Stretch(stretch.window[:begin], stretch.state, stretch.side, calls))
            begin -= stretch.window.steps
        kept: list[Stretch] = []
        steps = 0
        for stretch in reversed([*older, *news]):
            if steps >= keep:
                break
            kept.append(stretch)
            steps += stretch.window.steps
        return History(tuple(kept[::-1]))


def _tail(model: nn.Module, stretch: Stretch, begin: int, dims: LaneDims | None, whole_calls: bool) -> list[Stretch]:
    """Return a stretch from a step on, and from the next call on where calls are to stay whole; none behind the last.

    What is before it is run again, call by call.
    """
    begin = (
        min((call for call in stretch.calls if call >= begin), default=stretch.window.steps) if whole_calls else begin
    )
    if begin == stretch.window.steps:
        return []
    state, side = stretch.state, stretch.side
    cuts = [*(call for call in stretch.calls if call < begin), begin]
    device = stretch.window.mask.device
    with as_then(side, model, device=device), torch.no_grad():
        for at, end in pairwise(cuts):
            state = detach(unroll(model, stretch.window[at:end], state, dims)[1])
        side = side and SideState.of(model, device=device, like=side)
    calls = sorted({0, *(call - begin for call in stretch.calls if call > begin)})
    return [Stretch(stretch.window[begin:], state, side, tuple(calls))]
