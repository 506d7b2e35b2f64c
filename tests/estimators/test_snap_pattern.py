"""SnAp's pattern grows as dependences show: with all reached it is RTRL, and full backpropagation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from systems import relative, squared
from torch import Tensor, nn

from tbptt import RTRL, SnAp, Window
from tbptt.errors import CapabilityError
from tbptt.estimators.lane_segment import LaneSegment

T, TOKENS = 14, 12


class Drawn(nn.Module):
    """A model drawn at random: symbols or numbers in, one of torch's layers or a sparse relu cell, a start that may be
    learned, and a head."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.kind = ("tanh", "relu", "gru", "lstm", "cell")[seed % 5]
        self.symbols, learned = seed % 2 == 0, seed % 3 != 0
        self.size, width = 2 + seed % 3, 2
        if self.symbols:
            self.embedding = nn.Embedding(TOKENS, width)
        if self.kind == "cell":
            self.register_buffer("mask", (torch.rand(self.size, self.size) < 0.5).float())
            self.again = nn.Parameter(torch.randn(self.size, self.size))
            self.enter = nn.Parameter(torch.randn(self.size, width))
            self.shift = nn.Parameter(torch.randn(self.size) - 0.5)
        elif self.kind in ("gru", "lstm"):
            self.core = {"gru": nn.GRU, "lstm": nn.LSTM}[self.kind](width, self.size)
        else:
            self.core = nn.RNN(width, self.size, nonlinearity=self.kind)
        self.head = nn.Linear(self.size, 2)
        self.starts = nn.ParameterList(
            [nn.Parameter(torch.randn(self.size)) for _ in range(2 if self.kind == "lstm" else 1)] if learned else []
        )

    def initial_state(self, lanes: int) -> Any:
        starts = list(self.starts) or [torch.zeros(self.size, dtype=self.head.weight.dtype)] * (
            1 + (self.kind == "lstm")
        )
        if self.kind == "cell":
            return starts[0].relu().expand(lanes, -1)
        rows = tuple(each.expand(1, lanes, -1).contiguous() for each in starts)
        return rows if self.kind == "lstm" else rows[0]

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        state = self.initial_state(inputs.shape[1]) if state is None else state
        inputs = self.embedding(inputs) if self.symbols else inputs
        if self.kind != "cell":
            outputs, state = self.core(inputs, state)
            return self.head(outputs), state
        seen = []
        for step in inputs:
            state = torch.relu(state @ (self.again * self.mask).T + step @ self.enter.T + self.shift)
            seen.append(state)
        return self.head(torch.stack(seen)), state


def drawn(seed: int) -> tuple[Drawn, Window]:
    model = Drawn(seed).double()
    lanes = 1 + seed % 3
    x = torch.randint(TOKENS, (T, lanes)) if model.symbols else torch.randn(T, lanes, 2).double()
    reset = torch.rand(T, lanes) < (0.15 if seed % 4 else 0.0)
    return model, Window(x, torch.randn(T, lanes, 2).double(), reset=reset)


def summed(estimator: Any, model: nn.Module, window: Window) -> dict[str, Tensor]:
    carry = estimator.init(model, window.lanes)
    sums = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for at in range(0, window.steps, estimator.k1):
        estimate, carry = estimator.estimate(model, squared, carry, window[at : at + estimator.k1])
        for name, value in estimate.gradients.items():
            sums[name] += value * estimate.num_injected
    return sums


