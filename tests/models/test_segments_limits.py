"""Estimators on SegmentTransformer, where they are plain autograd: at their exact limits, and in the mean of draws."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import plain_segments as plain
import pytest
import torch
from segment_models import (
    INPUTS,
    SEGMENTS,
    B,
    S,
    apart,
    by_hand,
    by_lane,
    data,
    far_kind,
    last_estimate,
    losses,
    made,
    summed,
)
from torch import Tensor, nn

import tbptt
from tbptt import ARTBP, RTRL, TBPTT, FullBPTT, Mixture, SyntheticGradients, Telescope
from tbptt.models import SegmentTransformer
from tbptt.tree import tensors

T, EVERYWHERE, NEWEST = SEGMENTS * S, tuple(range(SEGMENTS)), (SEGMENTS - 1,)

# The steps of a window, the segments whose losses the last one injects, how many of them its gradient goes back over,
# and the segments before which it ends as well.
LIMITS: dict[str, tuple[tbptt.Estimator, int, tuple[int, ...], int, tuple[int, ...]]] = {
    "recompute": (TBPTT(S, 3 * S), S, NEWEST, 3, ()),
    "retain": (TBPTT(S, 3 * S, replay="retain"), S, NEWEST, 3, ()),
    "windows of two": (TBPTT(2 * S, 3 * S), 2 * S, NEWEST, 3, ()),
    "windows of two, retain": (TBPTT(2 * S, 3 * S, replay="retain"), 2 * S, NEWEST, 3, ()),
    "tail": (TBPTT(T, 2 * S), T, (SEGMENTS - 2, SEGMENTS - 1), 2, ()),
    "all": (TBPTT(T, 2 * S, losses="all"), T, EVERYWHERE, SEGMENTS, (2, 4)),
    "full": (FullBPTT(T, segment=S, checkpoints=2), T, EVERYWHERE, SEGMENTS, ()),
    "full, two at a time": (FullBPTT(T, segment=2 * S), T, EVERYWHERE, SEGMENTS, ()),
    "full, an update a segment": (FullBPTT(S, segment=S), S, NEWEST, SEGMENTS, ()),
    "never cut": (ARTBP(math.inf, longest=T, block=S), T, EVERYWHERE, SEGMENTS, ()),
    "always all": (Mixture(S, S, None, 1.0), S, NEWEST, SEGMENTS, ()),
    "always long": (Mixture(S, S, 3 * S, 1.0, segment=S), S, NEWEST, 3, ()),
    "always long, biased": (Mixture(S, S, 3 * S, 1.0, unbiased=False), S, NEWEST, 3, ()),
    "one length": (Telescope(S, (3 * S,)), S, NEWEST, 3, ()),
    "one length, single": (Telescope(S, (3 * S,), sampling="single", segment=S), S, NEWEST, 3, ()),
    "influence": (RTRL(S), S, NEWEST, SEGMENTS, ()),
    "influence, windows of two": (RTRL(2 * S), 2 * S, NEWEST, SEGMENTS, ()),
    "nothing predicted": (SyntheticGradients(S), S, NEWEST, 1, ()),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@cache  # the same ones for many estimators
def autograd(
    kind: str, injected: tuple[int, ...], lookback: int, resets: tuple[tuple[int, int], ...], cuts: tuple[int, ...] = ()
) -> dict[str, Tensor]:
    """The gradient of the model and the data of `kind`, seeded as those of the tests are."""
    torch.manual_seed(0)
    model, window = made(kind), data()
    return by_lane(model, window, injected, lookback, resets=dict(resets), cuts=cuts)


@pytest.mark.parametrize("resets", [(), ((0, 3),)], ids=["no reset", "a lane starts anew"])
@pytest.mark.parametrize("name", LIMITS)
@far_kind
def test_at_its_limit_an_estimator_is_autograd(kind: str, name: str, resets: tuple[tuple[int, int], ...]) -> None:
    estimator, steps, injected, lookback, cuts = LIMITS[name]
    model, window = made(kind), data()
    reset = torch.zeros(T, B, dtype=torch.bool)
    for lane, segment in resets:
        reset[segment * S, lane] = True
    found = summed(last_estimate(estimator, model, replace(window, reset=reset), steps))
    assert apart(found, autograd(kind, injected, lookback, resets, cuts)) < 1e-10
    assert apart(found, autograd(kind, injected, lookback - 1 or 2, resets, cuts[1:])) > 1e-6  # the controls
    if lookback > 1:
        assert apart(found, autograd(kind, injected, lookback, () if resets else ((0, 3),), cuts)) > 1e-3


# In the mean


def cut_at(model: SegmentTransformer, window: tbptt.Window, pieces: tuple[int, ...]) -> dict[str, Tensor]:
    """The gradient of all losses with the graph cut between pieces of so many segments, and nothing made up for."""
    ends = {sum(pieces[:number]) for number in range(1, len(pieces))}

    def between(segment: int, past: plain.Past) -> plain.Past:
        return past.cut() if segment in ends else past

    return by_hand(model, window, range(sum(pieces)), sum(pieces), between)[2]


def pieces_of(
    estimator: ARTBP, model: SegmentTransformer, window: tbptt.Window
) -> tuple[tuple[int, ...], dict[str, Tensor]]:
    """The lengths of the stretches that were drawn, in segments, and the sum of their gradients."""
    carry, at, pieces = estimator.init(model, B), 0, list[int]()
    total = {name: torch.zeros_like(each) for name, each in model.named_parameters()}
    while at < window.steps:
        steps = min(estimator.next_steps(carry), window.steps - at)
        estimate, carry = estimator.estimate(model, losses, carry, window[at : at + steps])
        for name, each in summed(estimate).items():
            total[name] += each
        pieces.append(steps // S)
        at += steps
    return tuple(pieces), total


@pytest.mark.parametrize("alpha", [4.0, "constant"])
@far_kind
def test_the_mean_of_all_cuts_that_artbp_may_draw_is_the_full_gradient(kind: str, alpha: Any) -> None:
    """Each outcome with its probability, by hand: no bound, and no number of samples."""
    model, window, mean = made(kind), data(4), 2.0
    outcomes: dict[tuple[int, ...], dict[str, Tensor]] = {}
    for seed in range(200):
        pieces, gradient = pieces_of(ARTBP(mean * S, alpha=alpha, block=S, seed=seed), model, window)
        outcomes.setdefault(pieces, gradient)
        if len(outcomes) == 8:  # cut or not, after each of three segments
            break

    def rate(blocks: int) -> float:
        return 1 / mean if isinstance(alpha, str) else alpha / ((alpha - 1) * mean + blocks)

    def chance(pieces: tuple[int, ...]) -> float:
        kept = math.prod(1 - rate(blocks) for piece in pieces for blocks in range(1, piece))
        return kept * math.prod(rate(piece) for piece in pieces[:-1])

    def expected(gradients: dict[tuple[int, ...], dict[str, Tensor]]) -> dict[str, Tensor]:
        parts = [(chance(pieces), gradient) for pieces, gradient in gradients.items()]
        return {name: sum((by * each[name] for by, each in parts), torch.zeros(())) for name in parts[0][1]}

    assert sum(map(chance, outcomes)) == pytest.approx(1, abs=1e-12)
    full = by_hand(model, window, range(4), 4)[2]
    assert apart(expected(outcomes), full) < 1e-10
    unscaled = {pieces: cut_at(model, window, pieces) for pieces in outcomes}  # the control: nothing made up for
    assert apart(expected(unscaled), full) > 1e-3


@pytest.mark.parametrize(
    ("estimator", "chances", "lookback"),
    [
        (Mixture(S, S, None, 0.3), (0.7, 0.3), SEGMENTS),
        (Mixture(S, 2 * S, 4 * S, 0.3, segment=S), (0.7, 0.3), 4),
        (Telescope(S, (S, 2 * S, 4 * S), distribution=(0.5, 0.3, 0.2)), (0.5, 0.3, 0.2), 4),
        (Telescope(S, (S, 2 * S, 4 * S), sampling="single", distribution=(0.5, 0.3, 0.2)), (0.5, 0.3, 0.2), 4),
    ],
    ids=["Mixture of all", "Mixture", "roulette", "single"],
)
@far_kind
def test_the_mean_of_all_look_backs_that_may_be_drawn_is_that_of_the_longest(
    kind: str, estimator: Any, chances: tuple[float, ...], lookback: int
) -> None:
    model, window = made(kind), data()
    outcomes: dict[int, dict[str, Tensor]] = {}
    for seed in range(100):
        estimate = last_estimate(replace(estimator, seed=seed), model, window)
        outcomes.setdefault(int(estimate.metrics["drawn"]), summed(estimate))
        if len(outcomes) == len(chances):
            break
    names = {name: None for each in outcomes.values() for name in each}
    mean = {name: sum(chances[n] * each[name] for n, each in outcomes.items() if name in each) for name in names}
    assert apart(mean, by_hand(model, window, NEWEST, lookback)[2]) < 1e-10
    assert apart(mean, by_hand(model, window, NEWEST, lookback - 1)[2]) > 1e-6  # the control


# In half precision


class Autocast(nn.Module):
    """A model run in bfloat16, as mixed precision does it."""

    def __init__(self, model: SegmentTransformer) -> None:
        super().__init__()
        self.model = model

    def initial_state(self, lanes: int) -> Any:
        return self.model.initial_state(lanes)

    def forward(self, inputs: Tensor, state: Any = None) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            outputs, state = self.model(inputs, state)
        return outputs.float(), state


@pytest.mark.parametrize("replay", ["recompute", "retain"])
@far_kind
def test_autocast_goes_back_over_segments_and_carries_a_state_of_the_weights_own_type(kind: str, replay: Any) -> None:
    model = made(kind).float()
    window = tbptt.Window(torch.randn(T, B, INPUTS), torch.randn(T, B, 2))
    estimator, narrow = TBPTT(S, 3 * S, replay=replay), Autocast(model)
    carry = estimator.init(narrow, B)
    for begin in range(0, T, S):
        estimate, carry = estimator.estimate(narrow, losses, carry, window[begin : begin + S])
    assert {leaf.dtype for leaf in tensors(carry.state) if leaf.is_floating_point()} == {torch.float32}
    found = {name.removeprefix("model."): each for name, each in summed(estimate).items()}
    exact = summed(last_estimate(estimator, model, window))
    short = summed(last_estimate(TBPTT(S, S), model, window))
    assert 1e-4 < apart(found, exact) < 0.03  # it was narrower, and no more than that
    assert apart(found, short) > 0.03  # the control: a gradient cut off is farther away
