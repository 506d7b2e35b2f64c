"""Autocast around a loop: states keep their types, gradients are of the weights of today, and cross boundaries."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import tbptt
from tbptt.model import find_lane_dims
from tbptt.tree import Tree, tensors
from tbptt.unroll import unroll

T, B = 32, 2
INPUTS = torch.linspace(-3, 3, T * B * 3).view(T, B, 3).sin()
TARGETS = torch.linspace(-2, 2, T * B).view(T, B, 1).cos()


class Read(nn.Module):
    """A core with a read-out."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core, self.read = core, nn.Linear(8, 1)

    def forward(self, inputs: Tensor, state: Tree | None = None) -> tuple[Tensor, Tree]:
        outputs, state = self.core(inputs, state)
        return self.read(outputs), state


class Narrowed(nn.Module):
    """A cell whose state comes back in whatever type autocast makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.read = nn.Linear(11, 8), nn.Linear(8, 1)

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state = inputs.new_zeros(inputs.shape[1], 8) if state is None else state
        rows = []
        for each in inputs:
            state = torch.tanh(self.cell(torch.cat([each, state], -1)))
            rows.append(self.read(state))
        return torch.stack(rows), state


MODELS: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: Read(nn.LSTM(3, 8)),
    "GRU": lambda: Read(nn.GRU(3, 8)),
    "scanned": lambda: Read(tbptt.scan(nn.GRUCell(3, 8))),
    "narrowed": Narrowed,
}

ESTIMATORS = {
    "within": tbptt.TBPTT(8, 8),
    "tail": tbptt.TBPTT(8, 4),
    "all": tbptt.TBPTT(8, 4, losses="all"),
    "recompute": tbptt.TBPTT(4, 10),
    "retain": tbptt.TBPTT(4, 10, replay="retain"),
    "full": tbptt.FullBPTT(8, segment=4),
}


def autocast(on: bool = True) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=on)


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind]()


def over(model: nn.Module, estimator: tbptt.Estimator, steps: int) -> tuple[tbptt.Estimate, list[set[torch.dtype]]]:
    """The last estimate, and the types of each carried state."""
    carry, estimate, types = estimator.init(model, B), None, []
    for begin in range(0, T, steps):
        window = tbptt.Window(INPUTS[begin : begin + steps], TARGETS[begin : begin + steps])
        estimate, carry = estimator.estimate(model, nn.MSELoss(), carry, window)
        types.append({leaf.dtype for leaf in tensors(carry.state)})
    assert estimate is not None
    return estimate, types


def apart(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    pairs = [(each.flatten(), found[name].flatten()) for name, each in wanted.items()]
    one, two = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])
    return float((one - two).norm() / one.norm())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_a_state_keeps_its_type_and_gradients_are_nearly_those_of_float32(kind: str, estimator) -> None:
    model = made(kind)
    wanted, _ = over(model, estimator, estimator.k1)
    with autocast():
        found, types = over(model, estimator, estimator.k1)
    assert types == [{torch.float32}] * len(types)
    assert all(each.dtype is torch.float32 for each in found.gradients.values())
    assert 0 < apart(wanted.gradients, found.gradients) < 0.02
    assert found.lookback == wanted.lookback
    if len(wanted.boundary_norms):  # as much crosses
        torch.testing.assert_close(found.boundary_norms, wanted.boundary_norms, rtol=0.05, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_nothing_that_was_run_before_is_left_in_the_gradient(kind: str, estimator) -> None:
    """Autocast keeps casts of the weights: of the weights of then, and, from a run without a graph, without a graph."""
    model = made(kind)
    with autocast():
        wanted, _ = over(model, estimator, estimator.k1)
    with autocast():
        window = tbptt.Window(INPUTS[:8], TARGETS[:8])
        with torch.no_grad():
            for value in model.parameters():
                value.add_(1)
            unroll(model, window, None, None)
            find_lane_dims(model, INPUTS)
            model(INPUTS)
            for value, own in zip(model.parameters(), made(kind).parameters(), strict=True):
                value.copy_(own)
        found, _ = over(model, estimator, estimator.k1)
    assert all(torch.equal(each, found.gradients[name]) for name, each in wanted.gradients.items())


@pytest.mark.parametrize("kind", MODELS)
def test_a_run_again_is_the_run(kind: str) -> None:
    """With a graph or without one: what is run again from a state leads to the state that was carried."""
    model, window = made(kind), tbptt.Window(INPUTS)
    with autocast():
        outputs, state = unroll(model, window, None, None)
        with torch.no_grad():
            again, after = unroll(model, window, None, None)
            first = unroll(model, window[:20], None, None)[1]
        halves = unroll(model, window[20:], first, None)[1]
    torch.testing.assert_close(again, outputs, rtol=0, atol=0)
    for one, two, three in zip(tensors(state), tensors(after), tensors(halves), strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, three, rtol=0, atol=0)


def test_the_way_back_is_not_narrowed_once_more() -> None:
    """What a model computes in float32, autocast or not, has the gradient of float32."""

    class Exact(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(3, 8)

        def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
            with autocast(on=False):
                rows = [state := self.cell(each, state) for each in inputs]
            return torch.stack(rows)[..., :1], rows[-1]

    torch.manual_seed(0)
    model = Exact()
    for estimator in ESTIMATORS.values():
        wanted, _ = over(model, estimator, estimator.k1)
        with autocast():
            found, _ = over(model, estimator, estimator.k1)
        assert all(torch.equal(each, found.gradients[name]) for name, each in wanted.gradients.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("around", [False, True])
def test_a_model_of_16_bits_keeps_its_own_type(dtype: torch.dtype, around: bool) -> None:
    if around and dtype is torch.float16:
        pytest.skip("autocast is of bfloat16 here: what it makes of float16 is no question of states")
    model = made("narrowed").to(dtype)
    with autocast() if around else nullcontext():
        _, state = unroll(model, tbptt.Window(INPUTS.to(dtype)), None, None)
        assert state.dtype is dtype
        assert unroll(model, tbptt.Window(INPUTS.to(dtype)), state, None)[1].dtype is dtype


def test_a_state_that_a_model_narrows_by_itself_is_left_so() -> None:
    """A cache in bfloat16 is the model's own choice, where it was not given in a wider type."""

    class Caches(Narrowed):
        def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
            outputs, state = super().forward(inputs, None if state is None else state.float())
            return outputs, state.bfloat16()

    _, state = unroll(Caches(), tbptt.Window(INPUTS), None, None)
    assert state.dtype is torch.bfloat16
    assert unroll(Caches(), tbptt.Window(INPUTS), state, None)[1].dtype is torch.bfloat16
    assert unroll(Caches(), tbptt.Window(INPUTS), state.float(), None)[1].dtype is torch.float32


