"""Each wrong input is refused, with what was expected, what came, and what to do about it."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tbptt
from tbptt import TBPTT, Window
from tbptt.errors import CapabilityError, ConfigError, ShapeError, TbpttError

D, H, B = 2, 3, 2


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(-1)


def window(steps: int, lanes: int = B) -> Window:
    return Window(torch.randn(steps, lanes, D), torch.randn(steps, lanes, H))


def refusal(caught: pytest.ExceptionInfo[Any], *parts: str, fix: str) -> None:
    """Assert that the message says all of `parts`, and that its hint holds `fix`."""
    assert isinstance(caught.value, TbpttError)
    message, _, hint = str(caught.value).partition("\nhint: ")
    for part in parts:
        assert part in message
    assert fix in hint


@pytest.mark.parametrize("name", ["k1", "k2"])
@pytest.mark.parametrize("value", [0, -1, -64, 8.0, 8.5, True, "8", None, Fraction(8), float("nan"), float("inf")])
def test_lengths_that_cannot_be_meant(name: str, value: object) -> None:
    lengths: dict[str, Any] = {"k1": 4, "k2": 4} | {name: value}
    with pytest.raises(ConfigError) as caught:
        TBPTT(**lengths)
    refusal(caught, f"{name} was expected to be a whole number of steps, at least 1", repr(value), fix="k1=64, k2=64")
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("name", "value", "choices"),
    [
        ("losses", "last", '"tail" or "all"'),
        ("losses", "", '"tail" or "all"'),
        ("losses", None, '"tail" or "all"'),
        ("replay", "mixed", '"recompute" or "retain"'),
        ("replay", "Retain", '"recompute" or "retain"'),
        ("replay", True, '"recompute" or "retain"'),
    ],
)
def test_unknown_choices(name: str, value: object, choices: str) -> None:
    choice: dict[str, Any] = {name: value}
    with pytest.raises(ConfigError) as caught:
        TBPTT(4, 8, **choice)
    refusal(caught, f"{name} was expected to be {choices}", repr(value), fix=f"TBPTT(4, 8, {name}=")


@pytest.mark.parametrize("estimator", [TBPTT(4, 4), TBPTT(4, 2), TBPTT(4, 9), TBPTT(4, 9, replay="retain")])
class TestWindows:
    def test_longer_than_k1(self, estimator: TBPTT) -> None:
        model = nn.GRU(D, H)
        with pytest.raises(ShapeError) as caught:
            estimator.estimate(model, squared, estimator.init(model, B), window(5))
        refusal(caught, "at most k1 = 4 steps was expected, but 5 came", fix=f"TBPTT(k1=5, k2={estimator.k2})")

    def test_of_other_lanes(self, estimator: TBPTT) -> None:
        model = nn.GRU(D, H)
        _, carry = estimator.estimate(model, squared, estimator.init(model, B), window(4))
        for lanes in (1, 3):
            with pytest.raises(ShapeError) as caught:
                estimator.estimate(model, squared, carry, window(4, lanes))
            refusal(caught, f"a window of {B} lanes was expected", f"but {lanes} came", fix=f"lanes={lanes}")
        estimator.estimate(model, squared, carry, window(4))  # and nothing is lost

    def test_a_model_that_returns_one_value(self, estimator: TBPTT) -> None:
        class One(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lift = nn.Linear(D, H)

            def forward(self, inputs: Tensor, state: Tensor | None = None) -> Tensor:
                del state  # that is the fault
                return self.lift(inputs)

        model = One()
        with pytest.raises(CapabilityError) as caught:
            estimator.estimate(model, squared, estimator.init(model, B), window(4))
        refusal(
            caught,
            "One(inputs, state) was expected to return (outputs, state)",
            "one Tensor",
            fix="return outputs, state",
        )

    def test_a_model_that_returns_three_values(self, estimator: TBPTT) -> None:
        class Three(nn.GRU):
            def forward(self, inputs: Tensor, state: Tensor | None = None) -> Any:
                outputs, state = super().forward(inputs, state)
                return outputs, state, None

        model = Three(D, H)
        with pytest.raises(CapabilityError, match="but returned a tuple of 3"):
            estimator.estimate(model, squared, estimator.init(model, B), window(4))

    @pytest.mark.parametrize("extra", [-1, 1])
    def test_a_state_whose_lanes_change(self, estimator: TBPTT, extra: int) -> None:
        class Changing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.core = nn.GRU(D, H)

            def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
                outputs, state = self.core(inputs, state)
                if len(inputs) > 1:  # not yet when it is found out where the lanes are
                    state = state[:, :extra] if extra < 0 else torch.cat([state, state[:, :extra]], 1)
                return outputs, state

        model = Changing()
        with pytest.raises(ShapeError) as caught:
            estimator.estimate(model, squared, estimator.init(model, B), window(4))
        refusal(
            caught,
            f"expected to have {B} lanes in dimension 1",
            f"(1, {B + extra}, {H})",
            fix="keep the lane dimension",
        )

    def test_a_state_that_changes_its_structure(self, estimator: TBPTT) -> None:
        class Growing(nn.GRU):
            tensors = 1

            def forward(self, inputs: Tensor, state: Any = None) -> Any:
                outputs, last = super().forward(inputs, None if state is None else state[0])
                return outputs, [last] * self.tensors

        model, part = Growing(D, H), window(4)
        reset = torch.zeros(4, B, dtype=torch.bool)
        reset[3, 1] = True
        single = Window(part.inputs, part.targets, reset=reset)
        carry = estimator.init(model, B).with_dims(model, single)
        model.tensors = 2  # once it was found out where the lanes are
        with pytest.raises(ShapeError) as caught:
            estimator.estimate(model, squared, carry, single)
        refusal(caught, "had 1 tensors", "now has 2", fix="same structure")

    @pytest.mark.parametrize(
        ("averaged", "came"),
        [
            (lambda outputs, targets: squared(outputs, targets).mean(), "shape ()"),
            (lambda outputs, targets: squared(outputs, targets).mean(1), "shape (T,)"),
            (lambda outputs, targets: squared(outputs, targets).mean(0), f"shape ({B},)"),
            (lambda outputs, targets: (outputs - targets).square(), f"shape (T, {B}, {H})"),
            (lambda outputs, targets: float(squared(outputs, targets).detach().sum()), "a float"),
        ],
        ids=["scalar", "over lanes", "over steps", "elements", "number"],
    )
    def test_a_loss_averaged_by_hand(self, estimator: TBPTT, averaged: Any, came: str) -> None:
        model = nn.GRU(D, H)
        with pytest.raises(ShapeError) as caught:
            estimator.estimate(model, averaged, estimator.init(model, B), window(4))
        # The first piece that is run: the head of the window, or up to where a later look-back will begin.
        steps = 2 if estimator.k2 == 2 else 3 if estimator.k2 > estimator.k1 else 4
        came = came.replace("T", str(steps))
        refusal(caught, "one value for each step and lane", came, "already averaged", fix='reduction="none"')


@pytest.mark.parametrize(
    ("model", "expected", "fix"),
    [
        (lambda inputs, state: (inputs, state), "an nn.Module was expected, but a function came", "tbptt.scan"),
        (
            nn.GRU(D, H, batch_first=True),
            "batch_first=True, but windows are time first",
            "tbptt.stateful(model, batch_first=True)",
        ),
        (nn.LSTM(D, H, bidirectional=True), "needs the future", "bidirectional=False"),
        (nn.RNN(D, H).requires_grad_(False), "no parameter that requires a gradient", ""),
    ],
    ids=["function", "batch first", "bidirectional", "frozen"],
)
def test_models_that_cannot_be_trained_in_windows(model: Any, expected: str, fix: str) -> None:
    with pytest.raises(CapabilityError) as caught:
        TBPTT(4, 4).init(model, B)
    refusal(caught, expected, fix=fix)


def test_a_cell_that_cannot_be_called() -> None:
    with pytest.raises(CapabilityError, match="but a int came"):
        tbptt.scan(3)


def test_single_lanes_cannot_be_reset_where_the_lanes_are_not_known() -> None:
    class Fixed(nn.GRU):
        """Takes B lanes and no other number."""

        def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return super().forward(inputs.view(len(inputs), B, D), state)

    model, estimator = Fixed(D, H), TBPTT(4, 4)
    part, reset = window(4), torch.zeros(4, B, dtype=torch.bool)
    reset[2] = True
    every = Window(part.inputs, part.targets, reset=reset.clone())
    estimator.estimate(model, squared, estimator.init(model, B), every)  # all lanes at once need no lane dimension
    reset[2, 1] = False
    single = Window(part.inputs, part.targets, reset=reset)
    with pytest.raises(CapabilityError) as caught:
        estimator.estimate(model, squared, estimator.init(model, B), single)
    refusal(caught, "reset at step 2", "one lane more", fix="reset all lanes at the same step")
