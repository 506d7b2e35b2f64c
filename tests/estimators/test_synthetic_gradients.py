"""Synthetic gradients against closed forms, full autograd, the forward view of BP(lambda) and a loop in NumPy.

What is predicted, traced and sent back is computed here once more, without the library's segments, trees or windows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import PREFIX, made, own_parameters, predictor_of, ran, windows
from systems import SYSTEMS, B, D, record, relative, squared
from torch import Tensor, nn

from tbptt import TBPTT, SyntheticGradients, Window
from tbptt.estimators.predictor import Predictor
from tbptt.testing import Recording

systems = pytest.mark.parametrize("name", SYSTEMS)


def flat(state: Sequence[Tensor]) -> Tensor:
    """An oracle's state, lanes first, as rows."""
    return torch.cat([leaf.flatten(1) for leaf in state], 1)


def summed(estimates: list[Any], names: Sequence[str], *, weighted: bool) -> dict[str, Tensor]:
    """The gradients of all windows together: of the summed losses, or as they are."""
    return {
        name: sum(
            each.gradients.get(name, torch.zeros(())) * (each.num_injected if weighted else 1) for each in estimates
        )  # pyright: ignore
        for name in names
    }


# What is predicted, once it has been learned


class Linear(nn.Module):
    """h' = A h + B x, started from states of each lane's own; the output is h."""

    def __init__(self, matrix: np.ndarray[Any, Any], starts: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.from_numpy(matrix).double())
        self.starts = starts

    def initial_state(self, lanes: int) -> Tensor:
        return self.starts[torch.arange(lanes) % len(self.starts)]  # the library tries one lane more

    def forward(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for step in inputs:
            state = state @ self.matrix.T + step
            outputs.append(state)
        return torch.stack(outputs), state


WEIGHTS = np.array([2.0, 1.0, 0.5, 0.25])


def quadratic(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs.square() * torch.from_numpy(WEIGHTS)).sum(-1)


def linear(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs * torch.from_numpy(WEIGHTS)).sum(-1)


def train_predictor(
    estimator: SyntheticGradients,
    model: Linear,
    loss: Any,
    updates: int,
    rate: float,
    *,
    resets: int | None = None,
    sign: float = 1.0,
    shuffled: bool = False,
    noise: float = 0.0,
) -> Predictor:
    """Let only the predictor learn, by plain descent."""
    estimator.prepare(model, torch.zeros(1, 6, 4).double())
    carry = estimator.init(model, 6)
    for update in range(updates):
        reset = torch.zeros(estimator.k1, 6, dtype=torch.bool)
        reset[0] = resets is not None and update % resets == 0
        inputs = noise * torch.randn(estimator.k1, 6, 4).double()
        estimate, carry = estimator.estimate(model, loss, carry, Window(inputs, inputs, reset=reset))
        with torch.no_grad():
            for name, parameter in predictor_of(model).named_parameters():
                step = estimate.gradients.get(PREFIX + name, torch.zeros(()))
                step = step.flip(0) if shuffled else step
                parameter -= sign * rate * step
    return predictor_of(model)


def lyapunov(matrix: np.ndarray[Any, Any], gamma: float) -> np.ndarray[Any, Any]:
    """P = sum over j >= 1 of gamma^(j-1) (A^j)' Q A^j, as the solution of P = A' (Q + gamma P) A."""
    n = len(matrix)
    both = np.kron(matrix.T, matrix.T)
    return np.linalg.solve(np.eye(n * n) - gamma * both, both @ np.diag(WEIGHTS).ravel()).reshape(n, n)


def nilpotent() -> np.ndarray[Any, Any]:
    """A state that is forgotten after exactly four steps, so that sums over the future end there."""
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))
    return turn @ (np.eye(4, k=1) + 0.3 * np.eye(4, k=2)) @ turn.T


