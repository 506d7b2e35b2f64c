"""A look-back that is drawn anew for each window, its parts weighted.

Letters: T time, B lanes, N look-backs, P parameters.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from tbptt.errors import ConfigError
from tbptt.estimators.base import Estimate
from tbptt.estimators.carry import ChainCarry, check_window
from tbptt.estimators.gradients import Gradients, add, numbers_of, scaled
from tbptt.estimators.replayable import cuts_between
from tbptt.estimators.replayed import HeldPieces, ReplayedChain
from tbptt.estimators.run import Run
from tbptt.estimators.segments import Chain, Pulled, norm_of, walk_back
from tbptt.loss import Counted, Loss, StepLoss
from tbptt.tree import detach
from tbptt.window import Window

__all__ = ["Drawn", "check_lookbacks", "drawn_estimate"]


@dataclass(frozen=True)
class Drawn:
    """What has been drawn for one window.

    Args:
        reached: which of the look-backs is gone back over, by its place.
        weights: of what each look-back adds to the one before, by place, up to `reached`.
    """

    reached: int
    weights: tuple[float, ...]


def drawn_estimate(
    model: nn.Module,
    loss: Loss,
    carry: ChainCarry,
    window: Window,
    *,
    k1: int,
    lookbacks: Sequence[int],
    drawn: Drawn,
    segment: int | None,
    keep_outputs: bool,
) -> tuple[Estimate, ChainCarry, list[float]]:
    """Send a window's losses back over the look-back that was drawn, each part of it with its weight.

    Part n is what look-back n adds to the one before: the parameters' use in the steps that only it has.

    Args:
        lookbacks: rising, the first of them k1 at least.
        segment: steps run with a graph at a time; the look-back is then run once more. None: all at once.

    Returns:
        The estimate, the carry, and the squared norm of each part, unweighted, up to the one that was reached.

    Raises:
        ShapeError: a window longer than k1 or of another number of lanes.
    """
    check_window(window, carry, k1)
    carry = carry.for_window(model, window)
    run = Run(model, StepLoss.of(loss), carry, keep_outputs=keep_outputs)
    # of a model whose calls cannot be cut elsewhere, a look-back begins where it would if the window were full
    missing = carry.missing(window) if carry.joins else -window.steps % k1
    past = carry.last(model, lookbacks[drawn.reached] - window.steps - missing)
    news = 0 if past is None else past.window.steps
    total = news + window.steps
    end = total + missing
    # a segment begins where a part does, and where the next look-back, of whatever length, would
    all_cuts = {max(0, at) for length in lookbacks for at in (end - length, end + k1 - length) if at < total}
    if not carry.joins:
        all_cuts |= {at for at in (news + -each % k1 for each in lookbacks if each < sys.maxsize) if at < total}
    cuts = run.cuts(all_cuts, news)
    chain: Chain
    if segment is None:
        chain, stretches = run.look_back(past, window, cuts)
        injected, state, sizes = run.counted, detach(chain[-1].end), [each.steps for each in chain]
    else:
        shorter = [*range(0, news, segment), *range(news, total, segment)]  # which change nothing
        all_cuts = [*cuts_between(run, past, cuts, needed=True), *cuts_between(run, past, shorter, needed=False)]
        pieces = HeldPieces(past, window, all_cuts)
        chain = ReplayedChain(run, pieces, past, None)
        stretches, injected, state = chain.stretches, chain.counted, chain.state
        sizes = [end - begin for begin, end in pieces.spans]
    pulled, squares = _pull(run, chain, sizes, injected, [each - missing for each in lookbacks], drawn)
    if segment is not None:
        run.newest_first()
    after = replace(
        carry,
        state=state,
        past=carry.past.followed_by(stretches, news, lookbacks[-1]),
        draws=carry.draws + 1,
    )
    estimate = run.estimate(pulled, injected, total, metrics={"drawn": float(drawn.reached)})
    return estimate, after, squares


def _pull(
    run: Run, chain: Chain, sizes: Sequence[int], injected: Counted, lookbacks: Sequence[int], drawn: Drawn
) -> tuple[Pulled, list[float]]:
    """Return the weighted gradient, and the squared norm of each part."""
    nothing: Gradients = [None] * len(run.asked)
    parts = [nothing] * (drawn.reached + 1)
    if not injected:
        return Pulled(nothing, []), []
    weight, norms = run.weight(injected.weight), list[Tensor]()
    distance, of = 0, list[int]()
    for size in reversed(sizes):
        distance += size  # from the window's end to the segment's beginning
        of.append(next((n for n, length in enumerate(lookbacks) if distance <= length), drawn.reached))
    of.reverse()
    for step in walk_back(chain, [run.asked] * len(chain), weight):
        parts[of[step.index]] = add(parts[of[step.index]], step.gradients)
        if step.index > 0:
            norms.append(norm_of(step.cotangent, weight))
    total = nothing
    for part, factor in zip(parts, drawn.weights, strict=True):
        if factor:
            total = add(total, scaled(part, factor))
    return Pulled(total, norms), [_square(part) for part in parts]


def _square(gradients: Gradients) -> float:
    found = [each for each in gradients if each is not None]
    return math.fsum(float(torch.linalg.vector_norm(numbers_of(each))) ** 2 for each in found)


def check_lookbacks(owner: str, k1: int, lookbacks: Sequence[int], fix: str) -> None:
    """Refuse look-backs that do not rise from k1 at least.

    Raises:
        ConfigError: they do not.
    """
    if not lookbacks or lookbacks[0] < k1 or any(a >= b for a, b in pairwise(lookbacks)):
        raise ConfigError(
            f"look-backs of {owner} were expected to rise, the first of them at least k1 = {k1}, but are "
            f"{list(lookbacks)}: each is to add steps to the one before, and all losses of a window are in the first",
            fix=fix,
        )
