"""The models of the gradient tests, each twice: as the library sees it, and as an oracle's step function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import tbptt
from tbptt.errors import CapabilityError
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


class Plain(nn.Module):
    """One linear map a step, shown as it is: h' = tanh(W (x, h) + b)."""

    def __init__(self, inputs: int = D, hidden: int = H) -> None:
        super().__init__()
        self.hidden = hidden
        self.enter, self.again = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden, bias=False)

    def forward(self, inputs: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        state = inputs.new_zeros(len(inputs), self.hidden) if state is None else state
        state = torch.tanh(self.enter(inputs) + self.again(state))
        return state, state


class Forgetful(nn.Module):
    """An element-wise recurrence with a gate, f c + (1 - f) z, and a head."""

    def __init__(self, inputs: int = D, hidden: int = H) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(hidden, inputs))
        self.own = nn.Parameter(torch.randn(hidden))
        self.bias = nn.Parameter(torch.randn(hidden))
        self.drive = nn.Parameter(torch.randn(hidden, inputs))
        self.head = nn.Linear(hidden, hidden)

    def recurrences(self) -> tuple[tbptt.Recurrence, ...]:
        return (tbptt.Recurrence(0, ("gate", "own", "bias", "drive")),)

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state = inputs.new_zeros(inputs.shape[1], len(self.bias)) if state is None else state
        outputs = []
        for step in inputs:
            f = torch.sigmoid(step @ self.gate.T + self.own * state + self.bias)
            state = f * state + (1 - f) * torch.tanh(step @ self.drive.T + 0.5 * self.own * state)
            outputs.append(torch.tanh(self.head(state)))
        return torch.stack(outputs), state


class Attending(nn.Module):
    """A layer that looks up its own past, and a head."""

    def __init__(self, inputs: int = D, hidden: int = H, core: type[nn.LSTM] | type[nn.GRU] = nn.LSTM) -> None:
        super().__init__()
        self.layer = tbptt.models.Attentive(core(inputs, hidden), k_att=2, k_top=2, memory=4)
        self.head = nn.Linear(2 * hidden, hidden)

    def memories(self) -> tuple[int, ...]:
        return self.layer.memories()

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        outputs, state = self.layer(inputs, state)
        return self.head(outputs), state


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


def plain() -> System:
    cell = Plain().double()

    def step(parameters: dict[str, Tensor], x: Tensor, state: Any) -> Any:
        inner = {name.removeprefix("cell."): value for name, value in parameters.items()}
        y, h = functional_call(cell, inner, (x, state[0]))
        return y, (h,)

    return System(tbptt.scan(cell), step, _zeros((B, H)))


def forgetful() -> System:
    model = Forgetful().double()

    def step(parameters: dict[str, Tensor], x: Tensor, state: Any) -> Any:
        y, c = functional_call(model, parameters, (x[None], state[0]))
        return y[0], (c,)

    return System(model, step, _zeros((B, H)))


def attentive() -> System:
    """A memory of fewer slots than there are states to store."""
    model = Attending().double()

    def step(parameters: dict[str, Tensor], x: Tensor, state: Any) -> Any:
        y, new = functional_call(model, parameters, (x[None], state))
        return y[0], new

    def initial(parameters: dict[str, Tensor]) -> Any:
        zeros = torch.zeros(B, H, dtype=torch.float64)
        return zeros, zeros, torch.zeros(B, 4, H, dtype=torch.float64), torch.zeros(B, dtype=torch.int64)

    return System(model, step, initial)


SIMPLE = {"plain": plain, "forgetful": forgetful, "attentive": attentive}
"""For methods that take models of one kind only."""
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
    """The distance of two gradients, relative to the length of the wanted one; one that is missing is zero."""
    assert found.keys() <= wanted.keys()
    apart = sum(float((found.get(name, 0.0) - wanted[name]).square().sum()) for name in wanted) ** 0.5
    return apart / max(sum(float(value.square().sum()) for value in wanted.values()) ** 0.5, 1e-300)


def is_mean(draws: Tensor, wanted: Tensor) -> bool:
    """Whether the mean of rows is the wanted vector, within four standard errors along it and along random ones."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.cat([wanted[None], torch.randn(5, len(wanted), generator=generator, dtype=wanted.dtype)])
    shown = (draws - wanted) @ directions.T
    return bool((shown.mean(0).abs() < 4 * shown.std(0) / len(draws) ** 0.5).all())


def takes(estimator: tbptt.Estimator, model: nn.Module, inputs: Tensor) -> bool:
    """Whether an estimator takes a model: it says no by a CapabilityError in the first two windows at the latest."""
    try:
        estimator.prepare(model, inputs[:2])
        carry = estimator.init(model, inputs.shape[1])
        for _ in range(2):
            steps = min(estimator.next_steps(carry), len(inputs))
            window = tbptt.Window(inputs[:steps], torch.zeros(()).expand(steps, inputs.shape[1]))
            _, carry = estimator.estimate(model, lambda outputs, _: outputs.sum(-1), carry, window)
    except CapabilityError:
        return False
    return True