def rotation() -> np.ndarray[Any, Any]:
    """A state that keeps its length for ever."""
    turned = np.zeros((4, 4))
    for at, angle in ((0, 0.7), (2, 1.9)):
        c, s = np.cos(angle), np.sin(angle)
        turned[at : at + 2, at : at + 2] = [[c, -s], [s, c]]
    mixed, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))
    return mixed @ turned @ mixed.T


def starts() -> Tensor:
    return torch.from_numpy(np.random.default_rng(2).normal(size=(6, 4)))


def apart(predictor: Predictor, states: Tensor, wanted: np.ndarray[Any, Any]) -> float:
    """How far the predictions for these states are from P h, relative."""
    with torch.no_grad():
        found = predictor(states).numpy()
    true = states.numpy() @ wanted.T
    return float(np.linalg.norm(found - true) / np.linalg.norm(true))


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 1.0])
def test_the_prediction_converges_to_the_true_future_gradient(lambda_: float) -> None:
    """gamma = 1: sequences of five steps, in windows of one, of a state that is gone after four."""
    matrix, estimator = nilpotent(), SyntheticGradients(1, lambda_=lambda_)
    first = starts() @ torch.from_numpy(matrix.T)
    reached = torch.cat([first, first @ torch.from_numpy(matrix.T)])
    terms = [(power := np.linalg.matrix_power(matrix, j)).T @ np.diag(WEIGHTS) @ power for j in range(1, 4)]

    def trained(updates: int, **how: Any) -> Predictor:
        return train_predictor(estimator, Linear(matrix, starts()), quadratic, updates, 0.3, resets=5, **how)

    found = trained(1500)
    assert apart(found, reached, sum(terms)) < 1e-6
    assert apart(found, reached, terms[0]) > 0.1  # the controls: what the next window sees is not all there is,
    assert not apart(trained(300, sign=-1.0), reached, sum(terms)) < 1.0  # uphill,
    assert not apart(trained(300, shuffled=True), reached, sum(terms)) < 0.1  # with another number's errors


@pytest.mark.parametrize(("lambda_", "k1"), [(0.0, 3), (1.0, 3), (1.0, 2)])
def test_the_discounted_prediction_solves_lyapunovs_equation(lambda_: float, k1: int) -> None:
    """A state that is never forgotten: without a discount there would be no sum; what is predicted knows no k1."""
    matrix, estimator = rotation(), SyntheticGradients(k1, lambda_=lambda_, gamma=0.8)
    wanted = lyapunov(matrix, 0.8)
    found = train_predictor(estimator, Linear(matrix, starts()), quadratic, 1500, 0.1)
    assert apart(found, starts(), wanted) < 1e-6
    assert apart(found, starts(), lyapunov(matrix, 0.79)) > 1e-2  # the controls: another discount,
    assert apart(found, starts(), wanted * 0.8) > 1e-2  # the nearest loss discounted, too


@pytest.mark.parametrize("lambda_", [0.0, 1.0])
def test_a_constant_gradient_is_found_among_noise(lambda_: float) -> None:
    """A linear loss of a linear state: the geometric sum c (A + A A + ...), whatever comes in."""
    matrix, estimator = 0.7 * rotation(), SyntheticGradients(2, lambda_=lambda_)
    wanted = np.linalg.solve(np.eye(4) - matrix.T, matrix.T @ WEIGHTS)
    torch.manual_seed(0)
    found = train_predictor(estimator, Linear(matrix, starts()), linear, 1500, 0.1, noise=0.5)
    assert isinstance(found.net, nn.Linear)
    assert np.linalg.norm(found.net.bias.detach().numpy() - wanted) < 1e-6 * np.linalg.norm(wanted)
    assert float(found.net.weight.detach().norm()) < 1e-6
    one = matrix.T @ WEIGHTS
    assert np.linalg.norm(found.net.bias.detach().numpy() - one) > 0.1  # the control: the first term alone


# What is sent back


