"""Clipping does what torch's does, changes nothing it was given, and refuses what it cannot mend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tbptt.errors import ConfigError, NonFiniteError
from tbptt.estimators.base import Estimate
from tbptt.guards.clip import ClipNorm, ClipValue


def estimate_of(gradients: dict[str, Tensor], num_injected: int = 1, **metrics: float) -> Estimate:
    loss = torch.tensor(1.0)
    return Estimate(None, loss, loss, 1, gradients, 1, torch.zeros(0), num_injected, metrics)


def random_gradients(seed: int, size: float, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (5,), (), (2, 1, 3), (1,)]
    return {
        f"p{i}": (torch.randn(shape, generator=generator, dtype=torch.float64) * size).to(dtype)
        for i, shape in enumerate(shapes)
    }


def torch_clipped(gradients: dict[str, Tensor], clip: Callable[[list[Tensor]], Any]) -> tuple[dict[str, Tensor], Any]:
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients.values()]
    for parameter, gradient in zip(parameters, gradients.values(), strict=True):
        parameter.grad = gradient.clone()
    norm = clip(list(parameters))
    return {name: p.grad for name, p in zip(gradients, parameters, strict=True) if p.grad is not None}, norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-6, 0.1, 0.25, 1.0, 100.0])
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 7.5])
def test_norm_is_clipped_as_torch_does(size: float, max_norm: float, dtype: torch.dtype) -> None:
    for seed in range(5):
        gradients = random_gradients(seed, size, dtype)
        expected, norm = torch_clipped(gradients, lambda p: nn.utils.clip_grad_norm_(p, max_norm))
        clipped = ClipNorm(max_norm)(estimate_of(gradients))
        assert list(clipped.gradients) == list(gradients)
        for name, gradient in expected.items():
            assert torch.equal(clipped.gradients[name], gradient), name
            assert clipped.gradients[name].dtype == dtype
        assert clipped.metrics["gradient_norm"] == norm.item()
        # The control: some scale did happen wherever it had to.
        assert (clipped.metrics["clip_scale"] < 1) == (norm.item() + 1e-6 > max_norm)


def test_the_norm_after_clipping_is_the_one_asked_for() -> None:
    gradients = random_gradients(0, 50.0, torch.float64)
    clipped = ClipNorm(2.0)(estimate_of(gradients))
    flat = torch.cat([gradient.flatten() for gradient in clipped.gradients.values()])
    whole = torch.cat([gradient.flatten() for gradient in gradients.values()])
    assert flat.norm().item() == pytest.approx(2.0, rel=1e-6)
    assert torch.dot(flat / flat.norm(), whole / whole.norm()).item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("size", [1e-3, 0.3, 10.0])
def test_value_is_clipped_as_torch_does(size: float) -> None:
    gradients = random_gradients(3, size)
    expected, _ = torch_clipped(gradients, lambda p: nn.utils.clip_grad_value_(p, 0.25))
    clipped = ClipValue(0.25)(estimate_of(gradients))
    assert all(torch.equal(clipped.gradients[name], expected[name]) for name in gradients)
    count = sum(int((gradient.abs() > 0.25).sum()) for gradient in gradients.values())
    total = sum(gradient.numel() for gradient in gradients.values())
    assert clipped.metrics["clipped_share"] == count / total
    assert clipped.metrics["gradient_norm"] == nn.utils.get_total_norm(gradients.values()).item()


@pytest.mark.parametrize("guard", [ClipNorm(0.1), ClipValue(0.1)])
def test_what_came_in_is_not_changed(guard: ClipNorm | ClipValue) -> None:
    gradients = random_gradients(1, 5.0)
    copies = {name: gradient.clone() for name, gradient in gradients.items()}
    before = estimate_of(gradients)
    after = guard(before)
    assert all(torch.equal(gradients[name], copies[name]) for name in copies)
    assert all(not torch.equal(after.gradients[name], copies[name]) for name in copies)
    assert before.metrics == {}


@pytest.mark.parametrize("guard", [ClipNorm(1e6), ClipValue(1e6)])
def test_small_gradients_are_not_even_copied(guard: ClipNorm | ClipValue) -> None:
    gradients = random_gradients(1, 1.0)
    after = guard(estimate_of(gradients))
    assert all(after.gradients[name] is gradients[name] for name in gradients)


def test_the_first_guard_s_gradient_norm_is_kept() -> None:
    gradients = random_gradients(1, 10.0)
    norm = nn.utils.get_total_norm(gradients.values()).item()
    after = ClipNorm(1.0)(ClipValue(0.5)(estimate_of(gradients)))
    assert after.metrics["gradient_norm"] == norm
    assert set(after.metrics) == {"gradient_norm", "clip_scale", "clipped_share"}
    # The clipping itself goes by the norm of what it was given.
    assert nn.utils.get_total_norm(after.gradients.values()).item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("guard", [ClipNorm(1.0), ClipValue(1.0)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_gradients_are_refused_by_name(guard: ClipNorm | ClipValue, value: float) -> None:
    gradients = random_gradients(1, 1.0)
    gradients["p3"][1, 0, 2] = value
    with pytest.raises(NonFiniteError, match=r"'p3'") as caught:
        guard(estimate_of(gradients))
    assert 'NonFinite("skip")' in caught.value.fix


def test_a_norm_that_overflows_is_clipped_all_the_same() -> None:
    gradients = {"a": torch.tensor([3e30, 0.0]), "b": torch.tensor(-4e30)}
    assert not math.isfinite(nn.utils.get_total_norm(gradients.values()).item())
    clipped = ClipNorm(1.0)(estimate_of(gradients))
    assert clipped.metrics["gradient_norm"] == pytest.approx(5e30, rel=1e-6)
    assert torch.allclose(clipped.gradients["a"], torch.tensor([0.6, 0.0]))
    assert torch.allclose(clipped.gradients["b"], torch.tensor(-0.8))
    assert clipped.gradients["a"].dtype == torch.float32
    assert ClipValue(1.0)(estimate_of(gradients)).gradients["b"].item() == -1


def test_a_norm_beyond_float64_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="diverged"):
        ClipNorm(1.0)(estimate_of({"a": torch.tensor([1e300, 1e300], dtype=torch.float64)}))


def test_complex_and_mixed_gradients() -> None:
    gradients = {"c": torch.tensor([3 + 4j]), "r": torch.tensor([12.0], dtype=torch.float64)}
    clipped = ClipNorm(1.3)(estimate_of(gradients))
    assert clipped.metrics["gradient_norm"] == pytest.approx(13)
    assert torch.allclose(clipped.gradients["c"], torch.tensor([0.3 + 0.4j]))
    assert clipped.gradients["r"].dtype == torch.float64
    clamped = ClipValue(3.5)(estimate_of(gradients))
    assert clamped.gradients["c"].tolist() == [3 + 3.5j]
    assert clamped.metrics["clipped_share"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("guard", [ClipNorm(1.0), ClipValue(1.0)])
def test_nothing_injected_passes_through(guard: ClipNorm | ClipValue) -> None:
    nothing = estimate_of({"a": torch.tensor([math.nan])}, num_injected=0)
    assert guard(nothing) is nothing
    empty = estimate_of({})
    assert guard(empty) is empty


@pytest.mark.parametrize("guard", [ClipNorm(1.0), ClipValue(1.0)])
def test_parameters_without_elements_are_carried_along(guard: ClipNorm | ClipValue) -> None:
    clipped = guard(estimate_of({"none": torch.zeros(0, 3), "some": torch.tensor([9.0])}))
    assert clipped.gradients["none"].shape == (0, 3)
    assert clipped.gradients["some"].item() == pytest.approx(1.0)


@pytest.mark.parametrize("guard", [ClipNorm, ClipValue])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, True, "1", None])
def test_arguments_are_checked(guard: Any, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"max_(norm|value)"):
        guard(value)
