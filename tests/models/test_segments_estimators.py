"""Estimators on SegmentTransformer: that gradients go as far back as they are sent, and no farther."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import plain_segments as plain
import pytest
import torch
from segment_models import (
    INPUTS,
    OUTPUTS,
    SEGMENTS,
    B,
    S,
    apart,
    by_hand,
    data,
    each_kind,
    far_kind,
    last_estimate,
    losses,
    made,
    summed,
)
from torch import Tensor, nn

import tbptt
from tbptt.codec import decode, encode
from tbptt.models import SegmentState, SegmentTransformer
from tbptt.tree import tensors


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("replay", ["recompute", "retain"])
@pytest.mark.parametrize("lookback", [1, 2, 3, 4])
@far_kind
def test_tbptt_is_autograd_over_so_many_segments(kind: str, lookback: int, replay: Any) -> None:
    model, window = made(kind), data()
    estimate = last_estimate(tbptt.TBPTT(S, lookback * S, replay=replay), model, window)
    newest = SEGMENTS - 1
    assert apart(summed(estimate), by_hand(model, window, [newest], lookback)[2]) < 1e-10
    for other in {max(1, lookback - 1), lookback + 1} - {lookback}:  # the controls
        assert apart(summed(estimate), by_hand(model, window, [newest], other)[2]) > 1e-6


@pytest.mark.parametrize("lookback", [1, 3])
def test_tbptt_over_ids_and_windows_of_several_segments(lookback: int) -> None:
    model = made("both", embedding=5)
    ids = torch.randint(INPUTS, (6 * S, B))
    window = tbptt.Window(ids, torch.randn(6 * S, B, OUTPUTS).double())
    estimate = last_estimate(tbptt.TBPTT(2 * S, lookback * 2 * S), model, window, 2 * S)
    assert model.embedding is not None
    vectors = model.embedding.weight[ids]
    expected = by_hand(model, replace(window, inputs=vectors), [4, 5], 2 * lookback)[2]
    assert apart(summed(estimate), expected) < 1e-10
    assert apart(summed(estimate), by_hand(model, replace(window, inputs=vectors), [4, 5], 1)[2]) > 1e-6  # the control


class Gains(nn.Module):
    """The model with what each segment writes multiplied by a number of its own: its gradient is that of the write."""

    def __init__(self, model: SegmentTransformer) -> None:
        super().__init__()
        self.model = model
        self.gain = nn.Parameter(torch.ones(SEGMENTS).double())

    def initial_state(self, lanes: int) -> SegmentState:
        return self.model.initial_state(lanes)

    def forward(self, inputs: Any, state: Any = None) -> Any:
        values, number = inputs
        outputs = []
        for begin in range(0, len(values), S):
            piece, state = self.model(values[begin : begin + S], state)
            gain = self.gain[number[begin, 0]]
            tokens = None if state.tokens is None else state.tokens * gain
            state = state._replace(memory=tuple(each * gain for each in state.memory), tokens=tokens)
            outputs.append(piece)
        return torch.cat(outputs), state


@pytest.mark.parametrize("lookback", [1, 2, 3, 4, 5])
@far_kind
def test_nothing_older_than_the_look_back_has_a_gradient_and_all_inside_has(kind: str, lookback: int) -> None:
    model = Gains(made(kind))
    number = torch.arange(SEGMENTS).repeat_interleave(S)[:, None].expand(-1, B)
    window = replace(data(), inputs=(data().inputs, number))
    gradients = last_estimate(tbptt.TBPTT(S, lookback * S), model, window).gradients
    found = gradients.get("gain", torch.zeros_like(model.gain))
    inside = range(SEGMENTS - lookback, SEGMENTS - 1)  # the newest one's write is read by nobody
    assert [bool(each) for each in found.tolist()] == [segment in inside for segment in range(SEGMENTS)]
    full = losses(model(window.inputs)[0], window.targets)[-S:].sum()
    [through] = torch.autograd.grad(full, [model.gain])  # the control: without a cut all have one
    assert bool((through[:-1] != 0).all())


@each_kind
@pytest.mark.parametrize("checkpoints", [None, 2])
def test_full_bptt_is_autograd_over_all_segments(kind: str, checkpoints: int | None) -> None:
    model, window = made(kind), data()
    estimator = tbptt.FullBPTT(k1=SEGMENTS * S, segment=S, checkpoints=checkpoints)
    estimate = last_estimate(estimator, model, window, SEGMENTS * S)
    everywhere = range(SEGMENTS)
    assert apart(summed(estimate), by_hand(model, window, everywhere, SEGMENTS)[2]) < 1e-10
    assert apart(summed(estimate), by_hand(model, window, everywhere, SEGMENTS - 1)[2]) > 1e-6  # the control


class _Scale(torch.autograd.Function):
    """Nothing forward, a factor back."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient * ctx.factor, None