class Told(nn.Module):
    """A predictor that says what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.zeros(1).double())
        self.rows: Tensor | None = None

    def forward(self, rows: Tensor) -> Tensor:
        return (torch.zeros_like(rows) if self.rows is None else self.rows) + 0 * self.idle


def future(recording: Recording, leaves: dict[str, Tensor], at: int) -> Tensor:
    """The gradient of all losses from step `at` on with respect to the state before it, by plain autograd."""
    steps = len(recording.inputs)
    total, states = recording.run([leaves] * steps, None, 0, steps, list(range(at, steps)))
    if at == steps or not total.requires_grad:
        return torch.zeros_like(flat(states[at]))
    return flat(torch.autograd.grad(total, states[at], materialize_grads=True))


@systems
def test_with_a_perfect_predictor_the_windows_add_up_to_the_full_gradient(name: str) -> None:
    """Any cell, resets inside windows and where they begin, masks, and windows without a target."""
    estimator, told = SyntheticGradients(4, "own", lambda_=0.0), Told()
    torch.manual_seed(3)
    system = SYSTEMS[name]()
    leaves = dict(system.model.named_parameters())
    estimator.attach(system.model, torch.zeros(2, B, D).double(), told)
    recording = record(system, 26, masks=True, resets=True)
    recording.reset[12, 0] = recording.reset[17] = True
    recording.mask[4:12], recording.mask[-1] = False, True
    total, _ = recording.run([leaves] * 26, None, 0, 26, list(range(26)))
    full = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))

    def found(share: float) -> dict[str, Tensor]:
        carry, estimates = estimator.init(system.model, B), []
        for window in windows(recording, 4):
            told.rows = share * future(recording, leaves, window.start + window.steps)
            estimate, carry = estimator.estimate(system.model, squared, carry, window)
            estimates.append(estimate)
        assert [each.num_injected > 0 for each in estimates] == [True, False, False, True, True, True, True]
        return summed(estimates, list(leaves), weighted=True)

    assert relative(found(1.0), full) < 1e-10
    assert relative(found(0.0), full) > 1e-2  # the controls: cut off,
    assert relative(found(0.5), full) > 5e-3  # predicted by half


def test_the_closed_form_as_a_predictor_gives_the_full_gradient() -> None:
    """g(h) = P_n h, with P_n the sum of (A^j)' Q A^j over the n steps to come, is set by hand for each window."""
    matrix, steps = rotation(), 15
    model, estimator = Linear(matrix, starts()), SyntheticGradients(5, lambda_=1.0)
    inputs = torch.zeros(steps, 6, 4).double()
    estimator.attach(model, inputs)
    net = predictor_of(model).net
    assert isinstance(net, nn.Linear)
    leaf = torch.from_numpy(matrix).requires_grad_()
    state, total = starts(), torch.zeros(()).double()
    for _ in range(steps):
        state = state @ leaf.T
        total = total + quadratic(state, state).sum()
    full = torch.autograd.grad(total, leaf)[0]

    def found(shift: int) -> float:
        carry, gradient = estimator.init(model, 6), torch.zeros(4, 4).double()
        for begin in range(0, steps, 5):
            left = range(1, steps - begin - 5 + 1 + shift)
            powers = [np.linalg.matrix_power(matrix, j) for j in left]
            wanted = sum((power.T @ np.diag(WEIGHTS) @ power for power in powers), np.zeros((4, 4)))
            with torch.no_grad():
                net.weight.copy_(torch.from_numpy(wanted))
            window = Window(inputs[begin : begin + 5], inputs[begin : begin + 5])
            estimate, carry = estimator.estimate(model, quadratic, carry, window)
            gradient += estimate.gradients.get("matrix", 0.0) * estimate.num_injected
        return float((gradient - full).norm() / full.norm())

    assert found(0) < 1e-10
    assert found(1) > 1e-3  # the control: one step more than there is


