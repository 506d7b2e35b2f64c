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


class Graph(nn.Module):
    """Of a few nodes, which it folds into the lanes, and unfolds again where it is asked to."""

    def __init__(self, *, nodes: int = 4, unfolds: bool = False) -> None:
        super().__init__()
        self.cell, self.nodes, self.unfolds = nn.GRUCell(D, H), nodes, unfolds

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs, size = [], (-1, self.nodes)
        for each in inputs[:, :, None].expand(-1, -1, self.nodes, -1):
            state = self.cell(each.flatten(0, 1), state if state is None or state.ndim == 2 else state.flatten(0, 1))
            outputs.append(state.unflatten(0, size))
        return torch.stack(outputs), outputs[-1] if self.unfolds else state


def test_lanes_that_are_folded_into_another_dimension_are_named() -> None:
    inputs = torch.randn(T, B, D)
    for nodes in (2, 4):
        model = Graph(nodes=nodes)
        dims = find_lane_dims(model, inputs)
        assert dims == (None,)
        said = rf"tensor 0 of shape \({B * nodes}, 4\) has them folded into dimension 0, {nodes} entries for each lane"
        with pytest.raises(CapabilityError, match=said) as caught:
            unroll(model, window(inputs, RESETS["one lane"]), None, dims)
        assert f"state.unflatten(0, ({B}, {nodes}))" in caught.value.fix
    model = Graph(unfolds=True)  # as it says
    outputs, _ = unroll(model, window(inputs, RESETS["one lane"]), None, find_lane_dims(model, inputs))
    torch.testing.assert_close(outputs[4:, 1], model(inputs[4:, 1:2])[0][:, 0])


def test_what_grows_with_every_step_is_not_said_to_be_folded() -> None:
    class Cache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, H)

        def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
            flat = inputs.flatten(0, 1)
            state = flat if state is None else torch.cat([state, flat])
            return self.linear(inputs), state

    inputs = torch.randn(T, B, D)
    with pytest.raises(CapabilityError, match="no lanes of its own, or grows with every step"):
        unroll(Cache(), window(inputs, RESETS["one lane"]), None, (None,))


class Clock(nn.Module):
    """Knows how many steps there were, modulo a period, as a plain number; and says of what kind it is."""

    def __init__(self, *, period: int = 1000, started: bool = True) -> None:
        super().__init__()
        self.cell, self.period = nn.GRUCell(D + 1, H), period
        if started:
            self.initial_state = lambda lanes: (torch.zeros(lanes, H), {"number": 0, "kind": "clock"})

    def forward(self, inputs: Tensor, state: Any = None) -> Any:
        hidden, more = (torch.zeros(inputs.shape[1], H), {"number": 0, "kind": "clock"}) if state is None else state
        number, outputs = more["number"], []
        for each in inputs:
            hidden = self.cell(torch.cat([each, torch.full((len(each), 1), float(number))], 1), hidden)
            number = (number + 1) % self.period
            outputs.append(hidden)
        return torch.stack(outputs), (hidden, {"number": number, "kind": more["kind"]})


@pytest.mark.parametrize("started", [True, False])
def test_a_number_that_all_lanes_share_is_not_reset_for_one(started: bool) -> None:
    model, inputs = Clock(started=started), torch.randn(T, B, D)
    dims = find_lane_dims(model, inputs)
    begins = "is 0" if started else "is not known"
    with pytest.raises(
        CapabilityError, match=rf"\[1\]\.number is no tensor but the int 4, .* sequence {begins}"
    ) as caught:
        unroll(model, window(inputs, RESETS["one lane"]), None, dims)
    assert "torch.zeros(lanes, dtype=torch.int64)" in caught.value.fix
    outputs, state = unroll(model, window(inputs, RESETS["all lanes"]), None, dims)
    assert torch.equal(outputs[5:], model(inputs[5:], None)[0])
    assert state[1] == {"number": T - 5, "kind": "clock"}
    unroll(model, window(inputs, [[0], [0], [0]]), state, dims)


def test_a_number_that_is_the_one_of_a_start_needs_no_reset() -> None:
    inputs = torch.randn(T, B, D)
    model = Clock(period=4)
    outputs, _ = unroll(model, window(inputs, RESETS["one lane"]), None, (0,))
    torch.testing.assert_close(outputs[4:, 1], model(inputs[4:, 1:2], None)[0][:, 0])
    with pytest.raises(CapabilityError, match="shared by all lanes"):
        unroll(model, window(inputs, RESETS["several"]), None, (0,))
    model = Clock(period=1, started=False)  # it stays as it is, and so do words
    outputs, _ = unroll(model, window(inputs, RESETS["one lane"]), None, (0,))
    torch.testing.assert_close(outputs[4:, 1], model(inputs[4:, 1:2], None)[0][:, 0])


def test_nothing_remains_of_finding_out_what_stays() -> None:
    """A lane's reset runs a model on the side that has numbers in its state and no initial one."""
    plain, clock = Clock(period=1, started=True), Clock(period=1, started=False)
    clock.load_state_dict(plain.state_dict())
    inputs, found = torch.randn(T, B, D), []
    for model in (plain, clock):
        model.register_forward_pre_hook(lambda module, args: (args[0] + 0.1 * torch.randn_like(args[0]), *args[1:]))
        torch.manual_seed(3)
        found.append(unroll(model, window(inputs, RESETS["several"]), None, (0,))[0])
    assert torch.equal(*found)


ESTIMATORS: list[Any] = [
    tbptt.TBPTT(T, T),
    tbptt.TBPTT(T, 4),
    tbptt.TBPTT(T, 4, replay="retain"),
    tbptt.FullBPTT(T),
    tbptt.RTRL(T),
    tbptt.RFLO(T),
    tbptt.PES(T, num_particles=4, sigma=0.1),
]


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_no_estimator_lets_a_number_go_on(estimator: tbptt.Estimator, started: bool) -> None:
    model, inputs = Clock(started=started), torch.randn(T, B, D)
    found = window(inputs, RESETS["one lane"])
    found = Window(inputs, torch.randn(T, B, H), reset=found.reset)
    with pytest.raises(CapabilityError, match="a number in its state is shared by all lanes"):
        estimator.estimate(model, nn.MSELoss(), estimator.init(model, B), found)


@pytest.mark.parametrize("started", [True, False])
def test_neither_do_evaluate_and_online(started: bool) -> None:
    model, x, y = Clock(started=started), torch.randn(B * T, D), torch.randn(B * T, H)
    reset = torch.arange(B * T) == T + 4  # in lane 1
    stream = tbptt.ArrayStream(x, y, lanes=B, reset=reset)
    with pytest.raises(CapabilityError, match="shared by all lanes"):
        tbptt.evaluate(model, nn.MSELoss(), stream)
    online = tbptt.Online(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), 0.1), tbptt.TBPTT(1, 4), lanes=B)
    for step in range(4):
        online.learn_one(x[step : step + B], y[step : step + B])
    online.reset()
    online.learn_one(x[:B], y[:B])  # all lanes together
    online.reset([False, True, False])
    with pytest.raises(CapabilityError, match="shared by all lanes"):
        online.predict_one(x[:B])
    with pytest.raises(CapabilityError, match="shared by all lanes"):
        online.learn_one(x[:B], y[:B])
