"""LRU: the parallel scan is the recurrence, and where its eigenvalues start."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tbptt.models import LRU
from tbptt.models.linear_scan import linear_scan


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def example(steps: int, lanes: int = 2, units: int = 6) -> list[Tensor]:
    """Inputs, log λ and the state before; of every frequency, and of decays from fast to none."""
    decay = torch.linspace(-2.0, -1e-4, units, dtype=torch.float64)
    log_decay = torch.complex(decay, torch.linspace(0.0, 2 * math.pi, units, dtype=torch.float64))
    sizes = ((steps, lanes, units), (lanes, units))
    inputs, state = (torch.randn(size, dtype=torch.complex128) for size in sizes)
    return [each.requires_grad_() for each in (inputs, log_decay, state)]


def results(scan: Any, inputs: Tensor, log_decay: Tensor, state: Tensor) -> list[Tensor]:
    """All states, and the gradients of a random sum of them."""
    states = linear_scan(inputs, log_decay, state, scan)
    weights = torch.randn(states.shape, dtype=states.dtype, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((states * weights).sum().real, (inputs, log_decay, state))
    return [states.detach(), *gradients]


def apart(left: list[Tensor], right: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("steps", [1, 2, 15, 16, 17, 31, 64, 257, 1000])
def test_parallel_and_sequential_are_the_same_with_gradients(steps: int) -> None:
    inputs, log_decay, state = example(steps)
    sequential = results("sequential", inputs, log_decay, state)
    assert apart(results("parallel", inputs, log_decay, state), sequential) < 1e-12
    off = (log_decay.detach() * (1 + 1e-10)).requires_grad_()  # the control
    assert apart(results("parallel", inputs, off, state), sequential) > 1e-12


def test_sequential_is_the_recurrence() -> None:
    inputs, log_decay, state = (each.detach() for each in example(40))
    h = state.numpy()
    for x, found in zip(inputs.numpy(), linear_scan(inputs, log_decay, state, "sequential"), strict=True):
        h = log_decay.exp().numpy() * h + x
        assert abs(found.numpy() - h).max() < 1e-12


@pytest.mark.parametrize(
    ("steps", "lanes", "units", "chosen"),
    [(63, 2, 6, "sequential"), (64, 2, 6, "parallel"), (64, 16, 64, "parallel"), (64, 16, 65, "sequential")],
)
def test_auto_is_one_of_the_two_by_size(steps: int, lanes: int, units: int, chosen: str) -> None:
    inputs, log_decay, state = example(steps, lanes, units)
    found = {scan: linear_scan(inputs, log_decay, state, scan) for scan in ("auto", "sequential", "parallel")}
    assert found["auto"].equal(found[chosen])
    assert not found["parallel"].equal(found["sequential"])  # by their rounding they can be told apart


def test_a_model_scans_as_it_is_told() -> None:
    models = {scan: LRU(3, 4, scan=scan).double() for scan in ("auto", "sequential", "parallel")}
    inputs = torch.randn(80, 2, 3, dtype=torch.float64)
    for model in models.values():
        model.load_state_dict(models["auto"].state_dict())
    found = {scan: model(inputs)[0] for scan, model in models.items()}
    torch.testing.assert_close(found["parallel"], found["sequential"], rtol=0, atol=1e-12)
    assert not found["parallel"].equal(found["sequential"])
    assert found["auto"].equal(found["parallel"])


@pytest.mark.parametrize(("r_min", "r_max", "max_phase"), [(0.9, 0.999, 2 * math.pi), (0.0, 0.9, 0.3)])
def test_eigenvalues_start_evenly_on_the_ring(r_min: float, r_max: float, max_phase: float) -> None:
    units = 20_000
    model = LRU(1, units, r_min=r_min, r_max=r_max, max_phase=max_phase)
    values = {name.rpartition(".")[2]: each.detach().double() for name, each in model.named_parameters()}
    squared, phase = (-2 * values["nu_log"].exp()).exp(), values["theta_log"].exp()
    for drawn, low, high in ((squared, r_min**2, r_max**2), (phase, 0.0, max_phase)):
        assert low - 1e-6 <= drawn.min()
        assert drawn.max() <= high + 1e-6
        place = (drawn - low) / (high - low)  # of an even distribution: mean 1/2, variance 1/12, and its errors
        assert abs(place.mean() - 1 / 2) < 4 * (1 / 12 / units) ** 0.5
        assert abs(place.var() - 1 / 12) < 4 * (1 / 180 / units) ** 0.5
    assert abs(torch.corrcoef(torch.stack([squared, phase]))[0, 1]) < 4 / units**0.5
    torch.testing.assert_close((2 * values["gamma_log"]).exp(), 1 - squared, rtol=1e-3, atol=0)
    if r_min == 0.0:  # the control: were |λ| even instead of |λ|², it would be seen
        place = torch.rand(units) ** 2
        assert abs(place.mean() - 1 / 2) > 4 * (1 / 12 / units) ** 0.5


def test_with_that_gamma_states_keep_the_size_of_white_inputs() -> None:
    model = LRU(16, 64, scan="sequential").double()
    _, state = model(torch.randn(3000, 32, 16, dtype=torch.float64))
    variance = state[0].abs().square().mean()
    assert 0.8 < variance < 1.2
    with torch.no_grad():
        model.get_parameter("layers.0.lru.gamma_log").zero_()  # the control
    _, state = model(torch.randn(3000, 32, 16, dtype=torch.float64))
    assert state[0].abs().square().mean() > 2


def test_one_layer_is_linear_and_the_gated_one_is_not() -> None:
    inputs = torch.randn(20, 2, 3, dtype=torch.float64)
    for glu in (False, True):
        model = LRU(3, 4, glu=glu).double()
        one, two = model(inputs)[0], model(2 * inputs)[0]
        assert two.allclose(2 * one, rtol=1e-10) is not glu


def test_dropout_acts_in_training_only() -> None:
    for settings in ({"glu": True}, {"layers": 2}):
        model = LRU(3, 8, dropout=0.5, **settings)
        inputs = torch.randn(20, 2, 3)
        assert not model(inputs)[0].equal(model(inputs)[0])
        assert model(inputs)[1][0].equal(model(inputs)[1][0])  # never the first state
        model.eval()
        assert model(inputs)[0].equal(model(inputs)[0])