def by_autograd(model: Drawn, window: Window) -> dict[str, Tensor]:
    """The same by plain autograd, lane by lane and stretch by stretch between resets."""
    total = torch.zeros((), dtype=torch.float64)
    for lane in range(window.lanes):
        begins = sorted({0, *window.reset[:, lane].nonzero().flatten().tolist()})
        for begin, end in zip(begins, [*begins[1:], window.steps], strict=True):
            x, y = (each[begin:end, lane : lane + 1] for each in (window.inputs, window.targets))
            total = total + squared(model(x, model.initial_state(1))[0], y).sum()
    names = dict(model.named_parameters())
    found = torch.autograd.grad(total, list(names.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def apart(seed: int) -> bool:
    """See that SnAp that reaches all is RTRL and full backpropagation; return whether SnAp(1) is far from them."""
    model, window = drawn(seed)
    exact = by_autograd(model, window)
    steps = 1 + seed % 4
    assert relative(summed(RTRL(steps), model, window), exact) < 1e-12
    assert relative(summed(SnAp(steps, n=60), model, window), exact) < 1e-12, seed
    return relative(summed(SnAp(1, n=1), model, window), exact) > 1e-3


def test_snap_that_reaches_all_is_rtrl() -> None:
    """Symbols that the first window did not show, units that are off at first, learned starts, resets of lanes."""
    others = sum(apart(seed) for seed in range(10))
    assert others > 6  # the control: with n=1 something is left out


@pytest.mark.slow
def test_snap_that_reaches_all_is_rtrl_on_two_hundred_models() -> None:
    assert sum(apart(seed) for seed in range(200)) > 140


class Units(nn.Module):
    """h' = tanh(keep * h + x), units alone, from a learned start; `more` joins each to the next one."""

    def __init__(self, size: int = 6, more: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.keep, self.start = (nn.Parameter(torch.randn(size).double()) for _ in range(2))
        self.more = more

    def initial_state(self, lanes: int) -> Tensor:
        return self.start.expand(lanes, -1)

    def forward(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for step in inputs:
            state = torch.tanh(self.keep * state + self.more * state.roll(1, 1) + step)
            outputs.append(state)
        return torch.stack(outputs), state


@pytest.mark.parametrize("more", [0.0, 0.7])
def test_a_learned_start_keeps_to_its_own_unit(more: float) -> None:
    """SnAp(1) carries it along its own unit alone, as NumPy does; K stays 1."""
    model = Units(more=more)
    x, y = torch.randn(9, 1, 6).double(), torch.randn(9, 1, 6).double()
    estimator, found = SnAp(1, n=1), torch.zeros(6).double()
    carry = estimator.init(model, 1)
    keep, h, influence, wanted = (
        model.keep.detach(),
        model.start.detach(),
        torch.eye(6).double(),
        torch.zeros(6).double(),
    )
    for at in range(9):
        estimate, carry = estimator.estimate(model, squared, carry, Window(x[at : at + 1], y[at : at + 1]))
        found += estimate.gradients["start"] * estimate.num_injected
        h = torch.tanh(keep * h + more * h.roll(1) + x[at, 0])
        jacobian = (1 - h * h)[:, None] * (torch.diag(keep) + more * torch.eye(6).double().roll(1, 0))
        influence = jacobian @ influence
        wanted += 2 * (h - y[at, 0]) @ influence  # before what is out of reach is dropped
        influence = torch.diag(influence.diagonal())
    assert len(carry.influence["rows"]) == 1
    assert (found - wanted).abs().max() < 1e-12
    apart = relative({"": found}, {"": summed(RTRL(), model, Window(x, y))["start"]})
    assert (apart > 1e-3) if more else (apart < 1e-12)  # the control: units that are joined leave something out


def test_a_step_that_shows_nothing_new_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """More passes back through a step than the pattern asks for only while symbols are new."""
    model, window = drawn(0)
    estimator, calls, counted = SnAp(1, n=2), list[None](), list[int]()
    pulled = LaneSegment.pulled

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return pulled(*args, **kwargs)

    monkeypatch.setattr(LaneSegment, "pulled", count)
    carry = estimator.init(model, window.lanes)
    for at in [*range(window.steps), *range(window.steps)]:
        step = replace(window[at : at + 1], reset=torch.zeros(1, window.lanes).bool())
        _, carry = estimator.estimate(model, squared, carry, step)
        counted.append(len(calls))
        calls.clear()
    passes = 1 + model.size  # the test, and D with I: a row of the embedding reaches all units
    assert max(counted[window.steps :]) == passes < max(counted[: window.steps])


def off_at_first() -> tuple[nn.Module, Window]:
    torch.manual_seed(0)
    model = nn.RNN(1, 3, nonlinearity="relu").double()
    with torch.no_grad():
        model.bias_ih_l0.fill_(-50.0)
    x = torch.full((12, 2, 1), 1.0).double()
    x[4:, 0] = 200.0
    window = Window(x, torch.randn(12, 2, 3).double())
    with torch.no_grad():
        model.weight_ih_l0.fill_(1.0)
    return model, window


def test_a_model_whose_units_are_all_off_at_first_is_learned_from() -> None:
    """Nothing reaches the state in the probes: an empty pattern, which grows."""
    model, window = off_at_first()
    wanted = summed(RTRL(), model, window)
    assert relative(summed(SnAp(1, n=9), model, window), wanted) < 1e-12
    assert wanted["weight_ih_l0"].abs().max() > 1


def test_what_is_too_large_once_it_has_grown_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tbptt.estimators.forward_mode._MOST", 20)
    model, window = off_at_first()
    summed(SnAp(1), model, window[:4])
    with pytest.raises(CapabilityError, match="at most 20 numbers were expected"):
        summed(SnAp(1), model, window)
