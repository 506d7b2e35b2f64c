"""Adaptive clipping is its equation, row by row, and sees the weights as they are."""

from __future__ import annotations

import copy
import gc
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tbptt
from tbptt.errors import ConfigError, NonFiniteError
from tbptt.estimators.base import Estimate
from tbptt.guards.adaptive import AdaptiveClip

SHAPES = {
    "matrix": (4, 3),
    "bias": (4,),
    "column": (5, 1),
    "row": (1, 5),
    "filters": (3, 2, 2),
    "gain": (),
    "one": (1,),
}


class Weights(nn.Module):
    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in SHAPES.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            self.register_parameter(name, nn.Parameter(value))
        with torch.no_grad():
            self.matrix[1] = 0.0  # a unit that counts as epsilon
            self.bias.zero_()


def gradients_of(model: nn.Module, size: float, seed: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (size * torch.randn(value.shape, generator=generator, dtype=torch.float64)).to(value.dtype)
        for name, value in model.named_parameters()
    }


def estimate_of(gradients: dict[str, Tensor], num_injected: int = 1) -> Estimate:
    loss = torch.tensor(1.0)
    return Estimate(None, loss, loss, 1, gradients, 1, torch.zeros(0), num_injected)


def by_hand(weight: np.ndarray, gradient: np.ndarray, clipping: float, epsilon: float) -> np.ndarray:
    """One Python loop over units: rows of what has two long dimensions, all of the rest."""
    units = list(range(weight.shape[0])) if sum(size > 1 for size in weight.shape) > 1 else [...]
    clipped = gradient.copy()
    for unit in units:
        size = math.sqrt(sum(float(each) ** 2 for each in np.ravel(weight[unit])))
        norm = math.sqrt(sum(float(each) ** 2 for each in np.ravel(gradient[unit])))
        most = clipping * max(size, epsilon)
        if norm > most:
            clipped[unit] = gradient[unit] * (most / norm)
    return clipped


def largest_difference(model: nn.Module, size: float, clipping: float, epsilon: float, hand: float) -> float:
    gradients = gradients_of(model, size)
    guard = AdaptiveClip(clipping, epsilon)
    guard.begin(model)
    found = guard(estimate_of(gradients)).gradients
    return max(
        np.abs(found[name].numpy() - by_hand(value.detach().numpy(), gradients[name].numpy(), hand, epsilon)).max()
        for name, value in model.named_parameters()
    )


@pytest.mark.parametrize("size", [1e-4, 0.01, 1.0, 1e6])
@pytest.mark.parametrize(("clipping", "epsilon"), [(0.01, 1e-3), (0.16, 0.5)])
def test_each_unit_is_clipped_as_by_hand(size: float, clipping: float, epsilon: float) -> None:
    for seed in range(3):
        assert largest_difference(Weights(seed), size, clipping, epsilon, clipping) < 1e-15
    if size >= 1.0:  # the control: another ratio is told apart
        assert largest_difference(Weights(0), size, clipping, epsilon, 1.01 * clipping) > 1e-6


def test_a_unit_is_a_row_and_not_the_whole_matrix() -> None:
    model = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 4.0], [0.3, 0.4]], dtype=torch.float64))
    gradient = torch.tensor([[0.03, 0.04], [3.0, 4.0]], dtype=torch.float64)
    guard = AdaptiveClip(0.1)
    guard.begin(model)
    found = guard(estimate_of({"weight": gradient}))
    expected = torch.tensor([[0.03, 0.04], [0.03, 0.04]], dtype=torch.float64)  # the second: 5 to 0.1 * 0.5
    torch.testing.assert_close(found.gradients["weight"], expected, rtol=1e-14, atol=0)
    assert found.metrics["clipped_share"] == 0.5
    assert found.metrics["gradient_norm"] == pytest.approx(math.hypot(0.05, 5.0))
    assert gradient[1, 0] == 3.0  # what came in is not changed


def test_it_sees_weights_that_move() -> None:
    model = Weights(0)
    guard = AdaptiveClip(0.01)
    guard.begin(model)
    gradients = gradients_of(model, 1.0)
    before = guard(estimate_of(gradients)).gradients["filters"]
    with torch.no_grad():
        model.filters.mul_(2.0)
    torch.testing.assert_close(guard(estimate_of(gradients)).gradients["filters"], 2 * before, rtol=1e-14, atol=0)


def test_norms_beyond_the_dtype_are_clipped_and_nothing_is_lost() -> None:
    model = Weights(0, torch.float32)
    guard = AdaptiveClip(0.01)
    guard.begin(model)
    found = guard(estimate_of(gradients_of(model, 1e30))).gradients
    small = guard(estimate_of(gradients_of(model, 1e3))).gradients
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, small[name], rtol=1e-5, atol=0)
        assert bool((gradient != 0).all())


def test_what_it_cannot_judge_it_refuses() -> None:
    model = Weights(0)
    guard = AdaptiveClip()
    with pytest.raises(ConfigError, match=r"no|shown"):
        guard(estimate_of(gradients_of(model, 1.0)))
    guard.begin(model)
    gradients = gradients_of(model, 1.0)
    gradients["bias"][0] = math.nan
    with pytest.raises(NonFiniteError, match="'bias'"):
        guard(estimate_of(gradients))
    nothing = estimate_of(gradients, num_injected=0)
    assert guard(nothing) is nothing
    other = nn.Linear(1, 1)
    guard.begin(other)
    with pytest.raises(ConfigError, match="has no parameter 'matrix'"):
        guard(estimate_of(gradients_of(model, 1.0)))
    for settings in ({"clipping": 0.0}, {"clipping": math.inf}, {"epsilon": -1.0}, {"epsilon": True}):
        with pytest.raises(ConfigError, match="was expected to be a positive, finite number"):
            AdaptiveClip(**settings)


def test_a_copy_of_the_guard_is_no_copy_of_the_model() -> None:
    model = Weights(0)
    guard = AdaptiveClip()
    guard.begin(model)
    gradients = gradients_of(model, 1.0)
    found = copy.deepcopy(guard)(estimate_of(gradients)).gradients
    with torch.no_grad():
        model.filters.mul_(2.0)  # the copy looks at the same weights
    torch.testing.assert_close(
        copy.deepcopy(guard)(estimate_of(gradients)).gradients["filters"], 2 * found["filters"], rtol=1e-14, atol=0
    )
    del model
    gc.collect()
    with pytest.raises(ConfigError, match="it is gone"):
        guard(estimate_of(gradients))


def test_a_trainer_shows_it_the_model() -> None:
    def trained(guards: list[tbptt.Guard]) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.GRU(1, 3)
        data = torch.randn(240, 1), torch.randn(240, 3)
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        stream = tbptt.ArrayStream(*data, lanes=2)
        tbptt.Trainer(model, nn.MSELoss(), sgd, tbptt.TBPTT(8, 8), stream, guards=guards, checked=False).run(updates=1)
        torch.manual_seed(0)
        return [
            (after - before).norm() / before.norm()
            for before, after in zip(nn.GRU(1, 3).parameters(), model.parameters(), strict=True)
        ]

    assert max(trained([AdaptiveClip(1e-3)])) <= 1e-3 * (1 + 1e-4)
    assert max(trained([])) > 1e-2
