"""Evolution strategies against plain loops, closed forms and exact gradients, with the same noise or a bound on it.

Letters: T time, B lanes, M pairs, N = 2 M particles, P parameters.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from particle_runs import METHODS, RULES, Weighted, cut, half_squared, itself, over, reset_alone, with_resets
from systems import SYSTEMS, B, System, relative, squared
from torch import Tensor, nn

from tbptt import PES, TBPTT, ESSingle, TruncatedES, Window
from tbptt.estimators.perturbation import Course, Perturbation
from tbptt.models import InfluenceBalancingModel
from tbptt.streams import InfluenceBalancing
from tbptt.testing import Recording, influence_sums

methods = pytest.mark.parametrize("method", METHODS)


# The estimates, against a plain loop over particles, lanes and steps


def noise_of(seed: int, number: int, theta: dict[str, Tensor], pairs: int, sigma: float) -> dict[str, Tensor]:
    generator = np.random.default_rng((seed, number, 0x45535F4E4F495345))
    return {
        name: torch.from_numpy(sigma * generator.standard_normal((pairs, *value.shape)))
        for name, value in theta.items()
    }


def by_hand(
    system: System, recording: Recording, bounds: list[int], rule: str, pairs: int, sigma: float, seed: int
) -> list[dict[str, Tensor]]:
    """The gradient of each window: every loss times all the noise that its lane's sequence has met in that particle."""
    theta = {name: value.detach() for name, value in system.model.named_parameters()}
    drawn: dict[int, dict[str, Tensor]] = {}
    signs = [(pair, sign) for sign in (1, -1) for pair in range(pairs)]
    states: dict[Any, Any] = dict.fromkeys([*signs, "mean"])
    met: list[list[int]] = [[] for _ in range(B)]
    now, held, found = -1, 0, []
    for begin, end in pairwise(bounds):
        total = {name: torch.zeros_like(value) for name, value in theta.items()}
        if rule == "truncated":
            met, states = [[] for _ in range(B)], dict.fromkeys(states, states["mean"])
        for t in range(begin, end):
            for lane in range(B):
                met[lane] = [] if recording.reset[t, lane] else met[lane]
            if rule in ("truncated", "pes"):
                due = t == begin
            else:
                due = now < 0 or (bool(recording.reset[t].any()) and all(set(each) <= {now} for each in met))
                due = due or (rule == "refreshed" and t == begin and held == 2)
            if due:
                now, held = now + 1, 0
                drawn[now] = noise_of(seed, now, theta, pairs, sigma)
            met = [each if now in each else [*each, now] for each in met]
            for particle in states:
                pair, sign = (0, 0) if particle == "mean" else particle
                weights = {name: value + sign * drawn[now][name][pair] for name, value in theta.items()}
                anew = system.initial(weights)
                state = anew if states[particle] is None else states[particle]
                keep = ~recording.reset[t]
                state = tuple(
                    torch.where(keep.view(-1, *[1] * (old.ndim - 1)), old, new)
                    for old, new in zip(state, anew, strict=True)
                )
                outputs, states[particle] = system.step(weights, recording.inputs[t], state)
                losses = squared(outputs, recording.targets[t])
                for lane in range(B):
                    for number in met[lane] if recording.mask[t, lane] else []:
                        for name in theta:
                            total[name] += losses[lane] * sign * drawn[number][name][pair]
        held += 1
        count = int(recording.mask[begin:end].sum())
        found.append({name: value / (2 * pairs * sigma**2 * count) for name, value in total.items()})
    return found


@pytest.mark.parametrize("kind", SYSTEMS)
def test_estimates_are_those_of_a_plain_loop(kind: str) -> None:
    torch.manual_seed(0)
    system = SYSTEMS[kind]()
    recording = with_resets(system, 32)
    bounds = [*range(0, 32, 3), 32]
    with torch.no_grad():
        wanted = {rule: by_hand(system, recording, bounds, rule, 2, 0.3, 5) for rule in RULES}
    for rule, estimator in RULES.items():
        estimates, _ = over(estimator, system.model, cut(recording, 3))
        assert max(relative(found.gradients, each) for found, each in zip(estimates, wanted[rule], strict=True)) < 1e-9
        assert {each.metrics["vectorized"] for each in estimates} == {1.0 if kind == "leaky" else 0.0}
        for other in set(RULES) - {rule}:  # the controls: each rule is told from each other
            pairs = zip(estimates, wanted[other], strict=True)
            assert max(relative(found.gradients, each) for found, each in pairs) > 0.1, other


