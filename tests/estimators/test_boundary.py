"""Clipping the state's gradient where it crosses from window to window."""

from __future__ import annotations

import pytest
import torch
from systems import SYSTEMS, B, D, record, relative, squared
from torch import Tensor, nn

from tbptt import TBPTT, ClipBoundary, Window
from tbptt.errors import ConfigError, NonFiniteError

H = 5


def by_hand(
    model: nn.LSTM, inputs: Tensor, targets: Tensor, k1: int, max_norm: float, each_lane: bool
) -> dict[str, Tensor]:
    """The last of three windows, sent back window by window, the gradient of the state clipped in between."""
    states, state = [None], None
    with torch.no_grad():
        for begin in (0, k1):
            state = model(inputs[begin : begin + k1], state)[1]
            states.append(state)
    names = [name for name, _ in model.named_parameters()]
    total = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    cotangent = None
    for number in (2, 1, 0):
        start = None if number == 0 else tuple(leaf.detach().requires_grad_() for leaf in states[number])
        steps = slice(number * k1, (number + 1) * k1)
        outputs, end = model(inputs[steps], start)
        if cotangent is None:
            value = squared(outputs, targets[steps]).sum() / (k1 * B)
        else:
            value = sum((a * b).sum() for a, b in zip(end, cotangent, strict=True))
        found = torch.autograd.grad(value, [*model.parameters(), *(start or ())])
        for name, gradient in zip(names, found, strict=False):
            total[name] += gradient
        if start is not None:
            h, c = found[len(names) :]
            dims = (0, 2) if each_lane else (0, 1, 2)
            norm = (h.square().sum(dims, keepdim=True) + c.square().sum(dims, keepdim=True)).sqrt()
            cotangent = tuple(leaf * (max_norm / norm).clamp(max=1.0) for leaf in (h, c))
    return total


@pytest.mark.parametrize("replay", ["recompute", "retain"])
@pytest.mark.parametrize("max_norm", [0.02, 1e3])
def test_each_lane_is_clipped_alone_at_each_boundary(replay: str, max_norm: float) -> None:
    torch.manual_seed(0)
    k1, model = 4, nn.LSTM(D, H).double()
    inputs, targets = torch.randn(3 * k1, B, D).double(), torch.randn(3 * k1, B, H).double()
    inputs[:, 1] *= 3  # so that the lanes' norms differ
    estimator = TBPTT(k1, 3 * k1, replay=replay, boundary=ClipBoundary(max_norm))
    carry = estimator.init(model, B)
    for begin in range(0, 3 * k1, k1):
        window = Window(inputs[begin : begin + k1], targets[begin : begin + k1])
        estimate, carry = estimator.estimate(model, squared, carry, window)
    wanted = by_hand(model, inputs, targets, k1, max_norm, each_lane=True)
    assert relative(estimate.gradients, wanted) < 1e-12
    apart = relative(estimate.gradients, by_hand(model, inputs, targets, k1, 1e9, each_lane=True))
    together = relative(estimate.gradients, by_hand(model, inputs, targets, k1, max_norm, each_lane=False))
    if max_norm < 1:  # the controls: it does clip, and all lanes together would be another gradient
        assert apart > 1e-3
        assert together > 1e-4
    else:
        assert apart < 1e-12


def test_norms_are_told_before_clipping() -> None:
    torch.manual_seed(1)
    system = SYSTEMS["nested"]()
    recording = record(system, 24, masks=False, resets=False)
    norms = {}
    for boundary in (None, ClipBoundary(1e-3)):
        estimator = TBPTT(4, 8, boundary=boundary)
        carry = estimator.init(system.model, B)
        for begin in range(0, 24, 4):
            window = Window(recording.inputs[begin : begin + 4], recording.targets[begin : begin + 4])
            estimate, carry = estimator.estimate(system.model, squared, carry, window)
        norms[boundary] = estimate.boundary_norms
    assert torch.equal(norms[None], norms[ClipBoundary(1e-3)])  # the newest boundary: nothing was clipped before it
    assert norms[None] > 1e-3


def test_a_gradient_that_is_not_finite_is_not_clipped_to_a_number() -> None:
    model, estimator = nn.RNN(1, 1, nonlinearity="relu"), TBPTT(1, 2, boundary=ClipBoundary(1.0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    carry = estimator.init(model, 1)
    window = Window(torch.ones(1, 1, 1), torch.ones(1, 1, 1))
    _, carry = estimator.estimate(model, squared, carry, window)
    with pytest.raises(NonFiniteError, match="finite gradient of the state was expected at boundary 1"):
        estimator.estimate(model, lambda outputs, targets: squared(outputs, targets) * float("inf"), carry, window)


@pytest.mark.parametrize("wrong", [0, -1.0, float("inf"), float("nan"), True, "1"])
def test_bad_norms_are_refused(wrong: object) -> None:
    with pytest.raises(ConfigError, match="max_norm was expected to be a positive"):
        ClipBoundary(wrong)


def test_a_boundary_that_is_never_crossed_is_refused() -> None:
    with pytest.raises(ConfigError, match="crosses none"):
        TBPTT(8, 8, boundary=ClipBoundary(1.0))
