"""The models of the gradient tests, each twice: as the library sees it, and as an oracle's step function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import tbptt
from tbptt.testing import Recording

D, H, B = 2, 3, 2


class Leaky(nn.Module):
    """A custom cell with a learnable initial state and an output that is not its state."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(D + H, H)
        self.start = nn.Parameter(torch.randn(H) * 0.5)

    def initial_state(self, lanes: int) -> Tensor:
        return self.start.expand(lanes, H)

    def forward(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = 0.8 * state + 0.6 * torch.tanh(self.mix(torch.cat([inputs, state], -1)))
        return state * state - 0.3 * state, state


class Nested(nn.Module):
    """Two coupled recurrences whose state is a dict of a tuple and a dict, with a lane dimension at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(D, H)
        self.slow = nn.Linear(H, H)

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        lanes = inputs.shape[1]
        fast = None if state is None else state["fast"]
        trace = inputs.new_zeros(lanes, H) if state is None else state["more"]["trace"]
        y, fast = self.lstm(inputs, fast)
        outputs = []
        for step in y:
            trace = 0.9 * trace + torch.tanh(self.slow(step + trace))
            outputs.append(trace + step)
        return torch.stack(outputs), {"fast": fast, "more": {"trace": trace}, "none": None}


class Leaking(nn.Module):
    """h' = beta h + w x, shown as it is: the gradient of the state by lag is beta^k times that of the loss."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1).double())
        self.beta = beta

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state = inputs.new_zeros(inputs.shape[1]) if state is None else state
        outputs = []
        for step in inputs:
            state = self.beta * state + self.weight * step[:, 0]
            outputs.append(state)
        return torch.stack(outputs), state


@dataclass(frozen=True)
class System:
    model: nn.Module
    step: Callable[..., Any]
    initial: Callable[..., Any]


def _zeros(*shapes: tuple[int, ...]) -> Callable[..., Any]:
    return lambda parameters: tuple(torch.zeros(shape, dtype=torch.float64) for shape in shapes)


def lstm() -> System:
    model = nn.LSTM(D, H, num_layers=2).double()

    def step(parameters: dict[str, Tensor], x: Tensor, state: Any) -> Any:
        y, (h, c) = functional_call(model, parameters, (x[None], tuple(s.transpose(0, 1) for s in state)))
        return y[0], (h.transpose(0, 1), c.transpose(0, 1))

    return System(model, step, _zeros((B, 2, H), (B, 2, H)))


def gru() -> System:
    model = nn.GRU(D, H).double()

    def step(parameters: dict[str, Tensor], x: Tensor, state: Any) -> Any:
        y, h = functional_call(model, parameters, (x[None], state[0].transpose(0, 1)))
        return y[0], (h.transpose(0, 1),)

    return System(model, step, _zeros((B, 1, H)))


def leaky() -> System:
    cell = Leaky().double()

    def step(parameters: dict[str, Tensor], x: Tensor, state: Any) -> Any:
        inner = {name.removeprefix("cell."): value for name, value in parameters.items()}
        y, s = functional_call(cell, inner, (x, state[0]))
        return y, (s,)

    def initial(parameters: dict[str, Tensor]) -> Any:
        return (torch.stack([parameters["cell.start"]] * B),)

    return System(tbptt.scan(cell), step, initial)


def nested() -> System:
    model = Nested().double()

    def step(parameters: dict[str, Tensor], x: Tensor, state: Any) -> Any:
        h, c, trace = state
        given = {"fast": (h.transpose(0, 1), c.transpose(0, 1)), "more": {"trace": trace}}
        y, new = functional_call(model, parameters, (x[None], given))
        h, c = new["fast"]
        return y[0], (h.transpose(0, 1), c.transpose(0, 1), new["more"]["trace"])

    return System(model, step, _zeros((B, 1, H), (B, 1, H), (B, H)))


SYSTEMS = {"lstm": lstm, "gru": gru, "leaky": leaky, "nested": nested}


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(-1)


def record(system: System, steps: int, *, masks: bool, resets: bool) -> Recording:
    mask = torch.rand(steps, B) < (0.7 if masks else 2.0)
    reset = torch.rand(steps, B) < (0.06 if resets else -1.0)
    inputs = torch.randn(steps, B, D, dtype=torch.float64)
    targets = torch.randn(steps, B, H, dtype=torch.float64)
    return Recording(inputs, targets, mask, reset, system.step, system.initial, squared)


def relative(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The distance of two gradients, relative to the length of the wanted one."""
    assert found.keys() == wanted.keys()
    apart = sum(float((found[name] - wanted[name]).square().sum()) for name in wanted) ** 0.5
    return apart / max(sum(float(value.square().sum()) for value in wanted.values()) ** 0.5, 1e-300)
