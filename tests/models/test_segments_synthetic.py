"""SyntheticGradients on SegmentTransformer: what is predicted reaches tokens and remembered steps; what that costs."""

from __future__ import annotations

from typing import Any

import plain_segments as plain
import pytest
import torch
from segment_models import (
    INPUTS,
    OUTPUTS,
    SEGMENTS,
    B,
    S,
    W,
    apart,
    by_hand,
    data,
    far_kind,
    last_estimate,
    losses,
    made,
    sizes,
    summed,
)
from torch import Tensor, nn

import tbptt
from tbptt.errors import CapabilityError
from tbptt.estimators.predictor import attached
from tbptt.models import SegmentTransformer


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_synthetic_gradients_reach_what_is_written() -> None:
    model, window = made("tokens"), data(3)
    net = nn.Linear(2 * W, 2 * W).double()
    estimator = tbptt.SyntheticGradients(S, predictor="own")
    estimator.attach(model, window.inputs[:S], net)
    estimate = last_estimate(estimator, model, window)
    own = {name: each for name, each in summed(estimate).items() if not name.startswith("synthetic_gradients")}

    def gradient(share: float) -> dict[str, Tensor]:
        weights = {name: each for name, each in model.named_parameters() if not name.startswith("synthetic_gradients")}
        past = plain.start(weights, sizes(model), B)
        for segment in range(2):
            _, past = plain.run_segment(weights, sizes(model), window.inputs[segment * S : (segment + 1) * S], past)
        past = past.cut()
        outputs, past = plain.run_segment(weights, sizes(model), window.inputs[-S:], past)
        rows = torch.cat(past.tokens, -1)
        ahead = (rows @ net.weight.T + net.bias).detach()
        total = losses(outputs, window.targets[-S:]).sum() + share * (ahead * rows).sum()
        found = torch.autograd.grad(total, list(weights.values()), materialize_grads=True, allow_unused=True)
        return dict(zip(weights, found, strict=True))

    assert apart(own, gradient(1.0)) < 1e-10
    assert apart(own, gradient(0.0)) > 1e-3  # the control: TBPTT(S, S)


class Told(nn.Module):
    """A predictor that says what it is told, or nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.zeros(1).double())
        self.rows: Tensor | None = None

    def forward(self, rows: Tensor) -> Tensor:
        return (torch.zeros_like(rows) if self.rows is None else self.rows) + 0 * self.idle


def future(model: SegmentTransformer, window: tbptt.Window, segment: int) -> Tensor:
    """The gradient of all losses from a segment on with respect to what is carried into it, a row for each lane."""
    weights, own, total = dict(model.named_parameters()), sizes(model), torch.zeros(()).double()
    past = start = plain.start(weights, own, B)
    for number in range(SEGMENTS):
        part = slice(number * S, (number + 1) * S)
        if number == segment:
            past = start = past.cut()
            for rows in (*start.memory, start.tokens):
                for row in rows:
                    row.requires_grad_()
        outputs, past = plain.run_segment(weights, own, window.inputs[part], past)
        total = total + losses(outputs, window.targets[part]).sum() * (number >= segment)
    parts: list[Tensor] = []
    for rows in [*(start.memory if model.memory else []), start.tokens]:
        empty = max(0, model.memory - len(rows)) if rows is not start.tokens else 0  # of these nothing comes
        found = torch.autograd.grad(total, rows, retain_graph=True, materialize_grads=True) if rows else ()
        parts += [*[torch.zeros(B, W).double()] * empty, *found]
    return torch.cat(parts, 1)


@far_kind
def test_with_a_right_predictor_the_windows_add_up_to_the_full_gradient(kind: str) -> None:
    model, window = made(kind), data()
    told, estimator = Told(), tbptt.SyntheticGradients(S, predictor="own")
    ahead = [future(model, window, segment) for segment in range(1, SEGMENTS)]
    estimator.attach(model, window.inputs[:S], told)

    def total(known: int) -> dict[str, Tensor]:
        """What all windows give together, where the predictor is right about the first so many ends of theirs."""
        carry, sums = estimator.init(model, B), dict[str, Tensor]()
        for number in range(SEGMENTS):
            told.rows = ahead[number] if number < known else None
            estimate, carry = estimator.estimate(model, losses, carry, window[number * S : (number + 1) * S])
            for name, each in summed(estimate).items():
                sums[name] = sums[name] + each if name in sums else each
        return sums

    wanted = by_hand(model, window, range(SEGMENTS), SEGMENTS)[2]
    assert apart(total(SEGMENTS - 1), wanted) < 1e-10
    assert apart(total(SEGMENTS - 2), wanted) > 1e-4  # the controls: one end is not predicted, or none is
    assert apart(total(0), wanted) > 1e-2


def wide(**settings: Any) -> SegmentTransformer:
    return SegmentTransformer(INPUTS, OUTPUTS, 32, heads=2, layers=2, segment=S, **settings)


def test_a_predictor_is_as_large_as_the_state_is_and_traces_of_one_that_is_too_large_are_refused() -> None:
    inputs = torch.randn(S, B, INPUTS)
    for settings, numbers in (({"memory_tokens": 2}, 2 * 32), ({"memory": 8}, 2 * 8 * 32)):
        model = wide(**settings)
        tbptt.SyntheticGradients(S).prepare(model, inputs)
        predictor = attached(model)
        assert predictor is not None
        assert predictor.size == numbers
        assert sum(each.numel() for each in predictor.parameters()) == numbers * (numbers + 1)
    tokens, memory = wide(memory_tokens=2), wide(memory=8)
    estimator = tbptt.SyntheticGradients(S, lambda_=1.0)
    for model in (tokens, memory):
        estimator.prepare(model, inputs)
    estimator.init(tokens, B)
    with pytest.raises(CapabilityError, match=r"hint: ") as caught:
        estimator.init(memory, B)
    assert str(512 * 512 * 513 * B) in str(caught.value)
