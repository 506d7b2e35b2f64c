"""Single losses sent far back, and the norm of their gradient at the states that they pass.

Letters: T time, B lanes, K lags.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from tbptt.curve import interpolated, lag_grid
from tbptt.estimators.gradients import Gradients, add, numbers_of, scaled
from tbptt.estimators.history import Stretch
from tbptt.estimators.segments import Segment, lane_norms, walk_back
from tbptt.loss import StepLoss
from tbptt.model import trainable_parameters
from tbptt.pathways import in_segments
from tbptt.side_state import preserved
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
        weights: norm of each part of the parameters' gradient: the first is what a look-back of one step has, each
            further one what comes from lags above the one before, up to this one; of the losses of one step, in all
            lanes together. Shape (K + 1,), float64.
        missed: the share of that gradient, in norm, that a look-back of `tried` steps leaves out.
    """

    lags: tuple[int, ...]
    norms: Tensor
    weights: Tensor
    missed: float


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
    tried: int = 1,
) -> Probe | None:
    """Draw a loss near the end of `window` for each lane, and send it back through the window and the past.

    Neither the model nor the random generators are changed.

    Args:
        past: the steps before the window.
        lags: the lags to measure at, rising.
        draws: which losses.
        unit: steps that the model may be cut at multiples of.
        tried: a look-back whose share of the parameters' gradient is measured.

    Returns:
        None where there are too few steps for the longest lag, or no target, or the window ends within a unit, as the
        last one of a pass may.

    Cost: one pass forward and two back over lags[-1] + SPREAD steps, in about 25 pieces.
    """
    steps = window.steps + (0 if past is None else past.window.steps)
    reached = lags[-1] + spread(unit)
    among = min(SPREAD, window.steps)
    last = window[window.steps - among :]
    valid, _ = loss.valid(last)
    if steps < reached or window.steps % unit or not bool(valid.any()):
        return None
    with preserved(model, device=window.mask.device):
        chosen, delays = _one_each(valid, draws)
        mask = torch.zeros_like(window.mask)
        mask[window.steps - among :] = chosen
        at = steps - among + _fullest(valid, draws)
        distances = [unit * back for back in lag_grid(reached // unit, dense_up_to=8, ratio=1.25)]
        # where the look-back that is tried begins, in whole units
        cuts = {steps - back for back in distances} | {max(0, (at + 1 - tried) // unit * unit)}
        chain, begins = run_chain(model, loss, past, replace(window, mask=mask), dims, sorted(cuts))
        parameters: list[list[Tensor]] = [[]] * len(chain)
        found: dict[int, Tensor] = {}
        for step in walk_back(chain, parameters, _one(chain), to_start=True, keep=True):
            start = chain[step.index].start
            if start is not None:
                found[steps - begins[step.index]] = lane_norms(step.cotangent, start, dims)
        added = _added(model, _of_one_step(chain, begins, loss, window, at), begins, at)
    norms, missed = _by_lookback(added, lags, tried)
    return Probe(tuple(lags), _aligned(found, delays, lags), norms, missed)


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


def _fullest(valid: Tensor, draws: np.random.Generator) -> int:
    """Draw one of the steps at which most lanes have a target."""
    counts = valid.sum(1)
    return int(draws.choice((counts == counts.max()).nonzero().flatten().tolist()))


def _of_one_step(
    chain: Sequence[Segment], begins: Sequence[int], loss: StepLoss, window: Window, at: int
) -> list[Segment]:
    """Return the chain up to a step, counted as `begins` are, with that step's losses alone."""
    index = bisect_right(begins, at) - 1
    last, first = chain[index], begins[index]
    offset = begins[-1] + chain[-1].steps - window.steps  # the step at which the window begins
    piece = window[first - offset : first - offset + last.steps]
    only = torch.zeros_like(piece.mask)
    only[at - first] = piece.mask[at - first]
    summed = loss.total(last.outputs, replace(piece, mask=only))
    # the state after it counts for nothing: no loss of later steps is looked at
    return [*(replace(segment, loss=None) for segment in chain[:index]), last.injecting(summed.total)]


def _added(model: nn.Module, chain: Sequence[Segment], begins: Sequence[int], at: int) -> dict[int, Gradients]:
    """Return what each segment adds to the parameters' gradient, by the look-back that reaches to its first step."""
    parameters = list(trainable_parameters(model).values())
    steps = walk_back(chain, [parameters] * len(chain), _one(chain))
    return {at + 1 - begins[step.index]: step.gradients for step in steps}


def _by_lookback(added: dict[int, Gradients], lags: Sequence[int], tried: int) -> tuple[Tensor, float]:
    """Return `Probe.weights` and `Probe.missed`."""
    parts: list[Gradients | None] = [None] * (len(lags) + 1)
    whole: Gradients | None = None
    kept: Gradients | None = None
    for lookback, gradients in sorted(added.items()):
        # in the first cell whose look-backs all reach so far, so that none is thought to have what it may lack
        place = min(bisect_left(lags, lookback - 1), len(lags) - 1) + 1 if lookback > 1 else 0
        before = parts[place]
        parts[place] = gradients if before is None else add(before, gradients)
        whole = gradients if whole is None else add(whole, gradients)
        kept = whole if lookback <= tried else kept
    assert whole is not None
    norms = torch.stack([torch.zeros((), dtype=torch.float64) if each is None else _norm(each) for each in parts])
    total = float(_norm(whole))
    rest = whole if kept is None else add(whole, scaled(kept, -1.0))
    return norms, float(_norm(rest)) / total if total else 0.0


def _norm(gradients: Gradients) -> Tensor:
    found = [
        torch.linalg.vector_norm(numbers_of(each.detach())).double().cpu() for each in gradients if each is not None
    ]
    return torch.linalg.vector_norm(torch.stack(found)) if found else torch.zeros((), dtype=torch.float64)


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