def trained(estimator: Perturbation | TBPTT, updates: int, lr: float = 1e-4) -> tuple[list[float], float]:
    """Return θ after each update of the influence-balancing system, and the last loss."""
    model, stream = InfluenceBalancingModel().double(), InfluenceBalancing(dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    carry, thetas, loss = estimator.init(model, 1), [], math.nan
    for _ in range(updates):
        estimate, carry = estimator.estimate(model, half_squared, carry, stream.read(1))
        estimate.apply(model)
        optimizer.step()
        thetas.append(model.theta.item())
        loss = float(estimate.loss)
    return thetas, loss


def trained_by_hand(rule: str, updates: int, pairs: int, sigma: float) -> list[float]:
    """The published recursions, in NumPy."""
    matrix = 0.5 * (np.eye(23) + np.eye(23, k=1))
    push = np.array([1.0] * 10 + [-1.0] * 13)
    theta, thetas = 0.5, []
    mean, states, xi = np.ones(23), np.ones((2 * pairs, 23)), np.zeros(2 * pairs)
    eps = np.zeros(2 * pairs)
    for update in range(updates):
        if rule != "single" or update == 0:
            half = sigma * np.random.default_rng((0, update, 0x45535F4E4F495345)).standard_normal(pairs)
            eps = np.concatenate([half, -half])
        if rule == "truncated":
            states = np.tile(mean, (2 * pairs, 1))
        states = states @ matrix.T + np.outer(theta + eps, push)
        xi = xi + eps if rule == "pes" else eps
        losses = 0.5 * (states[:, 0] - 1) ** 2
        mean = matrix @ mean + theta * push
        theta -= 1e-4 * float((xi * losses).mean()) / sigma**2
        thetas.append(theta)
    return thetas


INFLUENCE = {"truncated": TruncatedES, "pes": PES, "single": ESSingle}


@pytest.mark.parametrize("rule", INFLUENCE)
def test_training_follows_the_recursions_step_by_step(rule: str) -> None:
    thetas, _ = trained(INFLUENCE[rule](1, 20, 0.1), 50)
    np.testing.assert_allclose(thetas, trained_by_hand(rule, 50, 10, 0.1), rtol=1e-11)
    for other in set(INFLUENCE) - {rule}:  # the control
        assert abs(thetas[-1] - trained_by_hand(other, 50, 10, 0.1)[-1]) > 1e-3


@pytest.mark.parametrize("method", [PES, ESSingle])
def test_untruncated_ones_balance_the_influences(method: type[Perturbation]) -> None:
    thetas, loss = trained(method(1, 1000, 0.1), 1200)
    assert loss < 1e-4
    assert abs(thetas[-1] + 1 / 6) < 0.003


@pytest.mark.parametrize("method", [PES, ESSingle])
def test_weights_that_move_fast_leave_particles_behind(method: type[Perturbation]) -> None:
    """Unbiased at weights that stay only: at ten times the rate that trains, the stale states lead astray."""
    thetas, loss = trained(method(1, 200, 0.1), 150, lr=1e-3)
    assert abs(thetas[-1] + 1 / 6) > 5
    assert loss > 100
    assert abs(trained(method(1, 200, 0.1), 150)[0][-1] + 1 / 6) < 0.3  # the control


def test_the_truncated_one_goes_the_way_of_truncated_backpropagation() -> None:
    """The control of the two above: the same particles, and θ runs away."""
    thetas, loss = trained(TruncatedES(1, 1000, 0.1), 400)
    wanted, _ = trained(TBPTT(1, 1), 400)
    assert thetas[-1] > 0.6
    assert loss > 8
    np.testing.assert_allclose(thetas, wanted, atol=3e-3)


@pytest.mark.slow
@methods
def test_the_published_training_rows(method: type[Perturbation]) -> None:
    thetas, loss = trained(method(1, 1000, 0.1), 3000)
    if method is TruncatedES:
        assert thetas[-1] == pytest.approx(3.26, abs=0.005)
    else:
        assert loss < 1e-4


# Means and variances


def relative_variance(estimator: Perturbation, decay: float, steps: int, repeats: int) -> float:
    """Of the gradient of a whole sequence, windows of one step; times the pairs."""
    torch.manual_seed(1)
    model, inputs = Weighted(10, decay), torch.randn(1, 1, 10).double().expand(steps, 1, 10)
    reset = torch.arange(steps)[:, None] == 0
    windows = [Window(inputs[t : t + 1], inputs[t : t + 1, :, 0], reset=reset[t : t + 1]) for t in range(steps)]
    exact = torch.autograd.grad(model(inputs)[0].sum(), model.weight)[0]
    carry, apart = estimator.init(model, 1), []
    for _ in range(repeats):
        estimates, carry = over(estimator, model, windows, carry, itself)
        total = sum(each.gradients["weight"] for each in estimates)
        apart.append(float((total - exact).square().sum() / exact.square().sum()))
    return estimator.num_particles / 2 * sum(apart) / repeats


@pytest.mark.parametrize(("steps", "repeats"), [(1, 1200), (3, 700)])
def test_relative_variance_of_es_single_is_one_more_than_the_parameters(steps: int, repeats: int) -> None:
    """Of one pair, P + 1 = 11, whatever the length; the noise is drawn anew with each sequence."""
    assert relative_variance(ESSingle(1, 100, 0.1), 0.9, steps, repeats) == pytest.approx(11, rel=0.05)


def test_relative_variance_of_pes_falls_with_the_length_for_equal_gradients() -> None:
    """(P + 1) / T + P (T - 1) / 2 T, here 7: also the control of the test above, as its figure is not 11."""
    assert relative_variance(PES(1, 100, 0.1), 0.0, 3, 700) == pytest.approx(11 / 3 + 10 * 2 / 6, rel=0.05)


def test_pairs_have_less_variance_than_as_many_independent_particles() -> None:
    paired = relative_variance(TruncatedES(1, 100, 0.1), 0.0, 1, 200)
    torch.manual_seed(1)
    slope, theta = torch.randn(1, 1, 10).double().flatten().numpy(), np.linspace(-1, 1, 10)
    eps = 0.1 * np.random.default_rng(0).standard_normal((200, 100, 10))
    found = (eps * (eps @ slope + theta @ slope)[..., None]).mean(1) / 0.1**2
    alone = 50 * ((found - slope) ** 2).sum(1).mean() / (slope @ slope)
    assert paired < 13
    assert alone > 2 * paired


def exact_slope(steps: int) -> float:
    """dL/dθ of the influence-balancing system at θ = 1/2, summed over the steps, by the sensitivities S_t."""
    state, total = np.ones(23), 0.0
    matrix = 0.5 * (np.eye(23) + np.eye(23, k=1))
    for influence in influence_sums(steps):
        state = matrix @ state + 0.5 * np.array([1.0] * 10 + [-1.0] * 13)
        total += (state[0] - 1) * influence
    return total


def slopes(estimator: Perturbation, repeats: int) -> tuple[float, float]:
    """The mean of estimates of that slope at weights that stay, and its standard error."""
    found = []
    model = InfluenceBalancingModel().double()
    for seed in range(repeats):
        windows = list(InfluenceBalancing(steps=200, dtype=torch.float64).windows(estimator.k1))
        again = type(estimator)(estimator.k1, estimator.num_particles, estimator.sigma, seed)
        estimates, _ = over(again, model, windows, loss=half_squared)
        found.append(sum(float(each.gradients["theta"]) * each.num_injected for each in estimates))
    return float(np.mean(found)), float(np.std(found, ddof=1)) / math.sqrt(repeats)


SLOPE_CASES = [(20, 400), pytest.param(1, 4000, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("k1", "particles"), SLOPE_CASES)
@pytest.mark.parametrize("method", [PES, ESSingle])
def test_the_mean_at_weights_that_stay_is_the_whole_gradient(
    method: type[Perturbation], k1: int, particles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = exact_slope(200)
    assert exact == pytest.approx(5971.63, abs=0.005)
    mean, error = slopes(method(k1, particles, 0.1), 30)
    assert error < 0.02 * exact
    assert abs(mean - exact) < 3.5 * error
    # the control: the noise of earlier windows forgotten
    monkeypatch.setattr(Course, "groups", lambda self: [(self.noise, list(range(len(self.begun))))])
    monkeypatch.setattr(ESSingle, "renews", lambda self, course, first: first)
    mean, error = slopes(method(k1, particles, 0.1), 10)
    assert abs(mean - exact) > 10 * error


def draws(method: type[Perturbation], repeats: int) -> Tensor:
    """Estimates of the gradient of the losses after the first reset, summed. Shape (R, P)."""
    model, windows, found = Weighted(2, 0.9), reset_alone(), []
    for seed in range(repeats):
        estimates, _ = over(method(4, 200, 0.1, seed), model, windows, loss=half_squared)
        found.append(sum(each.gradients["weight"] * each.num_injected for each in estimates[2:]))
    return torch.stack(found)


def furthest(found: Tensor, exact: Tensor) -> float:
    """How many standard errors the mean is off, in its worst parameter."""
    return float(((found.mean(0) - exact).abs() / (found.std(0) / len(found) ** 0.5)).max())


@pytest.mark.parametrize("method", [PES, ESSingle])
def test_lanes_that_are_reset_alone_leave_the_mean_what_it_is(
    method: type[Perturbation], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Weighted(2, 0.9)
    whole, losses = Window.join(reset_alone()), []
    states = torch.zeros(3).double()
    for step in range(28):
        outputs, states = model(whole.inputs[step : step + 1], torch.where(whole.reset[step], 0, states))
        losses.append(half_squared(outputs[0], whole.targets[step]).sum())
    exact = torch.autograd.grad(torch.stack(losses[8:]).sum(), model.weight)[0]
    assert furthest(draws(method, 40), exact) < 3.5
    # the control: one sum for all lanes, that starts anew with any of them
    ended = Course.ended
    monkeypatch.setattr(Course, "ended", lambda self, lanes: ended(self, [any(lanes)] * len(lanes)))
    assert furthest(draws(method, 40), exact) > 8


class Stepped(nn.Module):
    """Shows whether the weight is above 0, and adds up how often it was: no gradient anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.07).double())

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        above = (self.weight > 0).to(inputs.dtype).expand(inputs.shape[:2])
        return above, above.sum(0) + (0 if state is None else state)


@methods
def test_a_loss_without_a_gradient_has_the_slope_of_the_smoothed_one(method: type[Perturbation]) -> None:
    """d/dw P(w + ε > 0) = φ(w / σ) / σ."""
    model, window = Stepped(), Window(torch.zeros(1, 1, 1).double(), torch.zeros(1, 1).double())
    ratio = 0.07 / 0.1
    wanted = math.exp(-(ratio**2) / 2) / math.sqrt(2 * math.pi) / 0.1
    estimator = method(1, 20_000, 0.1)
    estimate, _ = estimator.estimate(model, itself, estimator.init(model, 1), window)
    # each pair gives |ε| / (2 σ²) where the step lies between them, and 0 elsewhere
    mean_square = (ratio * math.exp(-(ratio**2) / 2) * 2 / math.sqrt(2 * math.pi) + math.erfc(ratio / math.sqrt(2))) / 4
    error = math.sqrt((mean_square / 0.1**2 - wanted**2) / 10_000)
    assert abs(float(estimate.gradients["weight"]) - wanted) < 4 * error
    assert 4 * error < 0.1 * wanted  # the control: not the slope at another weight, nor none
    assert not model(window.inputs)[0].requires_grad
