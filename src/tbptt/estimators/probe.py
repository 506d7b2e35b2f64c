"""Single losses sent far back, and the norm of their gradient at the states that they pass.

Letters: T time, B lanes, K lags.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from tbptt.curve import interpolated, lag_grid
from tbptt.estimators.history import Stretch
from tbptt.estimators.segments import Segment, lane_norms, walk_back
from tbptt.loss import StepLoss
from tbptt.model import fork_random, left_as_it_was
from tbptt.pathways import in_segments
from tbptt.tree import LaneDims, detach
from tbptt.unroll import unroll
from tbptt.window import Window

__all__ = ["SPREAD", "Probe", "probe", "run_chain", "spread"]

SPREAD = 16
"""The last steps of a window among which each lane's loss is drawn: lanes that keep step show more than one phase."""


@dataclass(frozen=True, eq=False)
class Probe:
    """The gradients of single losses, one a lane, by lag.

    Args:
        lags: in steps, rising from 1.
        norms: of the gradient of a lane's loss with respect to the lane's state so many steps before, in float64.
            Shape (K, B); only lanes that had a target; one column for all lanes together where the state's lanes are
            not known.
    """

    lags: tuple[int, ...]
    norms: Tensor


def spread(unit: int) -> int:
    """Return `SPREAD` in whole units."""
    return in_segments(SPREAD, unit)


def probe(
    model: nn.Module,
    loss: StepLoss,
    past: Stretch | None,
    window: Window,
    dims: LaneDims | None,
    lags: Sequence[int],
    draws: np.random.Generator,
    unit: int = 1,
) -> Probe | None:
    """Draw a loss near the end of `window` for each lane, and send it back through the window and the past.

    Neither the model nor the random generators are changed.

    Args:
        past: the steps before the window.
        lags: the lags to measure at, rising.
        draws: which losses.
        unit: steps that the model may be cut at multiples of.

    Returns:
        None where there are too few steps for the longest lag, or no target, or the window ends within a unit, as the
        last one of a pass may.

    Cost: one pass forward and back over lags[-1] + SPREAD steps, in about 25 pieces.
    """
    steps = window.steps + (0 if past is None else past.window.steps)
    reached = lags[-1] + spread(unit)
    among = min(SPREAD, window.steps)
    last = window[window.steps - among :]
    valid, _ = loss.valid(last)
    if steps < reached or window.steps % unit or not bool(valid.any()):
        return None
    with fork_random(window.mask.device), left_as_it_was(model):
        chosen, delays = _one_each(valid, draws)
        mask = torch.zeros_like(window.mask)
        mask[window.steps - among :] = chosen
        distances = [unit * back for back in lag_grid(reached // unit, dense_up_to=8, ratio=1.25)]
        cuts = [steps - back for back in distances]
        chain, begins = run_chain(model, loss, past, replace(window, mask=mask), dims, cuts)
        parameters: list[list[Tensor]] = [[]] * len(chain)
        found: dict[int, Tensor] = {}
        for step in walk_back(chain, parameters, _one(chain), to_start=True):
            start = chain[step.index].start
            if start is not None:
                found[steps - begins[step.index]] = lane_norms(step.cotangent, start, dims)
    return Probe(tuple(lags), _aligned(found, delays, lags))


def run_chain(
    model: nn.Module,
    loss: StepLoss,
    past: Stretch | None,
    window: Window,
    dims: LaneDims | None,
    cuts: Sequence[int],
    enter: Callable[[Window], AbstractContextManager[Window]] = nullcontext,
) -> tuple[list[Segment], list[int]]:
    """Run the model over the past and the window as a chain of segments, the window's losses injected.

    Args:
        past: the steps before the window; None for none.
        cuts: where a segment begins, counted from the past's first step; what is before the first of them is run
            without a graph.
        enter: around the run of each segment, and what is run.

    Returns:
        The segments, oldest first, and the step at which each begins.
    """
    loss.by_single_steps("a probe of single losses, as Adaptive lengths, Lags and horizon.measure make")
    news = 0 if past is None else past.window.steps
    whole = window if past is None else Window.join([past.window, window.without_targets()])
    state = None if past is None else past.state
    first = min(cuts)
    if first > 0:
        with torch.no_grad():
            state = detach(unroll(model, whole[:first], state, dims)[1])
    begins = sorted({*cuts, news} if news > first else set(cuts))
    chain: list[Segment] = []
    for begin, end in pairwise([*begins, whole.steps]):
        with enter(whole[begin:end]) as piece:
            segment = Segment.run(model, piece, state, dims, track=True)
        if begin >= news:
            piece = window[begin - news : end - news]
            summed = loss.total(segment.outputs, piece)
            segment = segment.injecting(summed.total) if summed.counted.num else segment
        state = detach(segment.end)
        chain.append(segment)
    return chain, begins


def _one(chain: Sequence[Segment]) -> Tensor:
    losses = [segment.loss for segment in chain if segment.loss is not None]
    return torch.ones_like(losses[-1])


def _one_each(valid: Tensor, draws: np.random.Generator) -> tuple[Tensor, list[int]]:
    """Draw one valid step for each lane: as a mask, and as steps before the last; -1 for a lane without any."""
    chosen = torch.zeros_like(valid)
    delays: list[int] = []
    for lane in range(valid.shape[1]):
        steps = valid[:, lane].nonzero().flatten().tolist()
        if not steps:
            delays.append(-1)
            continue
        step = int(draws.choice(steps))
        chosen[step, lane] = True
        delays.append(len(valid) - 1 - step)
    return chosen, delays


def _aligned(found: dict[int, Tensor], delays: list[int], lags: Sequence[int]) -> Tensor:
    """Return norms at `lags` for each lane, from those at distances from the window's end."""
    distances = np.array(sorted(found))
    norms = torch.stack([found[each] for each in distances.tolist()]).cpu().numpy()
    if norms.shape[1] != len(delays):  # all lanes together, as far back as the newest loss
        delays = [min(delay for delay in delays if delay >= 0)]
    columns = []
    for lane, delay in enumerate(delays):
        if delay >= 0:  # what lies at or after the loss has no gradient
            before = distances > delay
            known = (distances[before] - delay).tolist()
            columns.append(interpolated(lags, known, norms[before, lane]))
    return torch.from_numpy(np.stack(columns, axis=1))