@systems
def test_before_anything_is_learned_it_is_plain_truncation(name: str) -> None:
    estimator = SyntheticGradients(4, lambda_=1.0)
    system, recording = made(name, 26, estimator)
    model, given = system.model, windows(recording, 4)
    plain, carry = [], TBPTT(4, 4).init(model, B)
    for window in given:
        estimate, carry = TBPTT(4, 4).estimate(model, squared, carry, window)
        plain.append(estimate)
    names = list(own_parameters(model))
    for found, wanted in zip(ran(estimator, model, given), plain, strict=True):
        assert (found.num_injected, found.lookback) == (wanted.num_injected, wanted.lookback)
        assert torch.equal(found.loss_sum, wanted.loss_sum)
        for each in names:
            a, b = (of.gradients.get(each, torch.zeros(1).double()) for of in (found, wanted))
            torch.testing.assert_close(*torch.broadcast_tensors(a, b), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for each in predictor_of(model).parameters():
            each.fill_(0.1)
    last = ran(estimator, model, given)[-1].gradients
    assert relative({each: last[each] for each in last if each in names}, plain[-1].gradients) > 1e-3  # the control


# How it learns


def forward_view(
    recording: Recording,
    leaves: dict[str, Tensor],
    predict: Callable[[Tensor], Tensor],
    k1: int,
    lambda_: float,
    gamma: float,
    weights: Sequence[Tensor],
) -> list[Tensor]:
    """What the predictor learns from a whole recording at fixed weights, from its end to its start, without a trace.

    The target of a boundary is, with s' the state at the next and n the steps between them,
    d/ds [sum_j gamma^j l_j + gamma^n <(1 - lambda) g(s') + lambda target', s'>].
    """
    steps = len(recording.inputs)
    with torch.no_grad():
        _, states = recording.run([leaves] * steps, None, 0, steps, [])
    cuts = [*range(0, steps, k1), steps]
    target = predict(flat(states[steps])).detach()
    learned: Tensor | float = 0.0
    for begin, end in reversed(list(pairwise(cuts))[1:]):  # nothing was predicted for the very first state
        start = tuple(leaf.detach().requires_grad_() for leaf in states[begin])
        now, total = start, torch.zeros(()).double()
        for step in range(begin, end):
            loss, after = recording.run([leaves] * steps, now, step, step + 1, [step])
            now, total = after[-1], total + gamma ** (step - begin) * loss
        ahead = (1 - lambda_) * predict(flat(states[end])).detach() + lambda_ * target
        if end == steps:
            ahead = target
        total = total + gamma ** (end - begin) * (ahead * flat(now)).sum()
        if total.requires_grad:
            target = flat(torch.autograd.grad(total, start, materialize_grads=True))
        else:  # all lanes start anew
            target = torch.zeros_like(target)
        learned = learned + 0.5 * (predict(flat(states[begin])) - target).square().sum() / B
    assert isinstance(learned, Tensor)
    return list(torch.autograd.grad(learned, list(weights)))


@systems
@pytest.mark.parametrize(
    ("lambda_", "gamma", "kind"),
    [(1.0, 1.0, "linear"), (0.0, 1.0, 5), (0.6, 0.9, 5), (0.0, 0.8, "linear"), (0.7, 1.0, "own"), (0.0, 0.9, "own")],
)
def test_traces_say_what_looking_ahead_would(name: str, lambda_: float, gamma: float, kind: Any) -> None:
    """Any cell, with resets and masks: the sum over all windows is that of the forward view."""
    estimator = SyntheticGradients(4, kind, lambda_, gamma)
    system, recording = made(name, 26, estimator, scale=0.3)
    model, predictor = system.model, predictor_of(system.model)
    weights = dict(predictor.named_parameters())
    found = summed(ran(estimator, model, windows(recording, 4)), [PREFIX + each for each in weights], weighted=False)
    leaves = {key: value.detach() for key, value in own_parameters(model).items()}

    def wanted(recording: Recording, lambda_: float, gamma: float) -> dict[str, Tensor]:
        values = forward_view(recording, leaves, predictor.net, 4, lambda_, gamma, list(weights.values()))
        return dict(zip(found, values, strict=True))

    assert relative(found, wanted(recording, lambda_, gamma)) < 1e-10
    assert relative(found, wanted(recording, lambda_ + 0.1, gamma)) > 1e-4  # the controls
    assert relative(found, wanted(recording, lambda_, gamma - 0.1)) > 1e-4
    unbroken = copy.deepcopy(recording)
    unbroken.reset[1:] = False
    assert relative(found, wanted(unbroken, lambda_, gamma)) > 1e-3


class Plain(nn.Module):
    """h' = tanh(W h + x), and the output is h."""

    def __init__(self, matrix: np.ndarray[Any, Any]) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.from_numpy(matrix).double())

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state = torch.zeros_like(inputs[0]) if state is None else state
        outputs = []
        for step in inputs:
            state = torch.tanh(state @ self.matrix.T + step)
            outputs.append(state)
        return torch.stack(outputs), state


