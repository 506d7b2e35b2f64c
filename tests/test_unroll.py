"""Resets: a lane that starts anew is that lane run alone from a fresh start, and no gradient crosses."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tbptt
from tbptt import Window
from tbptt.errors import CapabilityError, ShapeError
from tbptt.model import find_lane_dims, initial_state
from tbptt.unroll import unroll

T, B, D, H = 9, 3, 2, 4


class Started(nn.Module):
    """A cell with a learnable start."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(D + H, H)
        self.start = nn.Parameter(torch.randn(H))

    def initial_state(self, lanes: int) -> Tensor:
        return self.start.expand(lanes, H)

    def forward(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.tanh(self.mix(torch.cat([inputs, state], -1)))
        return state, state


MODELS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(D, H, num_layers=2),
    "gru": lambda: nn.GRU(D, H),
    "cell": lambda: tbptt.scan(nn.LSTMCell(D, H)),
    "started": lambda: tbptt.scan(Started()),
}
# The first step of the new sequences of each lane: none, one, several, at the window's ends, all lanes at once.
RESETS: dict[str, list[list[int]]] = {
    "none": [[], [], []],
    "one lane": [[], [4], []],
    "several": [[2], [], [3, 7]],
    "ends": [[0], [T - 1], [0, T - 1]],
    "all lanes": [[5], [5], [5]],
    "both": [[1, 5], [5], [5, 6]],
}


def window(inputs: Tensor, resets: list[list[int]]) -> Window:
    reset = torch.zeros(inputs.shape[:2], dtype=torch.bool)
    for lane, steps in enumerate(resets):
        reset[steps, lane] = True
    return Window(inputs, reset=reset)


def alone(model: nn.Module, inputs: Tensor, steps: list[int]) -> tuple[list[Tensor], Any]:
    """One lane's sequences, each run by itself from a fresh start; the first goes on from zeros too."""
    outputs, state = [], None
    cuts = sorted({0, *steps, len(inputs)})
    for begin, end in pairwise(cuts):
        out, state = model(inputs[begin:end], initial_state(model, 1))
        outputs.append(out)
    return outputs, state


@pytest.mark.parametrize("resets", RESETS.values(), ids=RESETS)
@pytest.mark.parametrize("name", MODELS)
def test_each_lane_is_that_lane_alone(name: str, resets: list[list[int]]) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name]().double(), torch.randn(T, B, D).double()
    dims = find_lane_dims(model, inputs)
    outputs, state = unroll(model, window(inputs, resets), None, dims)
    for lane, steps in enumerate(resets):
        wanted, last = alone(model, inputs[:, lane : lane + 1], steps)
        torch.testing.assert_close(outputs[:, lane : lane + 1], torch.cat(wanted))
        for leaf, other, dim in zip(tbptt.tree.tensors(state), tbptt.tree.tensors(last), dims, strict=True):
            torch.testing.assert_close(leaf.narrow(dim, lane, 1), other)
    undisturbed, _ = unroll(model, window(inputs, RESETS["none"]), None, dims)
    changed = [not torch.allclose(outputs[:, lane], undisturbed[:, lane]) for lane in range(B)]
    assert changed == [bool(set(steps) - {0}) for steps in resets]  # the control, and no other lane is touched


@pytest.mark.parametrize("resets", RESETS.values(), ids=RESETS)
@pytest.mark.parametrize("name", MODELS)
def test_no_gradient_crosses_a_reset(name: str, resets: list[list[int]]) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name]().double(), torch.randn(T, B, D).double().requires_grad_()
    dims = find_lane_dims(model, inputs)
    _, given = unroll(model, Window(torch.randn(2, B, D).double()), None, dims)
    given = tbptt.tree.as_leaves(given)
    outputs, _ = unroll(model, window(inputs, resets), given, dims)
    leaves = tbptt.tree.tensors(given)
    found = torch.autograd.grad(outputs[-1].sum(), [inputs, *leaves], allow_unused=True, materialize_grads=True)
    for lane, steps in enumerate(resets):
        first = max(steps, default=0)
        reached = found[0][:, lane].any(-1).tolist()
        assert reached == [step >= first for step in range(T)]
        for gradient, dim in zip(found[1:], dims, strict=True):
            assert bool(gradient.narrow(dim, lane, 1).any()) == (not steps)


