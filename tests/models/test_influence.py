"""The influence-balancing system against its closed form."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
import torch

from tbptt.errors import ConfigError, ShapeError
from tbptt.models import InfluenceBalancingModel


def closed_form(lookback: int, n: int = 23, positive: int = 10) -> float:
    """S_K from binomials, (A^k)_{1,1+j} = C(k, j) 2^-k: shares nothing with the model."""
    signs = [1 if unit < positive else -1 for unit in range(n)]
    return sum(comb(k, j) * signs[j] / 2**k for k in range(lookback) for j in range(min(k, n - 1) + 1))


@pytest.mark.parametrize(
    ("lookback", "expected"),
    [
        (1, 1.0),
        (10, 10.0),
        (16, 15.374146),
        (20, 16.476059),
        (40, 0.565538),
        (41, -0.218987),
        (80, -5.999892),
    ],
)
def test_truncated_influence_is_the_published_one(lookback: int, expected: float) -> None:
    model = InfluenceBalancingModel().double()
    assert model.truncated_influence(lookback).item() == pytest.approx(closed_form(lookback), abs=1e-12)
    assert closed_form(lookback) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("lookback", [1, 40, 41, 60])
def test_the_gradient_that_reaches_so_far_is_that_influence(lookback: int) -> None:
    model = InfluenceBalancingModel().double()
    _, state = model(torch.zeros(150, 2, 1))
    outputs, _ = model(torch.zeros(lookback, 2, 1), state.detach())
    (gradient,) = torch.autograd.grad(outputs[-1, 0], model.theta)
    assert gradient.item() == pytest.approx(closed_form(lookback), abs=1e-12)


def test_the_recurrence_from_ones_in_plain_numpy() -> None:
    model = InfluenceBalancingModel(5, 2, theta=0.3).double()
    matrix = 0.5 * (np.eye(5) + np.eye(5, k=1))
    direction, state, expected = np.array([1, 1, -1, -1, -1.0]), np.ones(5), []
    theta = float(torch.tensor(0.3))  # the parameter is made in float32
    for _ in range(9):
        state = matrix @ state + theta * direction
        expected.append(state[0])
    outputs, last = model(torch.zeros(9, 3, 1))
    assert np.allclose(outputs.detach(), np.array(expected)[:, None].repeat(3, 1), rtol=0, atol=1e-12)
    assert np.allclose(last.detach(), state, rtol=0, atol=1e-12)
    assert tuple(last.shape) == (3, 5)


def test_chunks_with_the_carried_state_equal_one_pass() -> None:
    model = InfluenceBalancingModel().double()
    whole, _ = model(torch.zeros(60, 2, 1))
    first, state = model(torch.zeros(25, 2, 1))
    second, _ = model(torch.zeros(35, 2, 1), state)
    assert torch.cat([first, second]).equal(whole)
    again, _ = model(torch.zeros(35, 2, 1))  # the control: forgetting the state is seen
    assert not again.allclose(second)


def test_the_initial_state_and_dtype() -> None:
    model = InfluenceBalancingModel().double()
    assert model.initial_state(3).equal(torch.ones(3, 23, dtype=torch.float64))
    assert [name for name, _ in model.named_parameters()] == ["theta"]
    assert model(torch.zeros(1, 1, 1))[0].dtype == torch.float64


def test_what_cannot_be_meant_is_refused() -> None:
    for n, positive in ((0, 0), (5, 6), (5, 0)):
        with pytest.raises(ConfigError, match="1 <= positive <= n"):
            InfluenceBalancingModel(n, positive)
    with pytest.raises(ShapeError, match=r"\(T, B, 1\)"):
        InfluenceBalancingModel()(torch.zeros(3))