def traced_in_numpy(
    data: dict[str, np.ndarray[Any, Any]], k1: int, lambda_: float, gamma: float, rate: float, forget: bool
) -> np.ndarray[Any, Any]:
    """BP(lambda) forwards, one lane after another: e <- gamma^k1 lambda D e + dg/dPsi, Psi <- Psi + rate mean(delta e).

    The predictor is g(h) = A (h, 1), and its weights move after each window. Returns them, window by window.
    """
    matrix, inputs, targets, reset = data["matrix"], data["inputs"], data["targets"], data["reset"]
    steps, lanes, size = inputs.shape
    weights = np.zeros((size, size + 1))
    states, traces, history = np.zeros((lanes, size)), [np.zeros((size, weights.size))] * lanes, []
    for begin in range(0, steps, k1):
        change = np.zeros(weights.size)
        news, carried = np.zeros_like(states), []
        for lane in range(lanes):
            h, jacobian, arrived = states[lane], np.eye(size), np.zeros(size)
            for step in range(begin, begin + k1):
                if reset[step, lane]:
                    h = np.zeros(size)
                    jacobian = np.zeros((size, size)) if forget else jacobian
                h = np.tanh(matrix @ h + inputs[step, lane])
                jacobian = (1 - h**2)[:, None] * matrix @ jacobian
                arrived += gamma ** (step - begin) * 2 * (h - targets[step, lane]) @ jacobian
            arrived += gamma**k1 * (weights @ np.append(h, 1.0)) @ jacobian
            trace = np.zeros((size, weights.size))
            if begin:
                row = np.append(states[lane], 1.0)
                trace = traces[lane] + np.kron(np.eye(size), row[None])  # of A, row by row
                change += (arrived - weights @ row) @ trace / lanes
            carried.append(gamma**k1 * lambda_ * jacobian @ trace)
            news[lane] = h
        states, traces = news, carried
        weights = weights + rate * change.reshape(weights.shape)
        history.append(weights)
    return np.stack(history)


@pytest.mark.parametrize(("lambda_", "gamma"), [(1.0, 1.0), (0.7, 0.9)])
def test_traces_are_those_of_a_plain_loop_while_the_predictor_learns(lambda_: float, gamma: float) -> None:
    rng = np.random.default_rng(5)
    data = {
        "matrix": rng.normal(size=(3, 3)) * 0.6,
        "inputs": rng.normal(size=(30, 4, 3)),
        "targets": rng.normal(size=(30, 4, 3)),
        "reset": rng.random((30, 4)) < 0.08,
    }
    model, estimator = Plain(data["matrix"]), SyntheticGradients(3, "linear", lambda_, gamma)
    inputs, targets, reset = (torch.from_numpy(data[each]) for each in ("inputs", "targets", "reset"))
    estimator.attach(model, inputs)
    net, carry, found = predictor_of(model).net, estimator.init(model, 4), []
    assert isinstance(net, nn.Linear)
    for begin in range(0, 30, 3):
        cut = slice(begin, begin + 3)
        estimate, carry = estimator.estimate(model, squared, carry, Window(inputs[cut], targets[cut], reset=reset[cut]))
        with torch.no_grad():
            net.weight -= 0.05 * estimate.gradients.get(PREFIX + "net.weight", 0.0)
            net.bias -= 0.05 * estimate.gradients.get(PREFIX + "net.bias", 0.0)
        found.append(torch.cat([net.weight.detach(), net.bias.detach()[:, None]], 1).numpy())
    away = np.abs(np.stack(found) - traced_in_numpy(data, 3, lambda_, gamma, 0.05, forget=True)).max()
    assert away < 1e-12
    for control in (
        traced_in_numpy(data, 3, lambda_ - 0.05, gamma, 0.05, forget=True),
        traced_in_numpy(data, 3, lambda_, gamma - 0.05, 0.05, forget=True),
        traced_in_numpy(data, 3, lambda_, gamma, 0.05, forget=False),
    ):
        assert np.abs(np.stack(found) - control).max() > 1e-5


