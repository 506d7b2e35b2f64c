"""Models: a scanned cell is its loop, and the lanes of a state are found without leaving a trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tbptt
from tbptt.errors import CapabilityError, ShapeError
from tbptt.estimators import TBPTT, ChainCarry
from tbptt.model import (
    find_lane_dims,
    initial_state,
    named_parameters,
    split_result,
    trainable_parameters,
    with_parameters,
)
from tbptt.window import Window

T, B, D, H = 5, 3, 2, 4


class Cell(nn.Module):
    """A cell with tree-shaped inputs, outputs and state, and a start of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(D + H, H)
        self.start = nn.Parameter(torch.randn(H))

    def initial_state(self, lanes: int) -> dict[str, Tensor]:
        return {"h": self.start.expand(lanes, H)}

    def forward(self, inputs: dict[str, Tensor], state: dict[str, Tensor]) -> Any:
        h = torch.tanh(self.mix(torch.cat([inputs["x"], state["h"]], -1))) * inputs["gate"][:, None]
        return (h * 2, {"sum": h.sum(-1)}), {"h": h}


@pytest.mark.parametrize("kind", [(nn.LSTMCell, nn.LSTM), (nn.GRUCell, nn.GRU), (nn.RNNCell, nn.RNN)])
def test_torchs_cells_become_torchs_layers(kind: Any) -> None:
    torch.manual_seed(0)
    cell, layer = kind[0](D, H), kind[1](D, H)
    layer.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    model, inputs = tbptt.scan(cell), torch.randn(T, B, D)
    outputs, state = model(inputs)
    wanted, last = layer(inputs)
    torch.testing.assert_close(outputs, wanted)
    for a, b in zip(tbptt.tree.tensors(state), tbptt.tree.tensors(last), strict=True):
        torch.testing.assert_close(a, b[0])
    first, middle = model(inputs[:2])
    second, _ = model(inputs[2:], middle)
    torch.testing.assert_close(torch.cat([first, second]), outputs)
    assert not torch.allclose(model(inputs[2:])[0], outputs[2:])  # the control: the state matters


def test_a_scanned_cell_is_its_loop() -> None:
    torch.manual_seed(0)
    cell = Cell()
    model = tbptt.scan(cell)
    inputs = {"x": torch.randn(T, B, D), "gate": torch.rand(T, B)}
    (doubled, more), state = model(inputs, initial_state(model, B))
    assert (doubled.shape, more["sum"].shape, state["h"].shape) == ((T, B, H), (T, B), (B, H))
    h = cell.start.expand(B, H)
    for step in range(T):
        h = torch.tanh(cell.mix(torch.cat([inputs["x"][step], h], -1))) * inputs["gate"][step][:, None]
        torch.testing.assert_close(doubled[step], 2 * h)
        torch.testing.assert_close(more["sum"][step], h.sum(-1))
    torch.testing.assert_close(state["h"], h)


def test_only_a_cell_with_a_start_of_its_own_has_one() -> None:
    model = tbptt.scan(Cell())
    start = initial_state(model, 7)
    assert torch.equal(start["h"], model.cell.start.expand(7, H))
    assert start["h"].requires_grad
    assert initial_state(tbptt.scan(nn.GRUCell(D, H)), 7) is None
    assert initial_state(nn.GRU(D, H), 7) is None


def test_what_is_no_pair_is_refused() -> None:
    model = nn.Linear(2, 2)
    for result, came in [(torch.zeros(2), "one Tensor"), ((1, 2, 3), "a tuple of 3"), ([1, 2], "one list")]:
        with pytest.raises(CapabilityError, match=f"but returned {came}"):
            split_result(model, result)
    with pytest.raises(CapabilityError, match=r"<lambda>|function"):
        tbptt.scan(lambda inputs, state: inputs)(torch.zeros(T, B, D))


def test_other_parameters_are_used_and_put_back() -> None:
    torch.manual_seed(0)
    model, inputs = nn.GRU(D, H), torch.randn(T, B, D)
    own = trainable_parameters(model)
    others = {name: value.detach().clone().mul_(2).requires_grad_() for name, value in own.items()}
    before = model(inputs)[0]
    inside = with_parameters(model, others, lambda: model(inputs)[0])
    assert not torch.allclose(inside, before)
    found = torch.autograd.grad(inside.sum(), list(others.values()))
    assert all(each.any() for each in found)
    assert torch.equal(model(inputs)[0], before)
    assert all(value is own[name] for name, value in model.named_parameters())


class BatchFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = nn.GRU(D, H, batch_first=True)

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state = None if state is None else state.transpose(0, 1).contiguous()
        outputs, state = self.core(inputs.transpose(0, 1), state)
        return outputs.transpose(0, 1), state.transpose(0, 1)  # state (B, layers, H)


