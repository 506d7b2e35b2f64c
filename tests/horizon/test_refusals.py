"""What no look-back can be recommended for is refused, in a sentence: no number is made of it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tbptt
from tbptt.errors import CheckError, ConfigError, NonFiniteError
from tbptt.horizon import measure
from tbptt.horizon.fresh import fresh_loss
from tbptt.horizon.recommend import Need
from tbptt.horizon.samples import places
from tbptt.loss import StepLoss

FAST: dict[str, Any] = {"max_lag": 24, "probes": 3, "costs": False, "lyapunov": False}


def array_stream(steps: int = 1000, lanes: int = 2, size: int = 3) -> tbptt.ArrayStream:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(steps * lanes + 1, size, generator=generator)
    return tbptt.ArrayStream(data[:-1], data[1:], lanes=lanes)


def trained(rate: float) -> tbptt.SequenceModel:
    torch.manual_seed(0)
    model = tbptt.SequenceModel(3, 3, hidden=8)
    adam = torch.optim.Adam(model.parameters(), rate)
    tbptt.Trainer(
        model, nn.MSELoss(), adam, tbptt.TBPTT(8, 8), array_stream(), monitors=[tbptt.Alarms(watch=())], checked=False
    ).run(updates=50)
    return model


# Runs that diverge


@pytest.mark.parametrize(("rate", "diverges"), [(1e3, True), (3e-3, False)])
def test_a_run_that_diverged_gets_a_sentence_and_no_number(rate: float, diverges: bool) -> None:
    report = measure(trained(rate), nn.MSELoss(), array_stream(), **FAST)
    assert report.has_diverged is diverges
    if not diverges:
        assert report.recommend(0.1).k2 >= 1
        return
    with pytest.raises(ConfigError, match="it has diverged, and its gradients say nothing") as refused:
        report.recommend(0.1)
    assert f"{report.loss:.4g}" in refused.value.message
    assert "lower learning rate" in refused.value.fix
    assert [note for note in report.notes if "has diverged" in note] == list(report.notes)


class Telling(nn.Module):
    """Says one number, whatever it sees; drawn anew it says two."""

    def __init__(self) -> None:
        super().__init__()
        self.say = nn.Parameter(torch.tensor(9.0))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.say, 2.0)

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        state = inputs.new_zeros(inputs.shape[1]) if state is None else state
        return torch.zeros_like(inputs) + self.say + 0 * state[:, None], state


def test_the_loss_of_fresh_weights_is_that_of_a_copy() -> None:
    model, stream, loss = Telling(), array_stream(), StepLoss.of(nn.MSELoss())
    found = places(model, loss, stream, 10, 4, 0, np.random.default_rng(0))
    targets = torch.stack([place.window.targets[-1] for place in found])
    wanted = (targets - 2.0).square().mean()
    assert fresh_loss(model, loss, found, 1) == pytest.approx(float(wanted), rel=1e-6)
    assert float(wanted) != pytest.approx(float((targets - 9.0).square().mean()), rel=0.5)  # the model's own
    assert model.say.item() == 9.0


def test_weights_that_nothing_draws_have_no_fresh_loss() -> None:
    model, loss = nn.Sequential(Telling()), StepLoss.of(nn.MSELoss())
    model.raw = nn.Parameter(torch.ones(1))  # of the container, which cannot draw it
    found = places(Telling(), loss, array_stream(), 10, 2, 0, np.random.default_rng(0))
    assert fresh_loss(model, loss, found, 1) != fresh_loss(model, loss, found, 1)  # nan


@pytest.mark.parametrize("name", ["weight_hh_l0", "bias_ih_l0"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(name: str, value: float) -> None:
    model = nn.GRU(3, 3)
    with torch.no_grad():
        getattr(model, name).view(-1)[0] = value
    with pytest.raises(NonFiniteError, match=f"stands in {name}: the model has diverged") as refused:
        measure(model, nn.MSELoss(), array_stream(), **FAST)
    assert "lower learning rate" in refused.value.fix


@pytest.mark.parametrize("probes", [1, 3])
def test_losses_that_are_not_finite(probes: int) -> None:
    def overflowing(outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets).square().sum(2) * 1e38) * 1e38

    settings = FAST | {"probes": probes}
    with pytest.raises(NonFiniteError, match=f"those of {probes} of {probes} probes hold NaN or infinity"):
        measure(nn.GRU(3, 3), overflowing, array_stream(), **settings)


# Models that fail `tbptt.check`


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = nn.GRU(3, 3)

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs, state = self.core(inputs)
        return outputs, torch.zeros_like(state)


class Detaching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = nn.GRU(3, 3)

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs, state = self.core(inputs, state)
        return outputs, state.detach()


@pytest.mark.parametrize(("kind", "cause"), [(Dropping, "forgets to pass its state on"), (Detaching, "it detaches")])
def test_a_model_that_fails_the_check(kind: type[nn.Module], cause: str) -> None:
    stream = array_stream()
    stream.read(5)
    place = stream.state_dict()
    with pytest.raises(CheckError, match=cause):
        measure(kind(), nn.MSELoss(), stream, **FAST)
    assert stream.state_dict() == place
    torch.manual_seed(0)  # the targets are noise, and what some weights make of more context is chance
    believed = measure(kind(), nn.MSELoss(), stream, checked=False, **FAST).recommend(0.1)
    assert believed.high is not None
    assert believed.high <= 2
    assert believed.k2 <= 2


# Streams that are too short


@pytest.mark.parametrize("steps", [20, 23, 47, 100])
def test_the_hint_for_a_short_stream_is_followed_and_helps(steps: int) -> None:
    model, stream = nn.GRU(3, 3), array_stream(steps)
    with pytest.raises(ConfigError, match=rf"to look 64 steps back, but one has {steps}:") as refused:
        measure(model, nn.MSELoss(), stream, probes=3, costs=False)
    assert "passes of at least 144 steps were expected" in refused.value.message
    room = int(re.findall(r"max_lag=(\d+)", refused.value.fix)[0])
    assert measure(model, nn.MSELoss(), stream, **FAST | {"max_lag": room}).max_lag == room


@pytest.mark.parametrize("steps", [1, 2, 19])
def test_streams_with_no_room_at_all(steps: int) -> None:
    with pytest.raises(ConfigError, match=f"but one has {steps}:") as refused:
        measure(nn.GRU(3, 3), nn.MSELoss(), array_stream(steps), probes=3, costs=False)
    assert refused.value.fix.startswith("more data, or fewer lanes")


# Only a trained model is near a minimum


@pytest.mark.parametrize(("trained_", "steps"), [(True, 7), (False, None)])
def test_the_context_decides_alone_only_for_a_trained_model(trained_: bool, steps: int | None) -> None:
    need = Need(by_mass=None, low=3, high=None, by_bias=0, by_context=7, longest=24, trained=trained_)
    assert need.is_settled is trained_
    assert need.steps == steps