def test_each_lane_is_by_itself() -> None:
    estimator = SyntheticGradients(4, lambda_=0.8, gamma=0.9)
    system, recording = made("lstm", 26, estimator, scale=0.3)
    recording.mask[:] = True
    model, given = system.model, windows(recording, 4)
    names = list(model.state_dict())

    def alone(lane: int) -> list[Window]:
        pick = slice(lane, lane + 1)
        return [Window(*(each[:, pick] for each in (w.inputs, w.targets, w.mask, w.reset))) for w in given]

    together = ran(estimator, model, given)
    single = [ran(estimator, model, alone(lane)) for lane in range(B)]
    for window, pair in zip(together, zip(*single, strict=True), strict=True):
        mean = {name: sum(each.gradients.get(name, torch.zeros(())) for each in pair) / B for name in names}
        assert relative(window.gradients, mean) < 1e-12
        if any(each.gradients.get(names[-1], torch.zeros(())).any() for each in pair):
            assert relative(window.gradients, pair[0].gradients) > 1e-3  # the control: the lanes differ
    carries = [estimator.init(model, B), estimator.init(model, 1)]
    for at, chosen in enumerate((given, alone(1))):
        for window in chosen:
            _, carries[at] = estimator.estimate(model, squared, carries[at], window)
    assert carries[0].trace is not None
    assert carries[1].trace is not None
    torch.testing.assert_close(carries[0].trace[1], carries[1].trace[0], rtol=1e-12, atol=1e-12)


def test_a_lane_that_starts_anew_takes_no_trace_along() -> None:
    estimator = SyntheticGradients(4, lambda_=1.0)
    system, recording = made("gru", 26, estimator, scale=0.3)
    recording.reset[:] = False
    recording.reset[9, 0] = True
    carry, traces = estimator.init(system.model, B), []
    for window in windows(recording, 4):
        _, carry = estimator.estimate(system.model, squared, carry, window)
        traces.append(carry.trace)
    assert traces[0] is None  # nothing has been predicted for the very first state
    dead = [[bool((trace[lane] == 0).all()) for lane in range(B)] for trace in traces[1:]]
    assert dead == [[False, False], [True, False], *[[False, False]] * 4]


def test_what_was_predicted_before_a_new_sequence_learns_zero() -> None:
    """A lane that starts anew at a window's first step: its old state has no future."""
    estimator = SyntheticGradients(4, lambda_=0.0)
    system, recording = made("gru", 20, estimator, scale=0.3)
    recording.mask[:] = True
    errors = []
    for resets in ([True, True], [True, False], [False, False]):
        recording.reset[:] = False
        recording.reset[4] = torch.tensor(resets)
        errors.append(ran(estimator, system.model, windows(recording, 4)[:2])[-1].metrics)
    assert errors[0]["arrived_norm"] == 0.0
    assert 0.0 < errors[1]["arrived_norm"] < errors[2]["arrived_norm"]
    assert errors[0]["bootstrap_error"] > 0.0
