"""SpikeRollback judges by a robust test, and knows when going back does not help."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from tbptt.errors import ConfigError, DivergedError
from tbptt.estimators.base import Estimate
from tbptt.guards.base import RollBack, Start, guarded
from tbptt.guards.nonfinite import NonFinite
from tbptt.guards.spike import SpikeRollback


def estimate_of(loss: float, norm: float, num_injected: int = 1, num_terms: int = 1) -> Estimate:
    value = torch.tensor(loss, dtype=torch.float64)
    gradients = {"a": torch.tensor([norm], dtype=torch.float64)}
    return Estimate(None, value, value, num_terms, gradients, 1, torch.zeros(0), num_injected)


def spikes(guard: SpikeRollback, losses: list[float], norms: list[float]) -> list[int]:
    pairs = zip(losses, norms, strict=True)
    return [step for step, pair in enumerate(pairs) if isinstance(guard(estimate_of(*pair)), RollBack)]


def by_hand(values: list[float], factor: float, z: float = 10.0, warm_up: int = 25) -> list[int]:
    """The test as the docstring has it, in decibels: no logarithm to another base changes it."""
    good: list[float] = []
    found: list[int] = []
    for step, value in enumerate(values):
        last = np.array(good[-100:])
        if len(last) >= warm_up:
            if (last > 0).all():
                far = 10 * np.log10(value / np.median(last)) if value > 0 else -math.inf
                level = 10 * np.log10(last)
                is_far = far > 10 * np.log10(factor)
                is_out = far > z * 1.4826 * np.median(np.abs(level - np.median(level))) or value > 1000 * last.max()
            else:
                far = value - np.median(last)
                is_far = far > (factor - 1) * abs(np.median(last))
                is_out = far > z * 1.4826 * np.median(np.abs(last - np.median(last)))
            if is_far and is_out:
                found.append(step)
                continue
        good.append(value)
    return found


def noisy(seed: int, shift: float = 0.0) -> list[float]:
    draw = random.Random(seed)
    values = [shift + draw.lognormvariate(0, 0.5) * (1 - step / 800) for step in range(400)]
    for step, times in {30: 50.0, 31: 8.0, 150: 30.0, 151: 3000.0, 300: 1e7, 390: 300.0}.items():
        values[step] *= times
    return values


@pytest.mark.parametrize("factor", [1.5, 3.0, 40.0])
@pytest.mark.parametrize("z", [3.0, 6.0, 40.0])
@pytest.mark.parametrize("shift", [0.0, -20.0])
def test_the_test_is_what_it_says(factor: float, z: float, shift: float) -> None:
    for seed in range(3):
        values, even = noisy(seed, shift), [1.0] * 400
        expected = by_hand(values, factor, z)
        of_losses = SpikeRollback(every=1, z=z, loss_factor=factor, norm_factor=None, limit=400)
        assert spikes(of_losses, values, even) == expected
        if shift == 0.0:  # a norm is never negative
            of_norms = SpikeRollback(every=1, z=z, loss_factor=None, norm_factor=factor, limit=400)
            assert spikes(of_norms, even, values) == expected
            assert expected != by_hand(values, 1e9, z)  # the control
            assert expected


def test_each_has_its_own_factor_and_the_reason_says_which() -> None:
    guard = SpikeRollback(loss_factor=3.0, norm_factor=100.0)
    assert spikes(guard, [1.0] * 30, [1.0] * 30) == []
    assert isinstance(guard(estimate_of(2.9, 99.0)), Estimate)
    loss, norm = guard(estimate_of(3.1, 1.0)), guard(estimate_of(1.0, 101.0))
    assert isinstance(loss, RollBack)
    assert isinstance(norm, RollBack)
    assert "the loss is 3.1, where 1 is usual and 3 the most expected" in loss.reason
    assert "the gradient norm is 101, where 1 is usual" in norm.reason


def test_what_passes_is_unchanged_and_measured() -> None:
    estimate = estimate_of(1.0, -2.0)
    passed = SpikeRollback()(estimate)
    assert isinstance(passed, Estimate)
    assert passed.gradients is estimate.gradients
    assert passed.metrics == {"gradient_norm": 2.0}
    measured = estimate.with_gradients(estimate.gradients, gradient_norm=7.0)  # by an earlier guard, before clipping
    assert SpikeRollback()(measured) is measured
    nothing = estimate_of(math.nan, math.nan, num_injected=0)
    assert SpikeRollback()(nothing) is nothing


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_is_a_spike_at_once_and_never_remembered(bad: float) -> None:
    guard = SpikeRollback(limit=4)
    assert isinstance(guard(estimate_of(bad, 1.0)), RollBack)
    assert isinstance(guard(estimate_of(1.0, bad)), RollBack)
    nothing = {"usual": [], "first": [], "raised": 0.0, "left": 0}
    assert guard.state_dict() == {"losses": nothing, "norms": nothing, "in_row": 2, "since": 0}
    assert isinstance(guard(estimate_of(math.nan, 1.0, num_terms=0)), Estimate)  # no loss was reported
    assert guard.state_dict()["losses"] == nothing
    unwatched = SpikeRollback(loss_factor=None), SpikeRollback(norm_factor=None)
    for guard in unwatched:  # what is not compared with anything must be a number all the same
        assert isinstance(guard(estimate_of(bad, 1.0)), RollBack)
        assert isinstance(guard(estimate_of(1.0, bad)), RollBack)


def test_a_spike_is_not_remembered() -> None:
    guard = SpikeRollback()
    for _ in range(30):
        assert isinstance(guard(estimate_of(1.0, 1.0)), Estimate)
    before = {name: guard.state_dict()[name] for name in ("losses", "norms")}
    assert isinstance(guard(estimate_of(50.0, 1.0)), RollBack)
    assert isinstance(guard(estimate_of(1.0, 50.0)), RollBack)
    assert {name: guard.state_dict()[name] for name in before} == before
    assert isinstance(guard(estimate_of(1.5, 1.0)), Estimate)
    assert guard.state_dict()["losses"] != before["losses"]  # the control


def test_values_at_the_end_of_float64_are_judged() -> None:
    huge = [1e300 * 10 ** (step % 8) for step in range(60)]
    assert spikes(SpikeRollback(norm_factor=None), huge, [1.0] * 60) == []


def test_a_norm_that_overflows_is_measured_and_no_spike_by_itself() -> None:
    one = torch.tensor(1.0)
    large = {"a": torch.tensor([3e30, 0.0]), "b": torch.tensor(4e30)}
    assert not math.isfinite(torch.nn.utils.get_total_norm(large.values()).item())
    passed = SpikeRollback()(Estimate(None, one, one, 1, large, 1, torch.zeros(0), 1))
    assert isinstance(passed, Estimate)
    assert passed.metrics["gradient_norm"] == pytest.approx(5e30)


def test_the_warm_up_is_not_judged() -> None:
    guard = SpikeRollback(warm_up=10)
    assert spikes(guard, [1.0] * 9 + [1e6] + [1e6], [1.0] * 11) == [10]


def test_too_often_in_a_row_is_an_error_and_rarely_is_not() -> None:
    def run(good_between: int) -> int:
        guard = SpikeRollback(every=10, keep=2, limit=3)
        spikes(guard, [1.0] * 30, [1.0] * 30)
        for count in range(10):
            try:
                guard(estimate_of(9.0, 1.0))
            except DivergedError:
                return count
            spikes(guard, [1.0] * good_between, [1.0] * good_between)
        return 10

    with pytest.raises(DivergedError, match=r"3 times in a row.*the loss is 9"):
        spikes(SpikeRollback(warm_up=2, limit=3), [1.0, 1.0, *[9.0] * 4], [1.0] * 6)
    assert run(0) == 3
    assert run(19) == 3
    assert run(20) == 10  # by then there is a newer snapshot to go back to


def test_its_state_goes_on_where_it_was() -> None:
    values = noisy(0)
    settings: dict[str, Any] = {"every": 1, "z": 6.0, "loss_factor": None, "norm_factor": 3.0, "limit": 400}
    whole, first, second = (SpikeRollback(**settings) for _ in range(3))
    expected = [step for step in spikes(whole, values, values) if step >= 120]
    spikes(first, values[:120], values[:120])
    second.load_state_dict(first.state_dict())
    assert [120 + step for step in spikes(second, values[120:], values[120:])] == expected
    assert second.state_dict() == whole.state_dict()
    assert expected


def fed(guard: SpikeRollback, value: float, start: Start = "usual") -> bool:
    """Give the guard one loss, at a norm that is always the same; return whether it passes."""
    verdict = guarded(estimate_of(value, 1.0), [guard], start)
    return isinstance(verdict, Estimate)


def settled(**settings: Any) -> SpikeRollback:
    guard = SpikeRollback(every=1, limit=400, **settings)
    assert all(fed(guard, 1.0 + 0.01 * (step % 5)) for step in range(100))
    assert not fed(guard, 3.0)
    return guard


@pytest.mark.parametrize("start", ["sequence", "gap"])
def test_a_state_that_is_not_usual_makes_high_values_and_no_spikes(start: Start) -> None:
    guard = settled()
    assert fed(guard, 500.0, start)
    assert fed(guard, 700.0)  # and those after it, as the state recovers
    assert not fed(guard, 100 * 500.0 + 1)  # but not whatever comes
    assert all(fed(guard, 1.0) for _ in range(98))
    assert fed(guard, 600.0)
    assert not fed(guard, 600.0)  # the hundredth after it is compared as ever


def test_it_hears_of_it_also_where_an_earlier_guard_lets_nothing_pass() -> None:
    guard = settled()
    broken = estimate_of(math.nan, math.nan)
    assert guarded(broken, [NonFinite("skip"), guard], "gap") is None
    assert fed(guard, 500.0)  # the first that it sees
    assert not fed(settled(), 500.0)


def test_first_windows_of_sequences_are_compared_with_their_like() -> None:
    guard = settled()
    for _ in range(25):  # the warm-up of these
        assert fed(guard, 50.0, "sequence")
        assert fed(guard, 1.0)
    assert fed(guard, 90.0, "sequence")
    assert not fed(guard, 110.0, "sequence")
    assert fed(guard, 110.0, "gap")  # that is another state
    always = SpikeRollback(every=1, limit=400)  # where each window begins a sequence
    assert all(fed(always, 1.0, "sequence") for _ in range(25))
    assert not fed(always, 3.0, "sequence")
    assert not fed(settled(), math.nan, "gap")


def test_what_was_usual_goes_back_and_how_often_does_not() -> None:
    guard = SpikeRollback(every=50, keep=2, limit=3)
    assert all(fed(guard, 100.0) for _ in range(30))
    then = guard.state_dict()
    assert all(fed(guard, 1.0) for _ in range(100))
    assert not fed(guard, 100.0)
    guard.went_back(then)
    assert fed(guard, 100.0)
    assert guard.state_dict()["losses"]["usual"] == [100.0] * 31
    assert guard.state_dict()["in_row"] == 1
    guard.load_state_dict(then)  # as a checkpoint does
    assert guard.state_dict() == then


@pytest.mark.parametrize(
    "settings",
    [
        {"every": 0},
        {"keep": 1},
        {"z": 0.0},
        {"loss_factor": 1.0},
        {"norm_factor": math.nan},
        {"loss_factor": None, "norm_factor": None},
        {"warm_up": 1},
        {"warm_up": 101},
        {"limit": 0},
        {"limit": True},
        {"allow_bias": "yes"},
    ],
    ids=str,
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        SpikeRollback(**settings)
