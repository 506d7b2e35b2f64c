"""The figures of estimates, against samples whose bias and variance are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tbptt.comparison.figures import Figures, figures


def sample(
    seed: int, *, bias: float, deviation: float, repeats: int = 8, points: int = 8, size: int = 5
) -> tuple[Figures, Tensor, Tensor]:
    """Figures of estimates (1 + bias) g + noise; g of length about 1."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.nn.functional.normalize(torch.ones(size, dtype=torch.float64), dim=0)
    reference = mean + 0.3 * torch.randn(points, size, generator=generator, dtype=torch.float64) / size**0.5
    noise = deviation * torch.randn(repeats, points, size, generator=generator, dtype=torch.float64) / size**0.5
    errors = bias * reference + noise
    return figures(errors, reference), errors, reference


def test_without_noise_each_figure_is_what_its_definition_says() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    errors = torch.randn(1, 6, 4, generator=generator, dtype=torch.float64)
    found = figures(errors, reference)
    estimates = reference + errors[0]
    assert found.relative_bias == pytest.approx(float(errors[0].mean(0).norm() / reference.mean(0).norm()))
    assert found.mean_relative_error == pytest.approx(float(errors.square().sum() / reference.square().sum()) ** 0.5)
    assert found.relative_variance == 0.0
    cosines = torch.nn.functional.cosine_similarity(estimates, reference, dim=1)
    assert found.cosine == pytest.approx(float(cosines.mean()))
    assert found.bias_low <= found.relative_bias <= found.bias_high


def test_variance_and_cosine_of_random_estimates() -> None:
    found, errors, reference = sample(1, bias=0.2, deviation=0.7, repeats=60, points=3)
    wanted = errors.var(0).sum() / reference.square().sum()
    assert found.relative_variance == pytest.approx(float(wanted))
    cosines = torch.nn.functional.cosine_similarity(errors + reference, reference[None].expand_as(errors), dim=2)
    assert found.cosine == pytest.approx(float(cosines.mean()))


def test_noise_of_few_repeats_is_not_taken_for_a_bias() -> None:
    """What averaging alone would say is far from 0; the squares of what is said average to 0."""
    squares, naive, inside = [], [], 0
    for seed in range(200):
        found, errors, reference = sample(seed, bias=0.0, deviation=2.0)
        inside += found.bias_low == 0.0
        size = float(reference.mean(0).norm())
        naive.append(float(errors.mean((0, 1)).norm()) / size)
        squares.append(found.relative_bias)
    assert min(naive) > 0.05
    assert sum(value == 0.0 for value in squares) > 80  # a square that comes out below 0 is shown as 0
    assert inside >= 185


def test_a_bias_is_found_through_noise_and_its_interval_holds_it() -> None:
    covered, seen = 0, 0
    for seed in range(200):
        found, _, _ = sample(seed, bias=0.5, deviation=0.5)
        covered += found.bias_low <= 0.5 <= found.bias_high
        seen += found.bias_low > 0
    assert seen >= 195
    assert covered >= 180


def test_intervals_of_estimates_that_differ_between_points() -> None:
    """Deterministic, with an error of its own at each point: the interval is over points."""
    covered = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        reference = torch.ones(8, 1, dtype=torch.float64)
        errors = 0.4 + 0.3 * torch.randn(1, 8, 1, generator=generator, dtype=torch.float64)
        found = figures(errors, reference)
        covered += found.bias_low <= 0.4 <= found.bias_high
    assert 180 <= covered < 200


def test_tiny_errors_are_not_lost_beside_large_gradients() -> None:
    reference = torch.full((3, 4), 1e3, dtype=torch.float64)
    found = figures(torch.full((1, 3, 4), 1e-9, dtype=torch.float64), reference)
    assert found.relative_bias == pytest.approx(1e-12)


def test_what_has_no_size_has_no_figure() -> None:
    nothing = torch.zeros(3, 4, dtype=torch.float64)
    found = figures(torch.ones(1, 3, 4, dtype=torch.float64), nothing)
    assert math.isnan(found.relative_bias)
    assert math.isnan(found.cosine)
    gone = figures(-torch.ones(1, 3, 4, dtype=torch.float64), torch.ones(3, 4, dtype=torch.float64))
    assert gone.relative_bias == pytest.approx(1.0)
    assert math.isnan(gone.cosine)  # an estimate of zero points nowhere


def test_one_point_leaves_the_interval_to_the_repeats() -> None:
    found, _, _ = sample(0, bias=0.5, deviation=0.2, points=1)
    assert found.bias_low < found.relative_bias < found.bias_high
    still, _, _ = sample(0, bias=0.5, deviation=0.0, points=1, repeats=1)
    assert still.bias_low == still.relative_bias == still.bias_high
