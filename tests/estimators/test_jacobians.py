"""The definition, word for word: b_k = b_{k-1} D_{s-k+1} + [k < k1] q_{s-k}, gradient = sum_k b_k I_{s-k}.

Explicit Jacobians of a tanh network in NumPy, which shares neither code nor autograd with the library.

Letters: T time, B lanes, D input, H hidden, P parameters.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tbptt import TBPTT, Estimate, Window

T, B, D, H = 47, 2, 2, 3
NAMES = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
Array = np.ndarray


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(-1)


class Tanh:
    """h_t = tanh(U x_t + W h_{t-1} + a + b), one lane at a time, with its Jacobians written out."""

    def __init__(self, model: nn.RNN) -> None:
        self.u, self.w, self.a, self.b = (getattr(model, name).detach().numpy().copy() for name in NAMES)

    def step(self, x: Array, h: Array) -> Array:
        return np.tanh(self.u @ x + self.w @ h + self.a + self.b)

    def states(self, x: Array, h: Array | None = None) -> list[Array]:
        """The state before each step, and after the last."""
        found = [np.zeros(H) if h is None else h]
        for each in x:
            found.append(self.step(each, found[-1]))
        return found

    def jacobian(self, h: Array) -> Array:
        """D_t (H, H), at h = h_t."""
        return (1 - h**2)[:, None] * self.w

    def immediate(self, x: Array, before: Array, h: Array) -> Array:
        """I_t (H, P), at h = h_t."""
        eye = np.eye(H)
        return (1 - h**2)[:, None] * np.hstack([np.kron(eye, x), np.kron(eye, before), eye, eye])

    def gradient(self, x: Array, y: Array, last: int, steps: int, k1: int, k2: int, *, indicator: bool = True) -> Array:
        """The sum over one lane of the window of `steps` steps that ends at step `last`, shape (P,)."""
        h = self.states(x[: last + 1])
        # A look-back that does not exceed k1 ends inside its window, also when the window is a short one.
        lags = min(last + 1, k2 if k2 > k1 else min(k2, steps))
        b = np.zeros(H)
        total = np.zeros(self.u.size + self.w.size + 2 * H)
        for k in range(lags):
            t = last - k
            if k:
                b = b @ self.jacobian(h[t + 2])
            if k < steps or not indicator:
                b = b + 2 * (h[t + 1] - y[t])
            total += b @ self.immediate(x[t], h[t], h[t + 1])
        return total


def flat(gradients: dict[str, Tensor]) -> Array:
    return np.concatenate([gradients[name].numpy().ravel() for name in NAMES])


def problem() -> tuple[nn.RNN, Tensor, Tensor]:
    torch.manual_seed(11)
    model = nn.RNN(D, H).double()
    with torch.no_grad():
        model.weight_hh_l0.mul_(1.5)  # so that a gradient lives long enough to be told apart
    return model, torch.randn(T, B, D).double(), torch.randn(T, B, H).double()


def estimates(estimator: TBPTT, model: nn.RNN, x: Tensor, y: Tensor) -> Iterator[tuple[int, int, Estimate]]:
    """Yield the last step of each window, its length, and its estimate."""
    carry = estimator.init(model, B)
    for begin in range(0, T, estimator.k1):
        end = min(begin + estimator.k1, T)
        estimate, carry = estimator.estimate(model, squared, carry, Window(x[begin:end], y[begin:end]))
        yield end - 1, end - begin, estimate


def apart(found: Array, wanted: Array) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("replay", ["recompute", "retain"])
@pytest.mark.parametrize(("k1", "k2"), [(1, 1), (1, 9), (3, 7), (4, 8), (5, 5), (5, 20), (8, 3), (8, 1)])
def test_products_of_jacobians(k1: int, k2: int, replay: str) -> None:
    model, x, y = problem()
    oracle = Tanh(model)
    blind = []
    for last, steps, estimate in estimates(TBPTT(k1, k2, replay=replay), model, x, y):
        lanes = [(x[:, lane].numpy(), y[:, lane].numpy()) for lane in range(B)]
        count = B * (steps if k2 > k1 else min(k2, steps))
        assert estimate.num_injected == count
        wanted = sum(oracle.gradient(*lane, last, steps, k1, k2) for lane in lanes) / count
        assert apart(flat(estimate.gradients), wanted) < 1e-10
        double = sum(oracle.gradient(*lane, last, steps, k1, k2, indicator=False) for lane in lanes) / count
        blind.append(apart(flat(estimate.gradients), double))
    if k2 > k1:  # the control: without [k < k1], losses would be counted again in later updates
        assert max(blind) > 0.1


@pytest.mark.parametrize("replay", ["recompute", "retain"])
def test_a_look_back_over_everything_is_full_backpropagation(replay: str) -> None:
    model, x, y = problem()

    def total(k2: int) -> Array:
        found = estimates(TBPTT(4, k2, replay=replay), model, x, y)
        return sum((flat(each.gradients) * each.num_injected for _, _, each in found), np.zeros(1))

    whole = torch.autograd.grad(squared(model(x)[0], y).sum(), [getattr(model, name) for name in NAMES])
    wanted = flat(dict(zip(NAMES, whole, strict=True)))
    assert apart(total(T), wanted) < 1e-10
    assert apart(total(T + 5), wanted) < 1e-10
    assert apart(total(5), wanted) > 1e-3  # the control: a shorter look-back is another gradient


def test_central_differences_of_the_frozen_boundary_objective() -> None:
    """With the state before the look-back held fixed, the estimate is the slope of an ordinary function."""
    k1, k2, last, step = 3, 5, 29, 1e-5
    model, x, y = problem()
    found = {end: flat(each.gradients) for end, _, each in estimates(TBPTT(k1, k2), model, x, y)}[last]
    oracle = Tanh(model)
    first = last + 1 - k2
    frozen = [oracle.states(x[:first, lane].numpy())[-1] for lane in range(B)]

    def objective(*, all_losses: bool) -> float:
        total = 0.0
        for lane in range(B):
            h = oracle.states(x[first : last + 1, lane].numpy(), frozen[lane])[1:]
            errors = ((np.array(h) - y[first : last + 1, lane].numpy()) ** 2).sum(1)
            total += errors.sum() if all_losses else errors[-k1:].sum()
        return total / (k1 * B)

    def slope(*, all_losses: bool = False) -> Array:
        slopes = []
        for parameter in (oracle.u, oracle.w, oracle.a, oracle.b):
            for index in np.ndindex(parameter.shape):
                kept = parameter[index]
                parameter[index] = kept + step
                above = objective(all_losses=all_losses)
                parameter[index] = kept - step
                slopes.append((above - objective(all_losses=all_losses)) / (2 * step))
                parameter[index] = kept
        return np.array(slopes)

    assert apart(found, slope()) < 1e-8
    assert apart(found, slope(all_losses=True)) > 1e-2  # the control: losses of earlier windows do not belong