class Strange(nn.Module):
    """A state of many kinds, dropout, a normalisation with buffers, and a leaf that all lanes share."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.LSTM(D, H, num_layers=2, dropout=0.5)
        self.norm = nn.BatchNorm1d(H)

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        outputs, fast = self.core(inputs, None if state is None else state["fast"])
        outputs = self.norm(outputs.flatten(0, 1)).view_as(outputs) + torch.rand(())
        lanes = inputs.shape[1]
        more = [torch.zeros(7, 2, lanes), None, torch.zeros(lanes).long(), torch.zeros(lanes * 2, H)]
        return outputs, {"fast": fast, "clock": torch.zeros(()), "table": torch.zeros(H, H), "more": more}


@pytest.mark.parametrize(
    ("model", "dims"),
    [
        (nn.LSTM(D, H, num_layers=2), (1, 1)),
        (nn.GRU(D, H), (1,)),
        (BatchFirst(), (0,)),
        (tbptt.scan(nn.LSTMCell(D, H)), (0, 0)),
        (Strange(), (None, 1, 1, 2, 0, None, None)),  # optree sorts the keys of a dict
    ],
    ids=["lstm", "gru", "batch first", "scan", "strange"],
)
@pytest.mark.parametrize("lanes", [1, 2, H, 7])
def test_lanes_are_found_and_no_trace_is_left(model: nn.Module, dims: tuple[int | None, ...], lanes: int) -> None:
    inputs = torch.randn(T, lanes, D)
    model.train(lanes > 1)  # a normalisation cannot be trained on one value
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    random, training = torch.get_rng_state(), model.training
    assert find_lane_dims(model, inputs) == dims
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert model.training == training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_buffers_really_change_in_a_run() -> None:
    """The control: what is restored above would otherwise have changed."""
    model = Strange()
    random, mean = torch.get_rng_state(), model.norm.running_mean.clone()
    model(torch.randn(1, B, D))
    assert not torch.equal(model.norm.running_mean, mean)
    assert not torch.equal(torch.get_rng_state(), random)


class InPairs(nn.GRU):
    """A model whose windows have an even number of steps."""

    def forward(self, inputs: Tensor, state: Any = None) -> Any:
        if len(inputs) % 2:
            raise ValueError("an even number of steps is needed")
        return super().forward(inputs, state)


def test_a_model_of_one_number_of_lanes_and_one_that_cannot_be_run() -> None:
    class Fixed(nn.GRU):
        def forward(self, inputs: Tensor, state: Any = None) -> Any:
            return super().forward(inputs.view(-1, B, D), state)

    assert find_lane_dims(Fixed(D, H), torch.zeros(T, B, D)) is None
    wrong = Window(torch.zeros(T, B, D + 1), torch.zeros(T, B, H))
    assert find_lane_dims(nn.GRU(D, H), wrong.inputs) is None
    with pytest.raises(RuntimeError, match=r"input\.size"):  # of the model itself, seen by the user
        TBPTT(T, T).estimate(nn.GRU(D, H), nn.MSELoss(), ChainCarry(B), wrong)
    assert find_lane_dims(InPairs(D, H), torch.zeros(4, B, D)) == (1,)  # not to be run for one step

    class Stateless(nn.Linear):
        def forward(self, inputs: Tensor, state: Any = None) -> Any:
            del state  # that is the fault
            return super().forward(inputs)

    with pytest.raises(CapabilityError, match=r"Stateless.* but returned one Tensor"):
        find_lane_dims(Stateless(D, H), torch.zeros(T, B, D))


def test_a_tensor_for_each_lane_is_refused() -> None:
    class Listed(nn.GRU):
        def forward(self, inputs: Tensor, state: Any = None) -> Any:
            outputs, last = super().forward(inputs, None if state is None else torch.cat(state, 1))
            return outputs, list(last.split(1, 1))

    with pytest.raises(ShapeError, match=f"has {B} tensors for {B} lanes and {B + 1} for {B + 1}"):
        find_lane_dims(Listed(D, H), torch.zeros(T, B, D))


def test_named_parameters_are_torchs_own() -> None:
    shared = nn.Linear(3, 3)
    tied = nn.Linear(3, 3)
    tied.weight = shared.weight
    deep = nn.Sequential(nn.LSTM(3, 3, num_layers=2), nn.ModuleDict({"a": shared, "b": tied, "c": shared}))
    deep.own = nn.Parameter(torch.zeros(2))
    deep.register_parameter("none", None)
    for model in (deep, nn.GRU(2, 2), nn.Linear(1, 1, bias=False)):
        assert list(named_parameters(model)) == [name for name, _ in model.named_parameters()]
        assert all(value is model.get_parameter(name) for name, value in named_parameters(model).items())
