"""ClipBoundary and boundary_norms at the boundaries that are promised, those between windows, in every regime."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tbptt import TBPTT, ClipBoundary, Estimate, Window


class Growing(nn.Module):
    """A rotation that grows by 1.15 a step: what is sent back explodes."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        turn = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
        self.weight, self.bias = nn.Parameter(turn * 1.15), nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state = inputs.new_zeros(inputs.shape[1:]) if state is None else state
        outputs = []
        for each in inputs:
            state = torch.tanh(state @ self.weight.T + self.bias + each)
            outputs.append(state)
        return torch.stack(outputs), state


def products(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs * targets).sum(-1)


def run(estimator: TBPTT, inputs: Tensor, targets: Tensor, k1: int) -> list[Estimate]:
    model, found = Growing(), []
    carry = estimator.init(model, inputs.shape[1])
    for begin in range(0, len(inputs), k1):
        window = Window(inputs[begin : begin + k1], targets[begin : begin + k1], start=begin)
        estimate, carry = estimator.estimate(model, products, carry, window)
        found.append(estimate)
    return found


def by_hand(inputs: Tensor, targets: Tensor, end: int, k1: int, k2: int, max_norm: float) -> tuple[Tensor, list[float]]:
    """The bias's gradient of the window that ends at `end`, step by step in NumPy, and the norms at its boundaries."""
    model = Growing()
    w, x, y = model.weight.detach().numpy(), inputs.numpy(), targets.numpy()
    state, states = np.zeros(x.shape[1:]), []
    for each in x[:end]:
        state = np.tanh(state @ w.T + each)
        states.append(state)
    begin = (end - 1) // k1 * k1
    count = (end - begin) * x.shape[1]
    total, arrived, norms = np.zeros(x.shape[2]), np.zeros(x.shape[1:]), []
    for step in range(end - 1, max(0, end - k2) - 1, -1):
        arrived = arrived + (y[step] / count if step >= begin else 0.0)
        inner = arrived * (1 - states[step] ** 2)
        total = total + inner.sum(0)
        arrived = inner @ w
        if step % k1 == 0 and step > max(0, end - k2):
            norms.append(float(np.linalg.norm(arrived)))
            lanes = np.linalg.norm(arrived, axis=1, keepdims=True)
            arrived = arrived * np.minimum(1.0, max_norm / np.maximum(lanes, 1e-300))
    return torch.from_numpy(total), norms


def drawn(seed: int) -> tuple[int, int, int, Tensor, Tensor]:
    draws = np.random.default_rng(seed)
    k1 = int(draws.integers(1, 9))
    k2 = int(k1 + draws.integers(1, 30))
    steps = int(2 * k2 + draws.integers(0, k1 + 1))
    generator = torch.Generator().manual_seed(seed)
    shape = (steps, 2, 3)
    inputs, targets = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return k1, k2, steps, inputs * 0.01, targets


def assert_norms(estimate: Estimate, norms: list[float], k1: int, end: int) -> None:
    """Of more than 8 they are told at the 1st, 2nd, 4th, 8th, ... and the last."""
    num = len(norms)
    told = [number for number in range(1, num + 1) if num <= 8 or number in (1, 2, 4, 8, 16, 32, num)]
    newest = end - (end - 1) // k1 * k1  # steps of the last window, which may be short
    assert estimate.boundary_lags == tuple(newest + (number - 1) * k1 for number in told)
    wanted = torch.tensor([norms[number - 1] for number in told], dtype=torch.float64)
    torch.testing.assert_close(estimate.boundary_norms, wanted, rtol=1e-9, atol=0)


@pytest.mark.parametrize("first", [0, *(pytest.param(each, marks=pytest.mark.slow) for each in range(25, 200, 25))])
def test_both_replays_clip_between_windows_and_nowhere_else(first: int) -> None:
    for seed in range(first, first + (5 if first else 25)):
        k1, k2, steps, inputs, targets = drawn(seed)
        for replay in ("recompute", "retain"):
            estimator = TBPTT(k1, k2, replay=replay, boundary=ClipBoundary(0.1))
            estimate = run(estimator, inputs, targets, k1)[-1]
            gradient, norms = by_hand(inputs, targets, steps, k1, k2, 0.1)
            torch.testing.assert_close(estimate.gradients["bias"], gradient, rtol=1e-9, atol=1e-12)
            assert_norms(estimate, norms, k1, steps)


@pytest.mark.slow
def test_all_of_200_random_lengths() -> None:
    for seed in range(200):
        k1, k2, steps, inputs, targets = drawn(seed)
        gradients = []
        for replay in ("recompute", "retain"):
            estimate = run(TBPTT(k1, k2, replay=replay, boundary=ClipBoundary(0.1)), inputs, targets, k1)[-1]
            gradients.append(estimate)
        gradient, norms = by_hand(inputs, targets, steps, k1, k2, 0.1)
        for estimate in gradients:
            torch.testing.assert_close(estimate.gradients["bias"], gradient, rtol=1e-9, atol=1e-12)
            assert_norms(estimate, norms, k1, steps)


def test_the_oracle_sees_a_boundary_left_out() -> None:
    inputs, targets = (torch.randn(40, 2, 3, dtype=torch.float64) * 0.01 for _ in range(2))
    clipped, norms = by_hand(inputs, targets, 40, 4, 16, 0.1)
    other, fewer = by_hand(inputs, targets, 40, 8, 16, 0.1)
    assert len(norms) == 3
    assert len(fewer) == 1
    assert not torch.allclose(clipped, other, rtol=1e-3)


@pytest.mark.parametrize(("k1", "k2", "crossed"), [(8, 64, 7), (4, 6, 1), (4, 10, 2)])
def test_the_norms_are_told_at_the_same_boundaries_without_clipping(k1: int, k2: int, crossed: int) -> None:
    inputs, targets = (torch.randn(160, 1, 3, dtype=torch.float64) * 0.01 for _ in range(2))
    both = [run(TBPTT(k1, k2, replay=replay), inputs, targets, k1) for replay in ("recompute", "retain")]
    number = len(both[0]) // 10 * 10 - 1  # a recomputed look-back tells all of them at every 10th update
    one, other = (estimates[number] for estimates in both)
    assert one.boundary_lags == other.boundary_lags == tuple(k1 * (each + 1) for each in range(crossed))
    torch.testing.assert_close(one.boundary_norms, other.boundary_norms, rtol=1e-9, atol=0)
    one, other = (estimates[number - 1] for estimates in both)  # at the others where it is cut anyway
    assert {k1} <= set(one.boundary_lags) <= {k1, k1 * crossed}
    told = dict(zip(other.boundary_lags, other.boundary_norms.tolist(), strict=True))
    assert one.boundary_norms.tolist() == pytest.approx([told[lag] for lag in one.boundary_lags], rel=1e-9)


@pytest.mark.parametrize("boundary", [None, ClipBoundary(1e9)])
def test_of_many_boundaries_some_are_told_the_same_in_each_regime(boundary: ClipBoundary | None) -> None:
    inputs, targets = (torch.randn(100, 1, 3, dtype=torch.float64) * 0.01 for _ in range(2))
    both = [TBPTT(1, 32, replay=replay, boundary=boundary) for replay in ("recompute", "retain")]
    _, norms = by_hand(inputs, targets, 100, 1, 32, 1e9)
    for each in both:
        estimate = run(each, inputs, targets, 1)[-1]
        assert estimate.boundary_lags == (1, 2, 4, 8, 16, 31)
        assert_norms(estimate, norms, 1, 100)
