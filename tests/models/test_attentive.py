"""Attentive: that it is torch's own layer with a memory beside it, what is stored, and what is looked up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tbptt
from tbptt import TBPTT, Window
from tbptt.errors import CapabilityError, ConfigError, ShapeError
from tbptt.models import Attentive

D, H, B, T = 3, 5, 3, 46
CORES = {"lstm": nn.LSTM, "gru": nn.GRU}


@pytest.mark.parametrize("core", CORES)
def test_a_layer_carries_its_state(core: str) -> None:
    """Values and gradients over every way of cutting, lanes alone, one lane that starts anew while others are full."""
    torch.manual_seed(0)
    layer = Attentive(CORES[core](D, H), k_att=3, k_top=2, memory=3)
    report = tbptt.check(layer, torch.randn(30, B, D), TBPTT(4, 12))
    assert report, report
    assert "measured" in str(report)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("core", CORES)
def test_with_nothing_stored_it_is_torchs_own_layer(core: str, bias: bool) -> None:
    torch.manual_seed(0)
    own = CORES[core](D, H, bias=bias).double()
    inputs = torch.randn(12, B, D).double()
    wanted, _ = own(inputs)
    for k_att, alike in ((12, True), (2, False)):  # with 12 the first one is stored at the last step
        outputs, _ = Attentive(own, k_att=k_att, k_top=2, memory=4).double()(inputs)
        assert torch.allclose(outputs[..., :H], wanted, rtol=1e-12, atol=1e-14) == alike
        assert bool(outputs[..., H:].any()) != alike


def test_a_state_of_other_lanes_is_refused() -> None:
    layer = Attentive(nn.GRU(D, H), memory=8)
    _, state = layer(torch.zeros(2, B + 1, D))
    with pytest.raises(ShapeError, match=r"\(3, 8, 5\).* was expected, but .*\(4, 8, 5\).* came"):
        layer(torch.zeros(2, B, D), state)
    with pytest.raises(ShapeError, match="numbers of shape"):
        layer(torch.zeros(2, B, D + 1))


def test_a_memory_holds_the_newest_states() -> None:
    torch.manual_seed(0)
    layer = Attentive(nn.GRU(D, H), k_att=2, k_top=1, memory=3)
    inputs = torch.randn(11, B, D)
    states, state = [], None
    for step in inputs:
        outputs, state = layer(step[None], state)
        states.append(outputs[0, :, :H] - outputs[0, :, H:])  # ĥ: without what was looked up
    _, _, memory, steps = state
    assert steps.tolist() == [11] * B
    kept = {stored: bool(torch.isclose(memory, states[stored][:, None]).all(2).any(1).all()) for stored in range(11)}
    assert [stored for stored, there in kept.items() if there] == [5, 7, 9]


def test_lanes_that_started_at_other_steps_store_at_their_own() -> None:
    torch.manual_seed(0)
    model, inputs = Attentive(nn.LSTM(D, H), k_att=2, k_top=3, memory=6), torch.randn(T, B, D)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[7, 1] = True
    outputs, state = tbptt.unroll.unroll(model, Window(inputs, reset=reset), None, (0, 0, 0, 0))
    alone, last = model(inputs[7:, 1:2])
    torch.testing.assert_close(outputs[7:, 1:2], alone)
    assert state[3].tolist() == [T, T - 7, T]
    torch.testing.assert_close(state[2][1], last[2][0])
    uncut, _ = model(inputs)
    torch.testing.assert_close(outputs[:, [0, 2]], uncut[:, [0, 2]])
    assert not torch.allclose(outputs[7:, 1], uncut[7:, 1])


def test_memories_alike_have_a_finite_gradient() -> None:
    """Nothing is fed in, so that all memories become the same: equal scores divide by nothing."""
    torch.manual_seed(0)  # with some weights it takes longer until they are
    layer = Attentive(nn.LSTM(1, 4), k_att=1, k_top=2, memory=8)
    outputs, _ = layer(torch.zeros(200, 1, 1))
    outputs.square().sum().backward()
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in layer.parameters())
    assert bool((outputs[-1] - outputs[-2]).abs().max() < 1e-6)  # they are alike


@pytest.mark.parametrize("core", CORES)
def test_states_do_not_grow_with_the_stream(core: str) -> None:
    torch.manual_seed(0)
    layer = Attentive(CORES[core](1, 8), k_att=1, k_top=2, memory=8)
    with torch.no_grad():
        outputs, _ = layer(torch.ones(2000, 1, 1))
    assert float(outputs.abs().max()) <= 2.0
    assert float(outputs.abs().max()) > 0.01


def test_what_is_looked_up_depends_on_what_is_asked() -> None:
    """The same memories, another state: another order of scores."""
    torch.manual_seed(0)
    layer = Attentive(nn.GRU(D, H), k_att=1, k_top=1, memory=4)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(3.0)
        _, (h, s, memory, steps) = layer(torch.randn(4, 1, D))
        asked = torch.randn(200, 1, D)
        chosen = {tuple(layer(each[None], (h, s, memory, steps))[0][0, 0, H:].tolist()) for each in asked}
    assert len(chosen) > 1
    assert len(chosen) <= 4


@pytest.mark.parametrize(
    ("core", "settings", "error", "message"),
    [
        (nn.GRU(2, 3), {"k_att": 0}, ConfigError, "k_att was expected"),
        (nn.GRU(2, 3), {"memory": 4.0}, ConfigError, "memory was expected"),
        (nn.GRU(2, 3), {"k_top": 5, "memory": 4}, ConfigError, "at least as many slots"),
        (nn.GRU(2, 3, num_layers=2), {}, CapabilityError, "num_layers=2"),
        (nn.GRU(2, 3, batch_first=True), {}, CapabilityError, "batch_first=True"),
        (nn.LSTM(2, 3, bidirectional=True), {}, CapabilityError, "bidirectional=True"),
        (nn.LSTM(2, 3, proj_size=2), {}, CapabilityError, "proj_size=2"),
        (nn.RNN(2, 3), {}, CapabilityError, "nn.LSTM or nn.GRU was expected, but a RNN"),
    ],
)
def test_cores_and_sizes_that_cannot_be_meant_are_refused(
    core: Any, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        Attentive(core, **settings)
    assert "hint:" in str(caught.value)
