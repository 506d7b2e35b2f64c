"""The integer logic of TBPTT: each loss injected exactly once, look-backs as defined, nothing across a reset.

Every small case, and many drawn ones, against an account in plain lists (`counting.py`); all numbers are whole.
"""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import numpy as np
import pytest
from counting import Counting, Plain, Step, counted_loss, recorded

from tbptt import TBPTT, Adaptive, Choice, Curriculum, Ramp, RandomLength, Window

STEPS = 12


def steps_of(length: int, lanes: int, resets: set[tuple[int, int]]) -> list[Step]:
    """The loss of each step and lane has a binary digit of its own among those that may share an update."""
    return [
        Step(
            numbers=tuple(lane * length + step for lane in range(lanes)),
            weights=tuple(float(2 ** ((step % 12) * lanes + lane)) for lane in range(lanes)),
            spoiled=(False,) * lanes,
            resets=tuple((step, lane) in resets for lane in range(lanes)),
        )
        for step in range(length)
    ]


def check(estimator: TBPTT, steps: list[Step], stop: int | None = None) -> int:
    """Run one pass, window by window; return the number of updates. `stop`: the update after which it is resumed."""
    inputs, targets, resets = recorded(steps)
    lanes = inputs.shape[1]
    model, plain = Counting(len(steps) * lanes), Plain(len(steps) * lanes, estimator.losses)
    carry: Any = estimator.init(model, lanes)
    begin, updates = 0, 0
    while begin < len(steps):
        asked = estimator.next_steps(carry)
        end = min(begin + asked, len(steps))
        window = Window(inputs[begin:end], targets[begin:end], reset=resets[begin:end], start=begin)
        estimate, carry = estimator.estimate(model, counted_loss, carry, window)
        k1, k2 = (int(estimate.metrics.get(name, getattr(estimator, name))) for name in ("k1", "k2"))
        assert asked == k1
        news = len(plain.past)
        pieces = plain.pieces(end - begin, k1, k2)
        gradient = plain.update(steps[begin:end], k1, k2)
        assert gradient is not None
        found, wanted = (each * estimate.num_injected for each in (estimate.gradients["delta"].numpy(), gradient))
        about = f"{estimator}, steps {begin} to {end}, resets {resets.nonzero().tolist()}, stop {stop}"
        assert np.abs(found - np.rint(found)).max() < 1e-6, about  # whole numbers, but for the division by the count
        assert np.array_equal(np.rint(found), np.rint(wanted)), about
        assert estimate.num_injected == sum(last - first for _, first, last in pieces) * lanes, about
        assert estimate.lookback <= max(last - ends for ends, _, last in pieces), about
        if not resets[begin:end].any():
            reached = max(last - ends for ends, _, last in pieces)
            assert estimate.lookback == reached or resets[: begin + 1].any(), about
        assert news + end - begin == len(plain.past)
        begin, updates = end, updates + 1
        if updates == stop:
            saved = copy.deepcopy(carry.state_dict())
            carry = estimator.init(model, lanes)
            carry.load_state_dict(saved)
    return updates


def small_cases() -> list[tuple[TBPTT, int | None]]:
    found: list[tuple[TBPTT, int | None]] = []
    for k1, k2, reset in product(range(1, 7), range(1, 9), [None, *range(STEPS)]):
        if k2 <= k1:
            found += [(TBPTT(k1, k2, losses=losses), reset) for losses in ("tail", "all")]
        else:
            found += [(TBPTT(k1, k2, replay=replay), reset) for replay in ("recompute", "retain")]
    return found


SMALL = small_cases()


@pytest.mark.parametrize("part", [0, 7, *(pytest.param(each, marks=pytest.mark.slow) for each in range(1, 7))])
def test_every_small_case(part: int) -> None:
    """All k1 <= 6, k2 <= 8, T = 12, one lane, at most one reset, all `losses` and `replay`."""
    cases = SMALL[part::8]
    for estimator, reset in cases:
        check(estimator, steps_of(STEPS, 1, set() if reset is None else {(reset, 0)}))
    assert len(SMALL) == 48 * 2 * 13


def drawn_lengths(draws: np.random.Generator) -> dict[str, Any]:
    """A k1 and a k2, each a number or a policy, of every kind."""

    def one(least: int, most: int) -> Any:
        seed = int(draws.integers(1000))
        low, high = sorted(int(each) for each in draws.integers(least, most + 1, size=2))
        policies: list[Any] = [
            high,
            Ramp(low, high, over=int(draws.integers(1, 6))),
            Choice(sorted({low, high}), seed=seed),
            RandomLength(high, deviation=1.0, shortest=low, seed=seed),
            Curriculum([low, high], updates=2, mixed=bool(draws.integers(2)), seed=seed),
            Adaptive(tolerance=0.5, min=low, max=high, first=low, every=2),
        ]
        return policies[int(draws.integers(len(policies)))]

    k1 = one(1, 6)
    k2 = k1 if isinstance(k1, Adaptive) else one(1, 8)
    return {"k1": k1, "k2": k2}


def drawn_case(seed: int) -> None:
    draws = np.random.default_rng(seed)
    lanes, length = int(draws.integers(1, 3)), int(draws.integers(6, 16))
    resets = {(int(draws.integers(length)), int(draws.integers(lanes))) for _ in range(int(draws.integers(4)))}
    if draws.random() < 0.3 and resets:  # all lanes at one step
        step = min(resets)[0]
        resets |= {(step, lane) for lane in range(lanes)}
    fixed = draws.random() < 0.4
    lengths = {"k1": int(draws.integers(1, 7)), "k2": int(draws.integers(1, 9))} if fixed else drawn_lengths(draws)
    losses = ("tail", "all")[int(draws.integers(2))]
    replay = ("recompute", "retain")[int(draws.integers(2))] if fixed else "recompute"
    estimator = TBPTT(**lengths, losses=losses, replay=replay)
    stop = int(draws.integers(1, 5)) if draws.random() < 0.5 else None
    check(estimator, steps_of(length, lanes, resets), stop)


@pytest.mark.parametrize("part", range(4))
def test_drawn_cases(part: int) -> None:
    """Up to 3 resets, 2 lanes, every Length, a stop anywhere."""
    for seed in range(part, 400, 4):
        drawn_case(seed)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_20_000_drawn_cases(part: int) -> None:
    for seed in range(1000 + part, 21_000, 8):
        drawn_case(seed)


@pytest.mark.parametrize("wrong", ["twice", "one step too far", "across a reset"])
def test_the_account_sees_a_fault(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a look-back, a reset or an injection that is off by one does not pass."""
    steps = steps_of(STEPS, 1, {(1, 0)})
    check(TBPTT(3, 7), steps)
    if wrong == "twice":
        plain = Plain.pieces

        def pieces(self: Plain, num: int, k1: int, k2: int) -> list[tuple[int, int, int]]:
            return [(ends, max(0, first - 1), end) for ends, first, end in plain(self, num, k1, k2)]

        monkeypatch.setattr(Plain, "pieces", pieces)
    elif wrong == "one step too far":
        plain = Plain.pieces
        monkeypatch.setattr(Plain, "pieces", lambda self, num, k1, k2: plain(self, num, k1, k2 + 1))
    else:
        update = Plain.update

        def without(self: Plain, window: list[Step], k1: int, k2: int) -> Any:
            return update(self, [Step(s.numbers, s.weights, s.spoiled, (False,)) for s in window], k1, k2)

        monkeypatch.setattr(Plain, "update", without)
    with pytest.raises(AssertionError):
        check(TBPTT(3, 7), steps)
