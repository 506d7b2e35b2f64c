"""ZClip is the published recursion, norm by norm."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from tbptt.errors import ConfigError, NonFiniteError
from tbptt.estimators.base import Estimate
from tbptt.guards.clip import ClipNorm
from tbptt.guards.zclip import ZClip


def estimate_of(norm: float, num_injected: int = 1) -> Estimate:
    """An estimate whose gradient norm is this one: 3-4-5, over two parameters."""
    loss = torch.tensor(1.0)
    gradients = {name: torch.tensor([part * norm], dtype=torch.float64) for name, part in (("a", 0.6), ("b", -0.8))}
    return Estimate(None, loss, loss, 1, gradients, 1, torch.zeros(0), num_injected)


def passed(guard: ZClip, norms: list[float]) -> list[float]:
    found: list[float] = []
    for norm in norms:
        gradients = guard(estimate_of(norm)).gradients
        found.append(math.hypot(gradients["a"].item(), gradients["b"].item()))
    return found


def by_hand(
    norms: list[float],
    z_most: float = 2.5,
    alpha: float = 0.97,
    warm_up: int = 25,
    cap: float | None = None,
    mode: str = "adaptive_scaling",
    update_on_spike: bool = True,
) -> list[float]:
    """The recursion over a list of numbers, written down from the paper."""
    result, first, mean, var = [], [], None, None
    for g in norms:
        limit = None
        if mean is None:
            first.append(g)
            if len(first) == warm_up:
                mean = math.fsum(first) / warm_up
                var = math.fsum((x - mean) * (x - mean) for x in first) / warm_up
        else:
            std = var**0.5
            z = (g - mean) / (std + 1e-6)
            if z > z_most:
                limit = {
                    "adaptive_scaling": mean + z_most * std / (z / z_most),
                    "mean": mean,
                    "percentile": mean + z_most * std,
                }[mode]
            if limit is None or update_on_spike:
                x = g if limit is None else limit
                mean = alpha * mean + (1 - alpha) * x
                var = alpha * var + (1 - alpha) * (x - mean) ** 2
        bounds = [bound for bound in (limit, cap) if bound is not None]
        result.append(min([g, *[g * bound / (g + 1e-6) for bound in bounds]]))
    return result


def random_norms(seed: int, count: int = 300) -> list[float]:
    draw = random.Random(seed)
    level = [1 + 3 * step / count for step in range(count)]  # rises
    spikes = {60: 40.0, 61: 1e6, 150: 7.0, 151: 7.0, 152: 7.0}
    return [each * draw.lognormvariate(0, 0.3) * spikes.get(step, 1.0) for step, each in enumerate(level)]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"z": 1.5, "alpha": 0.8, "warm_up": 5},
    {"mode": "mean"},
    {"mode": "percentile"},
    {"max_norm": 1.5},
    {"update_on_spike": False},
    {"update_on_spike": False, "mode": "percentile", "max_norm": 3.0, "warm_up": 2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_it_is_the_recursion_by_hand(settings: dict[str, Any]) -> None:
    names = {"z": "z_most", "max_norm": "cap"}
    hand = {names.get(name, name): value for name, value in settings.items()}
    for seed in range(3):
        norms = random_norms(seed)
        found = passed(ZClip(**settings), norms)
        assert found == pytest.approx(by_hand(norms, **hand), rel=1e-9)
        assert any(after < 0.99 * before for before, after in zip(norms, found, strict=True))
        # The controls: each setting of the others is told apart.
        turned = {"update_on_spike": not hand.get("update_on_spike", True)}
        for other in ({"z_most": 2.6}, {"alpha": 0.96}, {"warm_up": 27}, turned):
            assert found != pytest.approx(by_hand(norms, **{**hand, **other}), rel=1e-9), other


def test_twenty_five_ones_then_ten() -> None:
    """The variance is 0, so that the limit is the mean: 1."""
    guard = ZClip()
    assert passed(guard, [1.0] * 25) == [pytest.approx(1.0, abs=1e-15)] * 25
    estimate = guard(estimate_of(10.0))
    norm = math.hypot(estimate.gradients["a"].item(), estimate.gradients["b"].item())
    assert norm == pytest.approx(1.0, rel=1e-6)
    assert estimate.metrics["clip_scale"] == pytest.approx(0.1, rel=1e-6)
    assert estimate.metrics["gradient_norm"] == pytest.approx(10.0)
    assert estimate.metrics["gradient_z"] == pytest.approx(9e6)
    assert passed(ZClip(), [1.0] * 24 + [10.0])[-1] == pytest.approx(10.0)  # one earlier, it is of the warm-up


def test_no_number_that_is_none_gets_into_mean_and_variance() -> None:
    norms = random_norms(0)
    guard, undisturbed = ZClip(), ZClip()
    expected = passed(undisturbed, norms)
    found: list[float] = []
    for step, norm in enumerate(norms):
        if step in (3, 100):
            for bad in (math.nan, math.inf):
                before = guard.state_dict()
                with pytest.raises(NonFiniteError):
                    guard(estimate_of(bad))
                assert guard.state_dict() == before
        found += passed(guard, [norm])
    assert found == expected
    assert guard.state_dict() == undisturbed.state_dict()
    nothing = estimate_of(math.nan, num_injected=0)
    assert guard(nothing) is nothing


@pytest.mark.parametrize("stop", [1, 24, 25, 26, 61, 200])
def test_its_state_goes_on_where_it_was(stop: int) -> None:
    norms = random_norms(1)
    whole, first, second, forgetful = ZClip(), ZClip(), ZClip(), ZClip()
    passed(first, norms[:stop])
    second.load_state_dict(first.state_dict())
    expected = passed(whole, norms)[stop:]
    assert passed(second, norms[stop:]) == expected
    assert passed(forgetful, norms[stop:]) != expected


def test_a_state_is_a_copy() -> None:
    guard = ZClip()
    passed(guard, [1.0])
    state = guard.state_dict()
    passed(guard, [2.0])
    assert state["norms"] == [pytest.approx(1.0)]


def test_a_beginning_without_any_gradient_does_not_end_the_training() -> None:
    found = passed(ZClip(warm_up=3), [0.0, 0.0, 0.0, 5.0, 5.0])
    assert found[3] == pytest.approx(5.0)


def test_two_guards_that_scale_report_their_product() -> None:
    guard = ZClip(warm_up=2)
    passed(guard, [1.0, 1.0])
    estimate = ClipNorm(0.5)(guard(estimate_of(10.0)))
    assert estimate.metrics["clip_scale"] == pytest.approx(0.05, rel=1e-5)
    assert estimate.metrics["gradient_norm"] == pytest.approx(10.0)


@pytest.mark.parametrize(
    "settings",
    [{"z": 0.0}, {"alpha": 1.0}, {"alpha": 0.0}, {"warm_up": 1}, {"warm_up": 2.5}, {"max_norm": 0}, {"mode": "median"}],
    ids=str,
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="was expected to be"):
        ZClip(**settings)
