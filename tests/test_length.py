"""Lengths that change: what each policy gives, where it ends, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tbptt import Adaptive, Choice, Curriculum, Length, Ramp, RandomLength, scaled_rate
from tbptt.curve import needed_lookback
from tbptt.errors import ConfigError
from tbptt.length import LengthState, parse_length

POLICIES: list[Length] = [
    Ramp(8, 64, over=100),
    Ramp(64, 8, over=100),
    Ramp(8, 64, over=100, shape="doubling"),
    Ramp(60, 7, over=100, shape="doubling"),
    Choice([4, 9, 30], weights=[3, 1, 0]),
    RandomLength(mean=20),
    RandomLength(mean=6, deviation=20, shortest=2),
    Adaptive(min=3, max=40),
    Adaptive(min=3, max=40, multiple=8),
    Ramp(48, 16, over=100, shape="doubling"),
    Ramp(24, 96, over=100, shape="doubling"),
    Curriculum([1, 2, 5], updates=100, segment=8),
    Curriculum([3, 6, 12], updates=[50, 100], mixed=True, seed=4),
    Curriculum([2, 1, 3], updates=20, enough=0.1, segment=4),
]


def drawn(policy: Length, updates: int) -> list[int]:
    state, found = policy.start(), []
    for _ in range(updates):
        found.append(policy.now(state))
        state = policy.after(state, found[-1])
        if isinstance(policy, Curriculum):
            state = policy.learned(state, None if policy.enough is None else 1.0)
    return found


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_no_length_leaves_the_bounds(policy: Length) -> None:
    lengths = drawn(policy, 400)
    assert policy.shortest <= min(lengths)
    assert max(lengths) <= policy.longest
    assert all(isinstance(each, int) for each in lengths)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_every_length_is_a_multiple_of_the_unit(policy: Length) -> None:
    lengths = set(drawn(policy, 400))
    assert all(each % policy.unit == 0 for each in lengths)
    if not isinstance(policy, Adaptive):  # one that would be larger would not be true
        assert policy.unit == 1 or math.gcd(*lengths) == policy.unit


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_length_depends_on_its_state_alone(policy: Length) -> None:
    torch.manual_seed(1)
    first = drawn(policy, 50)
    torch.manual_seed(2)
    np.random.default_rng().random(3)
    assert drawn(policy, 50) == first


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_policy_is_spelled_as_it_is_printed(policy: Length) -> None:
    assert parse_length(str(policy)) == policy


def test_a_saved_state_goes_on() -> None:
    policy = Adaptive(min=2, max=40, every=3)
    state, _ = policy.probed(policy.after(policy.start(), 10), [0.8**lag for lag in policy.lags])
    assert LengthState.from_state_dict(state.state_dict()) == state
    stages = Curriculum([1, 2], enough=0.1)
    state = stages.learned(stages.start(), 0.7)
    assert LengthState.from_state_dict(state.state_dict()) == state
    earlier = {name: value for name, value in state.state_dict().items() if name not in ("stage", "staged", "loss")}
    assert LengthState.from_state_dict(earlier) == LengthState()  # of a run begun before there were stages


def test_a_linear_ramp_is_a_line() -> None:
    ramp = Ramp(10, 110, over=100)
    assert [ramp.now(LengthState(u)) for u in (0, 1, 50, 99, 100, 10_000)] == [10, 11, 60, 109, 110, 110]


def test_a_doubling_ramp_doubles_and_halves() -> None:
    assert drawn(Ramp(8, 64, over=300, shape="doubling"), 301)[::100] == [8, 16, 32, 64]
    assert drawn(Ramp(64, 8, over=300, shape="doubling"), 301)[::100] == [64, 32, 16, 8]


def stages(policy: Curriculum, losses: list[float | None]) -> list[int]:
    state, found = policy.start(), []
    for loss in losses:
        found.append(policy.now(state))
        state = policy.learned(policy.after(state, 1), loss)
    return found


def test_a_curriculum_goes_on_after_its_updates() -> None:
    assert stages(Curriculum([1, 2, 4], updates=[2, 3], segment=8), [None] * 8) == [8, 8, 16, 16, 16, 32, 32, 32]
    assert stages(Curriculum([1, 2, 4], updates=2), [None] * 6) == [1, 1, 2, 2, 4, 4]
    assert stages(Curriculum([3]), [None] * 3) == [3, 3, 3]


def test_a_curriculum_goes_on_when_its_loss_is_low_enough() -> None:
    """A running mean over 50 updates, begun anew with each stage, which has 50 of them at least."""
    policy = Curriculum([1, 2, 3], enough=0.5)
    assert stages(policy, [0.4] * 120) == [1] * 50 + [2] * 50 + [3] * 20
    losses: list[float | None] = [2.0] * 60 + [0.0] * 100
    mean, needed = 2.0, 0  # of the plain mean, all of them 2, and then by 1/50 at each update
    while mean > 0.5:
        mean, needed = mean * (1 - 1 / 50), needed + 1
    assert stages(policy, losses) == [1] * (60 + needed) + [2] * (100 - needed)
    assert stages(policy, [0.6] * 200) == [1] * 200  # the control
    assert stages(Curriculum([1, 2], updates=70, enough=0.5), [0.6] * 80) == [1] * 70 + [2] * 10


def test_a_loss_that_is_no_number_does_not_end_a_stage_and_does_not_keep_it_for_ever() -> None:
    policy = Curriculum([1, 2], enough=0.5)
    assert stages(policy, [math.nan] * 80) == [1] * 80
    assert stages(policy, [0.4] * 30 + [math.nan, math.inf] + [0.4] * 30) == [1] * 50 + [2] * 12


def test_a_mixed_curriculum_draws_among_the_stages_so_far() -> None:
    found = stages(Curriculum([1, 2, 3], updates=300, mixed=True), [None] * 900)
    for stage in range(3):
        part = found[300 * stage : 300 * (stage + 1)]
        counts = [part.count(length) for length in range(1, 4)]
        assert counts[stage + 1 :] == [0] * (2 - stage)
        assert all(abs(each - 300 / (stage + 1)) < 45 for each in counts[: stage + 1])


def test_the_lengths_of_adaptive_are_rounded_up_to_whole_segments() -> None:
    """phi_k = beta^k needs ln(tolerance) / ln(beta) steps, 22 here.

    Within the first segment nothing is measured, and phi is taken to be as small as at its end: so that a little more
    is asked for, 25 steps, which are 4 segments.
    """
    plain, whole = Adaptive(tolerance=0.1, min=1, max=160), Adaptive(tolerance=0.1, min=1, max=160, multiple=8)
    assert all(lag % 8 == 0 for lag in whole.lags)
    needed = [each.needed(np.array([0.9**lag for lag in each.lags])) for each in (plain, whole)]
    assert needed == [22, 32]
    flat = np.array([0.9 ** max(lag, 8) for lag in range(161)])
    assert needed_lookback(flat, 0.1) == 25
    assert (whole.shortest, whole.longest, whole.unit) == (8, 160, 8)
    assert whole.needed(np.zeros(len(whole.lags))) == 8


def test_choice_draws_by_weight() -> None:
    lengths = drawn(Choice([16, 256], weights=[9, 1]), 4000)
    share = lengths.count(256) / 4000
    assert abs(share - 0.1) < 4 * math.sqrt(0.1 * 0.9 / 4000)


def test_random_lengths_are_those_of_awd_lstm() -> None:
    lengths = np.array(drawn(RandomLength(mean=70), 4000))
    half = lengths < 52
    assert abs(half.mean() - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 4000)
    assert abs(lengths[~half].mean() - 69.5) < 4 * 5 / math.sqrt(4000)  # int() takes half a step off
    assert abs(lengths[~half].std() - 5) < 0.3


def test_the_rate_follows_the_length() -> None:
    assert RandomLength(70).rate(35) == 0.5
    assert RandomLength(70, scale_rate="sqrt").rate(280) == 2.0
    assert RandomLength(70, scale_rate="none").rate(35) == 1.0
    assert Adaptive(first=16, scale_rate="sqrt").rate(64) == 2.0
    assert Ramp(8, 64, over=10).rate(64) == Choice([3]).rate(3) == Adaptive().rate(64) == 1.0


def test_the_rate_is_given_back_whatever_happens() -> None:
    sgd = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.5}], lr=1.0)
    seen: list[float] = []

    def fail() -> None:
        with scaled_rate(sgd, 3.0):
            seen.append(sgd.param_groups[0]["lr"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [1.5]
    assert sgd.param_groups[0]["lr"] == 0.5


class TestAdaptive:
    policy = Adaptive(tolerance=0.1, min=2, max=100, first=15, every=1)

    def after_probes(self, beta: float, count: int, state: LengthState | None = None) -> LengthState:
        state = state or self.policy.start()
        for _ in range(count):
            state, _ = self.policy.probed(state, [beta**lag for lag in self.policy.lags])
        return state

    def test_it_arrives_at_the_closed_form(self) -> None:
        """phi_0 cannot be seen and is taken to be phi_1: for beta = 0.9 that leaves 22 where it is."""
        assert abs(self.policy.now(self.after_probes(0.9, 30)) - 22) <= 1
        assert abs(self.policy.now(self.after_probes(0.8, 30)) - 11) <= 1

    def test_a_change_is_damped(self) -> None:
        one = self.after_probes(0.9, 1)
        assert one.length == pytest.approx(math.sqrt(15 * 22), rel=0.05)

    def test_a_short_curve_stops_at_the_floor(self) -> None:
        assert self.policy.now(self.after_probes(0.01, 50)) == 2

    def test_a_curve_that_does_not_fall_goes_to_the_longest(self) -> None:
        assert self.policy.now(self.after_probes(1.0, 50)) == 100
        assert self.policy.now(self.after_probes(1.1, 50)) == 100

    def test_it_comes_back_from_a_short_length(self) -> None:
        """A probe is as long as ever, so that a short horizon does not confirm itself."""
        short = self.after_probes(0.05, 40)
        assert self.policy.now(short) <= 3
        assert self.policy.now(self.after_probes(0.9, 40, short)) >= 20

    def test_a_probe_without_any_gradient_asks_for_the_floor(self) -> None:
        assert self.policy.needed(np.zeros(len(self.policy.lags))) == 2

    def test_numbers_that_are_none_change_nothing(self) -> None:
        before = self.after_probes(0.9, 3)
        after, asked = self.policy.probed(before, [math.nan] * len(self.policy.lags))
        assert (after.length, after.norms, asked) == (before.length, before.norms, self.policy.now(before))

    def test_probes_are_spaced_by_updates_or_by_work(self) -> None:
        every = replace(self.policy, every=5)
        state, _ = every.probed(every.start(), [1.0] * len(every.lags))
        waits = []
        for _ in range(6):
            waits.append(every.is_due(state))
            state = every.after(state, 30)
        assert waits == [False] * 5 + [True]
        by_work = replace(self.policy, every=None)
        assert by_work.is_due(by_work.start())
        state = by_work.start()
        spacing: list[int] = []
        for _ in range(12):
            state, _ = by_work.probed(state, [1.0] * len(by_work.lags))
            updates = 0
            while not by_work.is_due(state):
                state, updates = by_work.after(state, 50), updates + 1
            spacing.append(updates)
        assert spacing == sorted(spacing)  # sooner at first
        assert spacing[-1] == max(300, math.ceil(40 * by_work.max / 50))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Ramp(0, 5, over=3),
        lambda: Ramp(1, 5, over=0),
        lambda: Ramp(1, 5.5, over=3),
        lambda: Ramp(1, 5, over=3, shape="cubic"),
        lambda: Choice([]),
        lambda: Choice([0, 3]),
        lambda: Choice([2, 3], weights=[1]),
        lambda: Choice([2, 3], weights=[0, 0]),
        lambda: Choice([2, 3], weights=[1, -1]),
        lambda: Choice([2, 3], weights=[1, math.nan]),
        lambda: Choice([2, 3], seed=-1),
        lambda: RandomLength(0),
        lambda: RandomLength(10, deviation=-1.0),
        lambda: RandomLength(10, half=1.5),
        lambda: RandomLength(10, shortest=11),
        lambda: RandomLength(10, scale_rate="cubic"),
        lambda: Adaptive(tolerance=0.0),
        lambda: Adaptive(tolerance=1.0),
        lambda: Adaptive(min=0),
        lambda: Adaptive(min=20, max=10),
        lambda: Adaptive(every=0),
        lambda: Adaptive(min=5, first=4),
        lambda: Adaptive(scale_rate=True),
        lambda: Adaptive(windows="none"),
        lambda: Adaptive(max=100, multiple=8),
        lambda: Adaptive(max=64, first=20, multiple=8),
        lambda: Adaptive(multiple=0),
        lambda: Curriculum([], updates=5),
        lambda: Curriculum([0, 1], updates=5),
        lambda: Curriculum([1, 2]),
        lambda: Curriculum([1, 2], updates=0),
        lambda: Curriculum([1, 2, 3], updates=[5]),
        lambda: Curriculum([1, 2], updates=[5, 5, 5]),
        lambda: Curriculum([1, 2], updates="many"),
        lambda: Curriculum([1, 2], updates=5, segment=0),
        lambda: Curriculum([1, 2], enough=math.nan),
        lambda: Curriculum([1, 2], enough=True),
        lambda: Curriculum([1, 2], updates=5, seed=-1),
    ],
)
def test_what_cannot_be_meant_is_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match="expected") as refused:
        make()
    assert refused.value.fix


@pytest.mark.parametrize(
    "text",
    ["adaptive", "Adaptive(", "Adaptive(tolerance=x)", "Adaptive(0.1, nonsense=2)", "__import__('os')", "6.5", ""],
)
def test_a_text_that_spells_no_length_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        parse_length(text)


def test_a_text_may_be_a_number() -> None:
    assert parse_length(" 64 ") == 64
    assert parse_length("Choice([16, 256], weights=[9, 1])") == Choice([16, 256], weights=[9, 1])
