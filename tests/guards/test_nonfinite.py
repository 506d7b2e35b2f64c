"""Non-finite gradients are refused, counted, and never replaced."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tbptt.errors import ConfigError, NonFiniteError
from tbptt.estimators.base import Estimate
from tbptt.guards.nonfinite import NonFinite


def estimate_of(gradients: dict[str, Tensor], loss: float = 1.0, num_injected: int = 1) -> Estimate:
    value = torch.tensor(loss)
    return Estimate(None, value, value, 1, gradients, 1, torch.zeros(0), num_injected)


def good() -> Estimate:
    return estimate_of({"a": torch.tensor([3.0, 0.0]), "b": torch.tensor(4.0)})


def bad(value: float = math.nan, loss: float = 1.0) -> Estimate:
    return estimate_of({"a": torch.tensor([1.0, value]), "b": torch.tensor(4.0)}, loss)


@pytest.mark.parametrize("action", ["raise", "skip"])
def test_finite_gradients_pass_unchanged(action: Any) -> None:
    estimate = good()
    passed = NonFinite(action)(estimate)
    assert passed is not None
    assert passed.gradients is estimate.gradients
    assert passed.metrics == {"gradient_norm": 5.0}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_raise_names_the_parameters_and_the_loss(value: float) -> None:
    with pytest.raises(NonFiniteError, match=r"1 of 2 parameters.*'a'.*loss itself is finite \(1\)"):
        NonFinite()(bad(value))
    with pytest.raises(NonFiniteError, match=r"the loss is nan already"):
        NonFinite("raise")(bad(value, math.nan))


def test_many_parameters_are_not_all_listed() -> None:
    gradients = {f"p{i}": torch.tensor(math.nan) for i in range(50)}
    with pytest.raises(NonFiniteError, match=r"50 of 50 parameters.*'p0', 'p1', 'p2', \.\.\."):
        NonFinite()(estimate_of(gradients))


@pytest.mark.parametrize("huge", [3e38, -1e30])
def test_a_norm_that_overflows_is_no_fault(huge: float) -> None:
    gradients = {"a": torch.tensor([huge, huge]), "b": torch.tensor(0.0)}
    assert not math.isfinite(torch.nn.utils.get_total_norm(gradients.values()).item())
    passed = NonFinite()(estimate_of(gradients))
    assert passed is not None
    assert passed.gradients is gradients
    assert "gradient_norm" not in passed.metrics
    # and the control: an infinity among huge numbers is one
    with pytest.raises(NonFiniteError, match="'b'"):
        NonFinite()(estimate_of(gradients | {"b": torch.tensor(math.inf)}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    gradient = torch.ones(1000, dtype=dtype) * 100
    assert NonFinite()(estimate_of({"a": gradient})) is not None
    gradient[500] = math.nan
    with pytest.raises(NonFiniteError):
        NonFinite()(estimate_of({"a": gradient}))


def test_skip_refuses_and_raises_after_the_limit_in_a_row() -> None:
    guard = NonFinite("skip", limit=3)
    for _ in range(4):  # a good one in between starts the count anew
        assert [guard(bad()) for _ in range(3)] == [None] * 3
        assert guard(good()) is not None
    for _ in range(3):
        assert guard(bad()) is None
    with pytest.raises(NonFiniteError, match="3 updates in a row"):
        guard(bad())


def test_the_count_survives_a_resume() -> None:
    guard = NonFinite("skip", limit=2)
    guard(bad())
    guard(bad())
    resumed = NonFinite("skip", limit=2)
    resumed.load_state_dict(guard.state_dict())
    with pytest.raises(NonFiniteError):
        resumed(bad())


def test_nothing_injected_passes_and_leaves_the_count() -> None:
    guard = NonFinite("skip", limit=1)
    assert guard(bad()) is None
    nothing = estimate_of({"a": torch.tensor(math.nan)}, num_injected=0)
    assert guard(nothing) is nothing
    with pytest.raises(NonFiniteError):
        guard(bad())


def test_nothing_is_ever_replaced() -> None:
    estimate = bad()
    NonFinite("skip")(estimate)
    assert math.isnan(estimate.gradients["a"][1].item())


@pytest.mark.parametrize("action", ["Skip", "", None, 1])
def test_the_action_is_checked(action: Any) -> None:
    with pytest.raises(ConfigError, match="action"):
        NonFinite(action)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, math.nan])
def test_the_limit_is_checked(limit: Any) -> None:
    with pytest.raises(ConfigError, match="limit"):
        NonFinite("skip", limit=limit)
