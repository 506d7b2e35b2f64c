"""Gradients at matched points: the whole past's, and what an estimator makes of them.

Weights are fixed. The gradient of a span is that of sum / count over the losses of its steps.

Letters: T time, B lanes, R repeats, K points, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import torch
from torch import Tensor, nn

from tbptt.comparison.excerpt import Excerpt
from tbptt.comparison.settings import reseeded
from tbptt.coupling import refuse_coupled
from tbptt.errors import ConfigError
from tbptt.estimators.base import Estimator
from tbptt.estimators.gradients import own
from tbptt.estimators.predictor import PREFIX
from tbptt.estimators.segments import Segment, pull_back
from tbptt.loss import StepLoss
from tbptt.model import find_lane_dims, trainable_parameters
from tbptt.randomness import seed_everything
from tbptt.side_state import preserved
from tbptt.tree import as_real, detach

__all__ = ["Draws", "Reference", "draw", "full_gradients"]


@dataclass(frozen=True, eq=False)
class Reference:
    """The gradient of each span by full back-propagation.

    Args:
        gradients: shape (K, P), on the CPU.
        points: which spans they are of; those without a target are left out.
        reach: the steps before a span that each of its losses was followed back through at least.
    """

    gradients: Tensor
    points: tuple[int, ...]
    reach: int


@dataclass(frozen=True, eq=False)
class Draws:
    """What an estimator made of each span.

    Args:
        errors: its estimates less the reference. Shape (R, K, P); R is 1 where two repeats were equal bit by bit.
        lookback: the mean of `Estimate.lookback` over the windows of all spans.
        finite: whether all of it is.
    """

    errors: Tensor
    lookback: float
    finite: bool


def full_gradients(model: nn.Module, loss: StepLoss, excerpt: Excerpt, longest: int | None) -> Reference:
    """Send the losses of each span back to the first step of the excerpt.

    The model is run once, as a chain of segments whose graphs are kept; each span's losses are then injected alone.

    Args:
        longest: steps before a span that are enough, in whole spans; None: all there are.

    Raises:
        ConfigError: no span has a target that counts.

    Cost: one forward pass over the excerpt, and for each span a backward pass to its first step; memory of the whole
        excerpt, of `longest` steps and two spans where that is given.
    """
    window, sizes = excerpt.window, excerpt.sizes
    parameters = compared_parameters(model)
    dims = find_lane_dims(model, window[: sizes.span].inputs)
    state, chain = None, list[Segment]()
    found: dict[int, Tensor] = {}
    cuts = sorted({0, *range(sizes.burn_in % sizes.span, sizes.steps + 1, sizes.span)})
    reach = sizes.burn_in
    for begin, end in pairwise(cuts):
        segment = Segment.run(model, window[begin:end], state, dims, track=state is not None)
        state = detach(segment.end)
        if begin >= sizes.burn_in:
            if not found:
                refuse_coupled(loss.by_single_steps("tbptt.compare"), segment.outputs, window[begin:end], model)
            total, counted, _ = loss.total(segment.outputs, window[begin:end])
            if counted:
                whole = [*chain, segment.injecting(total)]
                reach = min(reach, sum(each.steps for each in chain))
                pulled = pull_back(
                    whole, [list(parameters.values())] * len(whole), total.new_ones(()) / counted.weight, keep=True
                )
                gradients = own(parameters, pulled.gradients)
                found[(begin - sizes.burn_in) // sizes.span] = flat(gradients, parameters)
        chain.append(segment)
        while longest is not None and sum(each.steps for each in chain[1:]) >= longest:
            del chain[0]
    if not found:
        raise ConfigError(
            f"targets that count were expected in the {sizes.points} spans of {sizes.span} steps after the first "
            f"{sizes.burn_in}, but all of them are masked out: there is no gradient to compare",
            fix="more points, or a longer span",
        )
    return Reference(torch.stack(list(found.values())), tuple(found), reach)


def compared_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that the losses depend on, by name: all that are trained, but for a predictor's."""
    return {name: value for name, value in trainable_parameters(model).items() if not name.startswith(PREFIX)}


def draw(
    model: nn.Module,
    estimator: Estimator,
    loss: StepLoss,
    excerpt: Excerpt,
    reference: Reference,
    *,
    repeats: int,
    seed: int,
) -> Draws:
    """Let an estimator run over the excerpt, again and again, each time with other random numbers.

    In each repeat the global generators are seeded anew, and so is every `seed` among the estimator's settings.

    Cost: `repeats` trainings over the excerpt without updates; two of them where nothing is random.
    """
    rows: list[Tensor] = []
    lookbacks: list[float] = []
    for repeat in range(repeats):
        number = seed * repeats + repeat  # so that another seed has no draw in common
        seed_everything(number % 2**32)
        with preserved(model, device=excerpt.window.mask.device):
            gradients, lookback = _one_draw(model, reseeded(estimator, number), loss, excerpt, reference)
        lookbacks.append(lookback)
        rows.append(gradients - reference.gradients)
        if repeat == 1 and rows[0].equal(rows[1]):
            del rows[1]
            break
    errors = torch.stack(rows)
    return Draws(errors, fmean(lookbacks), bool(errors.isfinite().all()))


def _one_draw(
    model: nn.Module, estimator: Estimator, loss: StepLoss, excerpt: Excerpt, reference: Reference
) -> tuple[Tensor, float]:
    parameters = compared_parameters(model)
    carry = estimator.init(model, excerpt.window.lanes)
    spans = excerpt.spans
    found: list[Tensor] = []
    lookbacks: list[int] = []
    for number, (begin, end) in enumerate([(0, excerpt.sizes.burn_in), *spans], -1):
        total, injected, at = torch.zeros_like(reference.gradients[0], dtype=torch.float64), 0.0, begin
        while at < end:
            steps = min(estimator.next_steps(carry), end - at)
            estimate, carry = estimator.estimate(model, loss, carry, excerpt.window[at : at + steps])
            at += steps
            if number >= 0 and estimate.num_injected:
                total += flat(estimate.gradients, parameters).double() * estimate.weight
                injected += estimate.weight
                lookbacks.append(estimate.lookback)
        if number in reference.points:  # without any loss injected nothing is learned: a gradient of zero
            found.append((total / injected if injected else total).to(reference.gradients.dtype))
    return torch.stack(found), fmean(lookbacks) if lookbacks else 0.0


def flat(gradients: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
    """Return gradients as one vector on the CPU, in single precision at least; zeros for one that is missing."""
    pieces: list[Tensor] = []
    for name, parameter in parameters.items():
        gradient = gradients.get(name)
        gradient = torch.zeros_like(parameter) if gradient is None else gradient.detach()
        pieces.append(as_real(gradient).reshape(-1).cpu())
    joined = torch.cat([piece.float() if piece.dtype in (torch.float16, torch.bfloat16) else piece for piece in pieces])
    return joined