class Single(Narrowed):
    """A cell that fixes float32 inside: it cannot be tried in double precision, and autocast narrows the rest of it."""

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state = inputs.new_zeros(inputs.shape[1], 8) if state is None else state
        rows = []
        for each in inputs:
            state = torch.tanh(self.cell(torch.cat([each, state], -1))).float()
            rows.append(self.read(state).float())
        return torch.stack(rows), state


class OnlyWithin(Single):
    """As kernels that take 16 bits only: it runs under autocast alone."""

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert self.cell(torch.zeros(1, 11)).dtype is torch.bfloat16
        return super().forward(inputs, state)


@pytest.mark.parametrize("build", [Narrowed, Single, OnlyWithin])
def test_check_within_autocast_judges_the_model_and_not_autocast(build: type[nn.Module]) -> None:
    for _ in range(3):
        with autocast():
            report = tbptt.check(build(), INPUTS[:24], tbptt.TBPTT(4, 8))
        assert report, report


def test_check_within_autocast_still_sees_a_fault() -> None:
    class Forgets(OnlyWithin):
        def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return super().forward(inputs, None)

    with autocast():
        report = tbptt.check(Forgets(), INPUTS[:24])
    assert "value carry" in [item.name for item in report.items if not item.passed], report


def recalled(where: str) -> float:
    """Return the loss after training on what was seen a step before, with autocast in one place or another."""
    torch.manual_seed(0)
    model = Narrowed()
    inputs = torch.randn(1600, 3)
    targets = inputs[:, :1] * 0.5 + inputs[:, 1:2].roll(1, 0)
    stream = tbptt.ArrayStream(inputs, targets, lanes=8)
    optimizer = torch.optim.Adam(model.parameters(), 3e-2)
    if where == "loop":
        estimator = tbptt.TBPTT(8, 8)
        with autocast():
            carry = estimator.init(model, 8)
            for _ in range(4):
                for window in stream.windows(8):
                    estimate, carry = estimator.estimate(model, nn.MSELoss(), carry, window)
                    estimate.apply(model)
                    optimizer.step()
                stream.rewind()
    else:
        trainer = tbptt.Trainer(model, nn.MSELoss(), optimizer, tbptt.TBPTT(8, 8), stream)
        with autocast(where == "run"):
            trainer.run(passes=4)
    stream.rewind()
    return tbptt.evaluate(model, nn.MSELoss(), stream)["loss"]


def test_autocast_around_a_whole_run_trains_as_well_as_none() -> None:
    """The bare loop and the trainer: the casts of the first update's weights were used in all, in silence."""
    losses = {where: recalled(where) for where in ("nowhere", "run", "loop")}
    assert losses["nowhere"] < 0.15
    assert abs(losses["run"] - losses["nowhere"]) < 0.05
    assert losses["loop"] == losses["run"]
