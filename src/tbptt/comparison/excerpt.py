"""The steps on which gradients are compared: a burn-in, and after it one span for each point.

Letters: T time, B lanes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from tbptt.comparison.failures import Failures
from tbptt.comparison.settings import longest_length, longest_window
from tbptt.errors import EndOfStream, StreamError
from tbptt.estimators.base import Estimator
from tbptt.estimators.carry import unit_of
from tbptt.streams.base import Stream
from tbptt.tree import Tree
from tbptt.window import Window

__all__ = ["Excerpt", "Sizes", "plan", "read"]

_SHORTEST_SPAN = 32
"""Steps; a point of a few steps would say more of these than of the estimator."""
_SHORTEST_BURN_IN = 256
"""Steps; how far gradients go is what is asked, so the reference must not end where the estimators do."""
_LONGEST = 1024
"""Steps that a span, and a burn-in, may have unless more is asked for: the reference holds all of them in memory."""
_PROBED = 16
"""Steps beyond its longest lag that a probe of `Adaptive` needs."""


@dataclass(frozen=True)
class Sizes:
    """How the excerpt is cut.

    Args:
        points: the number of spans.
        span: steps of each.
        burn_in: steps before the first, for states and look-backs to fill.
        unit: that all of them are multiples of, in steps: a segment of the model.
    """

    points: int
    span: int
    burn_in: int
    unit: int = 1

    @property
    def steps(self) -> int:
        """All steps together."""
        return self.burn_in + self.points * self.span


@dataclass(frozen=True, eq=False)
class Excerpt:
    """Consecutive steps of a stream.

    Args:
        window: all of them.
        sizes: how they are cut.
    """

    window: Window
    sizes: Sizes

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where each span begins, and ends."""
        first, span = self.sizes.burn_in, self.sizes.span
        return [(first + each * span, first + (each + 1) * span) for each in range(self.sizes.points)]


def plan(
    estimators: Mapping[str, Estimator],
    model: nn.Module,
    lanes: int,
    inputs: Tree,
    failures: Failures,
    *,
    points: int,
    span: int | None,
    burn_in: int | None,
) -> Sizes:
    """Choose what was left out.

    A span is a common multiple of the windows' lengths, so that none is cut short, unless that is more than four
    times the longest of them: then it is the longest. The burn-in is twice the longest look-back, and at least 256
    steps, in whole spans. Neither is longer than 1024 steps unless asked for. Both are in whole segments of the model.

    Args:
        inputs: an example, leaves (T, B, ...).

    Raises:
        ConfigError: a span or a burn-in that was given cuts a segment.
        Exception: what the first estimator raised, if all of them do.
    """
    windows: list[int] = []
    reached, unit = 0, unit_of(model, span=span, burn_in=burn_in)
    longest_span = max(unit, _LONGEST // unit * unit)
    for name, each in estimators.items():
        with failures.kept(name):
            its_own = copy.deepcopy(model)
            each.prepare(its_own, inputs)
            steps = each.next_steps(each.init(its_own, lanes))
            reached = max([reached, *(each.reach(min(steps, longest_span)) or ())])
            windows.append(min(longest_span, longest_window(each, steps)))
            changing = longest_length(each)
            reached = max(reached, changing + windows[-1] + _PROBED if changing else 0)
    failures.raise_if_all(estimators)
    if span is None:
        longest, common = max(windows), math.lcm(*windows)
        several = common if common <= 4 * longest else longest
        span = several * math.ceil(_SHORTEST_SPAN / several)
    if burn_in is None:
        burn_in = span * math.ceil(min(_LONGEST, max(2 * reached, _SHORTEST_BURN_IN)) / span)
    return Sizes(points, span, burn_in, unit)


def read(stream: Stream, sizes: Sizes, device: torch.device) -> Excerpt:
    """Read the steps from where the stream is.

    Raises:
        StreamError: the pass has fewer.
    """
    try:
        window = stream.read(sizes.steps)
        steps = window.steps
    except EndOfStream:
        window, steps = None, 0
    if window is None or steps < sizes.steps:
        raise StreamError(
            f"{sizes.steps} steps were expected from where the stream is to the end of its pass, {sizes.burn_in} of "
            f"burn-in and {sizes.points} points of {sizes.span}, but there are {steps}: not all these points could be "
            "measured",
            fix=_smaller(sizes, steps),
        )
    return Excerpt(window.to(device), sizes)


def _smaller(sizes: Sizes, steps: int) -> str:
    left = (steps - sizes.burn_in) // sizes.span
    if left >= 1:
        return f"points={left}"
    span = max(1, min(sizes.span, steps // 4) // sizes.unit) * sizes.unit
    if steps >= 2 * span:
        points = min(sizes.points, (steps - span) // span)
        return f"points={points}, span={span}, burn_in={span}; or fewer lanes, whose passes are longer"
    return "stream.rewind()"
