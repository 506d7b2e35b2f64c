"""What the tests of the segment transformer share: models, data, and the gradient of the same model in plain loops.

Letters: T time, B lanes, W width, S steps of a segment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import plain_segments as plain
import pytest
import torch
from torch import Tensor, nn

import tbptt
from tbptt.models import SegmentTransformer

S, SEGMENTS, B, W = 4, 5, 2, 8
INPUTS, OUTPUTS = 3, 2
KINDS: dict[str, dict[str, int]] = {
    "memory": {"memory": 6},  # more than a segment
    "short memory": {"memory": 3},
    "tokens": {"memory_tokens": 2},
    "both": {"memory": 3, "memory_tokens": 2},
}
each_kind = pytest.mark.parametrize("kind", KINDS)
far_kind = pytest.mark.parametrize("kind", ["memory", "tokens", "both"])  # two layers see back to the first segment


def made(kind: str, **settings: Any) -> SegmentTransformer:
    model = SegmentTransformer(
        INPUTS, OUTPUTS, W, **({"heads": 2, "layers": 2, "segment": S} | KINDS[kind] | settings)
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases, too: none of them is 0 or 1 here
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def sizes(model: SegmentTransformer, **changes: Any) -> plain.Sizes:
    return replace(plain.Sizes(2, len(model.blocks), model.memory, detached=not model.memory_gradient), **changes)


def data(segments: int = SEGMENTS) -> tbptt.Window:
    steps = segments * S
    return tbptt.Window(torch.randn(steps, B, INPUTS).double(), torch.randn(steps, B, OUTPUTS).double())


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(-1) + outputs[..., 0]


def by_hand(
    model: SegmentTransformer,
    window: tbptt.Window,
    injected: Sequence[int],
    lookback: int,
    between: Callable[[int, plain.Past], plain.Past] = lambda _, past: past,
    **changes: Any,
) -> tuple[Tensor, plain.Past, dict[str, Tensor]]:
    """Return the outputs, the last state and the summed losses' gradient, cut before the last `lookback` segments."""
    weights, own = dict(model.named_parameters()), sizes(model, **changes)
    past = plain.start(weights, own, window.lanes)
    pieces: list[Tensor] = []
    count = window.steps // S
    for segment in range(count):
        if 0 < segment == count - lookback:
            past = past.cut()
        past = between(segment, past)
        piece, past = plain.run_segment(weights, own, window.inputs[segment * S : (segment + 1) * S], past)
        pieces.append(piece)
    outputs = torch.cat(pieces)
    total = sum(losses(pieces[k], window.targets[k * S : (k + 1) * S]).sum() for k in injected)
    assert isinstance(total, Tensor)
    found = torch.autograd.grad(total, list(weights.values()), allow_unused=True, retain_graph=True)
    zeros = [
        torch.zeros_like(value) if each is None else each for each, value in zip(found, weights.values(), strict=True)
    ]
    return outputs, past, dict(zip(weights, zeros, strict=True))


def by_lane(
    model: SegmentTransformer,
    window: tbptt.Window,
    injected: Sequence[int],
    lookback: int,
    *,
    resets: Mapping[int, int],
    cuts: Sequence[int] = (),
) -> dict[str, Tensor]:
    """Return the gradient of `by_hand`, each lane by itself, so that it may start anew.

    Args:
        resets: the segment with which a lane starts anew.
        cuts: the segments before which the graph ends as well.
    """
    total: dict[str, Tensor] = {}
    for lane in range(window.lanes):

        def between(segment: int, past: plain.Past, lane: int = lane) -> plain.Past:
            if segment == resets.get(lane):
                return plain.start(dict(model.named_parameters()), sizes(model), 1)
            return past.cut() if segment in cuts else past

        alone = tbptt.Window(window.inputs[:, lane : lane + 1], window.targets[:, lane : lane + 1])
        for name, each in by_hand(model, alone, injected, lookback, between)[2].items():
            total[name] = total[name] + each if name in total else each
    return total


def last_estimate(estimator: tbptt.Estimator, model: nn.Module, window: tbptt.Window, steps: int = S) -> tbptt.Estimate:
    """Return the estimate of the last window."""
    estimator.prepare(model, window.inputs[:S])
    carry, estimate = estimator.init(model, window.lanes), None
    for begin in range(0, window.steps, steps):
        estimate, carry = estimator.estimate(model, losses, carry, window[begin : begin + steps])
    assert estimate is not None
    return estimate


def apart(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Return the relative distance of two gradients, all parameters together; one that is not there is zero."""
    like = left | right
    one, two = (
        torch.cat([each.get(name, torch.zeros_like(value)).flatten() for name, value in like.items()])
        for each in (left, right)
    )
    return float((one - two).norm() / two.norm())


def summed(estimate: tbptt.Estimate) -> dict[str, Tensor]:
    """Return the gradient of the summed losses, without that of a predictor."""
    own = {name: each for name, each in estimate.gradients.items() if not name.startswith("synthetic_gradients.")}
    return {name: each * estimate.weight for name, each in own.items()}