@each_kind
def test_artbp_scales_what_crosses_a_segment(kind: str) -> None:
    model, mean = made(kind), 4 * S
    estimator = next(
        each
        for each in (tbptt.ARTBP(mean_length=mean, block=S, seed=seed) for seed in range(100))
        if each.next_steps(each.init(model, B)) == 3 * S
    )
    window = data(3)
    estimate = last_estimate(estimator, model, window, 3 * S)

    def scaled(segment: int, past: plain.Past, alpha: float = 4.0) -> plain.Past:
        if not segment:
            return past
        factor = 1 / (1 - alpha / ((alpha - 1) * mean / S + segment))
        scale = [[_Scale.apply(row, factor) for row in rows] for rows in [*past.memory, past.tokens]]
        return plain.Past(scale[:-1], scale[-1])

    expected = by_hand(model, window, range(3), 3, scaled)[2]
    assert estimate.weight == mean * B
    assert apart(summed(estimate), expected) < 1e-10
    assert apart(summed(estimate), by_hand(model, window, range(3), 3)[2]) > 1e-3  # the control


def test_detached_memory_stops_gradients_at_each_segment_and_tokens_do_not() -> None:
    window = data()
    for kind, crosses in (("memory", False), ("both", True)):
        model = made(kind, memory_gradient=False)
        found = {k: summed(last_estimate(tbptt.TBPTT(S, k * S), model, window)) for k in (1, 3)}
        assert apart(found[3], by_hand(model, window, [SEGMENTS - 1], 3)[2]) < 1e-10
        assert (apart(found[3], found[1]) > 1e-6) is crosses
        assert apart(found[3], by_hand(model, window, [SEGMENTS - 1], 3, detached=False)[2]) > 1e-6  # the control


@each_kind
def test_a_saved_carry_goes_on_to_the_bit(kind: str) -> None:
    model, window, estimator = made(kind), data(), tbptt.TBPTT(S, 3 * S)
    carry = estimator.init(model, B)
    for begin in (0, S, 2 * S):
        _, carry = estimator.estimate(model, losses, carry, window[begin : begin + S])
    stored: dict[str, Tensor] = {}
    written = encode(carry.state_dict(), "carry", stored)
    again = estimator.init(model, B)
    again.load_state_dict(decode(written, {name: each.clone() for name, each in stored.items()}))
    one, two = (estimator.estimate(model, losses, each, window[3 * S : 4 * S]) for each in (carry, again))
    assert isinstance(two[1].state, SegmentState)
    assert all(a.equal(b) for a, b in zip(tensors(one[1].state), tensors(two[1].state), strict=True))
    assert all(one[0].gradients[name].equal(two[0].gradients[name]) for name in one[0].gradients)
    fresh = estimator.estimate(model, losses, estimator.init(model, B), window[3 * S : 4 * S])[0]
    assert not all(one[0].gradients[name].equal(fresh.gradients[name]) for name in one[0].gradients)  # the control
