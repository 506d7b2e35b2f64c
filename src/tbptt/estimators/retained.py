"""Segments whose graphs outlive the update that made them.

Letters: T time, B lanes.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tbptt.errors import CapabilityError
from tbptt.estimators.segments import Segment
from tbptt.model import trainable_parameters
from tbptt.side_changes import packed, unpacked
from tbptt.side_state import SideState, as_then
from tbptt.tree import LaneDims, Tree, detach, differentiable
from tbptt.weights import KeptWeights
from tbptt.window import Window

__all__ = ["RetainedSegment", "kept_for", "newest", "retained_from", "retained_state"]


@dataclass(frozen=True, eq=False)
class RetainedSegment:
    """A segment that outlives the update: it remembers the weights it was run with.

    Its graph holds copies of the weights, so that an optimizer may change the originals in place. It can also be
    rebuilt, from its steps, its start state, those copies and the side state: to be cut at a place not foreseen, or
    after a restart.

    Args:
        window: its steps, without targets.
        begin: the state before them, detached; None for the model's initial state.
        weights: the copies of the parameters that require a gradient.
        side: what else the model found before the first step; None where that is not known.
        live: its graph, if it is built.
    """

    window: Window
    begin: Tree | None
    weights: KeptWeights
    side: SideState | None
    live: Segment | None = None

    @property
    def steps(self) -> int:
        """The number of steps, T."""
        return self.window.steps

    @staticmethod
    def run(
        model: nn.Module, window: Window, begin: Tree | None, weights: KeptWeights, dims: LaneDims | None
    ) -> RetainedSegment:
        """Run `model`, which has these weights, over `window` from `begin`."""
        side = SideState.of(model, device=window.mask.device)
        with weights.recording():
            live = Segment.run(model, window, begin, dims, track=begin is not None)
        return RetainedSegment(window.without_targets(), begin, weights, side, replace(live, weights=weights))

    def built(self, model: nn.Module, dims: LaneDims | None) -> RetainedSegment:
        """Return the segment with its graph, run again if it is not there, or leads to another model's parameters."""
        if self.live is not None and self.weights.fits(trainable_parameters(model)):
            return self
        with self._as_then(model) as weights:
            return RetainedSegment.run(model, self.window, self.begin, weights, dims)

    def split(self, model: nn.Module, step: int, dims: LaneDims | None) -> tuple[RetainedSegment, RetainedSegment]:
        """Return the segment as two, cut before `step`; both are run again."""
        with self._as_then(model) as weights:
            old = RetainedSegment.run(model, self.window[:step], self.begin, weights, dims)
            assert old.live is not None
            new = RetainedSegment.run(model, self.window[step:], detach(old.live.end), weights, dims)
        return old, new

    @contextmanager
    def _as_then(self, model: nn.Module) -> Generator[KeptWeights]:
        """Let the model have the weights, and find all else, that it had and found then."""
        weights = self.weights.bound_to(trainable_parameters(model))
        with as_then(self.side, model, device=self.window.mask.device), weights.in_place():
            yield weights

    def past(self) -> RetainedSegment:
        """Return the segment as later updates see it: its losses have been injected, once."""
        return replace(self, live=None if self.live is None else replace(self.live, outputs=None, loss=None))

    def asleep(self) -> RetainedSegment:
        """Return the segment without its graph, to be built again if it is needed."""
        return replace(self, live=None)


def retained_state(segments: Sequence[RetainedSegment]) -> dict[str, Any]:
    """Return all but the graphs, as plain values and trees."""
    return {
        "segments": [
            {"window": each.window.state_dict(), "begin": each.begin, "weights": each.weights.values}
            for each in segments
        ],
        "sides": packed([each.side for each in segments]),
    }


def retained_from(state: dict[str, Any] | list[dict[str, Any]]) -> tuple[RetainedSegment, ...]:
    """Return what `retained_state` described, asleep."""
    if isinstance(state, list):  # of a version that kept no side states: the model draws anew
        state = {"segments": state, "sides": packed([None] * len(state))}
    return tuple(
        RetainedSegment(Window(**each["window"]), each["begin"], KeptWeights(dict(each["weights"])), side)
        for each, side in zip(state["segments"], unpacked(state["sides"]), strict=True)
    )


def newest(
    model: nn.Module, retained: Sequence[RetainedSegment], after: Tree | None, steps: int, dims: LaneDims | None
) -> list[RetainedSegment]:
    """Return the last `steps` steps of the retained segments, built; one that sticks out is cut.

    A model that draws its random numbers in another order when it is run in two pieces (dropout between the
    layers of one module) cannot be cut: the piece would not lead to the state that was carried. It is left
    out then, and the look-back of this one update is shorter.
    """
    found: list[RetainedSegment] = []
    back = 0
    for segment in reversed(retained):
        if steps <= 0:
            break
        back += segment.steps
        if segment.steps > steps:
            segment = segment.split(model, segment.steps - steps, dims)[1]
            if not _agree(segment, after):
                break
        built = segment.built(model, dims)
        if built is not segment and not _agree(built, after):
            raise CapabilityError(
                f"the {segment.steps} steps that lie {back} before the window were expected to lead to the state that "
                f"was carried on when they are run again, but {type(model).__name__} led to another one: something "
                "that it reads is neither an attribute nor a buffer nor a random generator of its own, torch's, "
                "numpy's or Python's, and was not restored",
                fix="keep it as an attribute or a buffer of the model, or in the state",
            )
        found.append(built)
        after = segment.begin
        steps -= segment.steps
    return found[::-1]


def _agree(segment: RetainedSegment, after: Tree) -> bool:
    assert segment.live is not None
    pairs = zip(differentiable(segment.live.end), differentiable(after), strict=True)
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in pairs)


def kept_for(chain: Sequence[RetainedSegment], k1: int, k2: int) -> tuple[RetainedSegment, ...]:
    """Return the segments that the next look-back may need.

    A full next window needs the last k2 - k1 steps; a short one needs more, which are kept asleep.
    """
    kept: list[RetainedSegment] = []
    age = 0
    for segment in reversed(chain):
        if age >= k2 - 1:
            break
        kept.append(segment.past() if age < k2 - k1 else segment.asleep())
        age += segment.steps
    return tuple(kept[::-1])