@pytest.mark.parametrize("reset", ["one lane", "all lanes"])
def test_a_learnable_start_gets_its_gradient_at_a_reset(reset: str) -> None:
    torch.manual_seed(0)
    model, inputs = tbptt.scan(Started()).double(), torch.randn(T, B, D).double()
    dims = find_lane_dims(model, inputs)
    given = torch.randn(B, H).double()
    outputs, _ = unroll(model, window(inputs, RESETS[reset]), given, dims)
    [found] = torch.autograd.grad(outputs[-1].sum(), [model.cell.start])
    lanes = [lane for lane, steps in enumerate(RESETS[reset]) if steps]
    by_hand = sum(alone(model, inputs[RESETS[reset][lane][0] :, lane : lane + 1], [])[0][0][-1].sum() for lane in lanes)
    torch.testing.assert_close(found, torch.autograd.grad(by_hand, [model.cell.start])[0])
    outputs, _ = unroll(model, window(inputs, RESETS["none"]), given, dims)
    assert torch.autograd.grad(outputs[-1].sum(), [model.cell.start], allow_unused=True) == (None,)  # the control


def test_the_model_sees_the_longest_stretches() -> None:
    calls: list[int] = []

    class Counting(nn.GRU):
        def forward(self, inputs: Tensor, state: Any = None) -> Any:
            calls.append(len(inputs))
            return super().forward(inputs, state)

    model, inputs = Counting(D, H), torch.randn(T, B, D)
    for name, lengths in [("none", [9]), ("ends", [8, 1]), ("several", [2, 1, 4, 2])]:
        calls.clear()
        unroll(model, window(inputs, RESETS[name]), None, (1,))
        assert calls == lengths


def test_without_lane_dimensions_only_all_lanes_can_be_reset() -> None:
    model, inputs = nn.GRU(D, H), torch.randn(T, B, D)
    wanted, _ = unroll(model, window(inputs, RESETS["all lanes"]), None, (1,))
    found, _ = unroll(model, window(inputs, RESETS["all lanes"]), None, None)
    assert torch.equal(found, wanted)
    with pytest.raises(CapabilityError, match="single lanes are to be reset at step 4 of the window"):
        unroll(model, window(inputs, RESETS["one lane"]), None, None)


def test_a_state_whose_lanes_change_is_refused() -> None:
    class Losing(nn.GRU):
        def forward(self, inputs: Tensor, state: Any = None) -> Any:
            outputs, state = super().forward(inputs, state)
            return outputs, state[:, 1:]

    with pytest.raises(ShapeError, match=rf"expected to have {B} lanes in dimension 1, but has shape \(1, 2, 4\)"):
        unroll(Losing(D, H), Window(torch.randn(T, B, D)), None, (1,))


class Clock(nn.Module):
    """Counts its steps in a Python number, which it reads."""

    def __init__(self, begin: bool, moves: bool = True) -> None:
        super().__init__()
        self.cell, self.moves = nn.GRUCell(2, 4), moves
        if begin:
            self.initial_state = lambda lanes: (torch.zeros(lanes, 4), 7)

    def forward(self, inputs: Tensor, state: Any = None) -> Any:
        hidden, count = (torch.zeros(inputs.shape[1], 4), 7) if state is None else state
        for step in inputs:
            hidden = self.cell(step * count, hidden)
            count += self.moves
        return hidden.expand(len(inputs), -1, -1), (hidden, count)


@pytest.mark.parametrize("begin", [True, False], ids=["initial state", "none"])
def test_a_number_that_all_lanes_share_is_not_reset_for_one(begin: bool) -> None:
    inputs = torch.randn(6, 2, 2)
    reset = torch.zeros(6, 2, dtype=torch.bool)
    reset[3, 1] = True
    single = Window(inputs, inputs, reset=reset)
    with pytest.raises(CapabilityError, match=r"a Python number in it, 10: all lanes share it"):
        unroll(Clock(begin), single, None, (0,))
    _, state = unroll(Clock(begin, moves=False), single, None, (0,))  # a setting is what it is
    assert state[1] == 7
    both = reset.clone()
    both[3] = True
    _, state = unroll(Clock(begin), Window(inputs, inputs, reset=both), None, (0,))
    assert state[1] == 10  # 7 again, and three steps
