"""Estimators whose mean is the full gradient: outcome by outcome, in bounds of the mean, and with a weight left out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from systems import SYSTEMS, B, D, H, is_mean, record, relative, squared
from torch import Tensor, nn

from tbptt import ARTBP, TBPTT, Alarms, FullBPTT, Mixture, Telescope, Trainer, Window
from tbptt.errors import ConfigError, ShapeError
from tbptt.estimators import Estimate, Estimator, artbp
from tbptt.models import InfluenceBalancingModel
from tbptt.streams import InfluenceBalancing
from tbptt.testing import Recording

T = 24


def plain(recording: Recording, model: nn.Module, begin: int, end: int, oldest: int = 0) -> Tensor:
    """The gradient of the summed losses from `begin` to `end`, cut off before `oldest`, as one vector."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    with torch.no_grad():
        _, states = recording.run([leaves] * max(1, oldest), None, 0, oldest, [])
    start = states[-1] if oldest else None
    total, _ = recording.run([leaves] * end, start, oldest, end, list(range(begin, end)))
    found = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return torch.cat([each.flatten() for each in found])


def summed(
    estimator: Estimator, model: nn.Module, recording: Recording, steps: int, *, most: int | None = None
) -> Tensor:
    """The gradient of the summed losses of the first `steps` steps, as the estimator makes it; cut into its windows."""
    carry, at, total = estimator.init(model, B), 0, 0.0
    parts = (recording.inputs, recording.targets, recording.mask, recording.reset)
    while at < steps:
        size = min(estimator.next_steps(carry), steps - at, most or steps)
        window = Window(*(part[at : at + size] for part in parts), start=at)
        estimate, carry = estimator.estimate(model, squared, carry, window)
        if estimate.num_injected:
            total = total + estimate.weight * flat(estimate, model)
        at += size
    return total


def flat(estimate: Estimate, model: nn.Module) -> Tensor:
    """A gradient as one vector; zeros where nothing arrived."""
    named = model.named_parameters()
    return torch.cat([estimate.gradients.get(name, torch.zeros_like(each)).flatten() for name, each in named])


def few(name: str) -> tuple[nn.Module, Recording]:
    torch.manual_seed(0)
    system = SYSTEMS[name]()
    recording = record(system, T, masks=True, resets=False)
    recording.reset[9, 0] = True
    recording.reset[17] = True
    return system.model, recording


UNBIASED = [
    ARTBP(4),
    ARTBP(5, alpha="constant"),
    ARTBP(6, alpha="constant", block=3),
    Mixture(3, 3, None, 0.4),
    Mixture(4, 4, None, 0.3, segment=3),
    Telescope(4, (4, 8, 32), distribution=(0.4, 0.3, 0.3)),
    Telescope(4, (4, 8, 32), segment=5),
    Telescope(4, (4, 8, 32), sampling="single"),
]


@pytest.mark.parametrize("estimator", UNBIASED, ids=str)
@pytest.mark.parametrize("name", ["lstm"])
def test_the_mean_is_the_full_gradient(estimator: Any, name: str) -> None:
    model, recording = few(name)
    wanted = plain(recording, model, 0, T)
    draws = torch.stack([summed(replace(estimator, seed=seed), model, recording, T) for seed in range(100)])
    assert is_mean(draws, wanted)
    assert not is_mean(draws, 2 * wanted)  # the control: it can tell


@pytest.mark.parametrize("left_out", ["the first", "all"])
def test_the_bound_sees_one_weight_that_is_left_out(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight of one place, the step after a cut, is enough: a quarter of what crosses there is then missing."""
    model, recording = few("lstm")
    recording.reset[:] = False
    estimator, wanted = ARTBP(5), plain(recording, model, 0, T)
    first = 1 / (1 - estimator.rate(1))

    def drawn() -> Tensor:
        return torch.stack([summed(replace(estimator, seed=seed), model, recording, T) for seed in range(600)])

    assert is_mean(drawn(), wanted)
    kept = artbp.scaled
    monkeypatch.setattr(
        artbp, "scaled", lambda gradients, by: gradients if left_out == "all" or by == first else kept(gradients, by)
    )
    assert not is_mean(drawn(), wanted)


def test_truncation_is_not_the_mean() -> None:
    """The control of all: what is cut off and not made up for shows in the same bound."""
    model, recording = few("gru")
    wanted = plain(recording, model, 0, T)
    for biased in (Mixture(3, 3, None, 0.4, unbiased=False), ARTBP(4, longest=5)):
        assert biased.kind == "biased"
        draws = torch.stack([summed(replace(biased, seed=seed), model, recording, T) for seed in range(100)])
        assert not is_mean(draws, wanted)


# Exact limits


@pytest.mark.parametrize("name", SYSTEMS)
def test_without_chance_they_are_full_backpropagation(name: str) -> None:
    model, recording = few(name)
    wanted = summed(FullBPTT(6), model, recording, T)
    assert relative({"": wanted}, {"": plain(recording, model, 0, T)}) < 1e-12
    exact = [
        ARTBP(math.inf, longest=T),
        ARTBP(math.inf, longest=T, block=5) if T % 5 == 0 else ARTBP(math.inf, longest=T, block=4),
        Mixture(6, 6, None, 1.0),
        Mixture(6, 6, None, 1.0, segment=4),
        Mixture(6, 6, T, 1.0),
        Telescope(6, (T,)),
        Telescope(T, (T,), segment=3),
        Telescope(6, (T,), sampling="single"),
    ]
    for estimator in exact:
        assert relative({"": summed(estimator, model, recording, T)}, {"": wanted}) < 1e-12, estimator


@pytest.mark.parametrize("name", SYSTEMS)
def test_each_outcome_of_two_has_its_weight(name: str) -> None:
    """Mixture and Telescope, window by window: the short gradient, and the long one weighed as it says."""
    model, recording = few(name)
    recording.reset[:] = False
    short, long, p = 5, 11, 0.25
    cases = [
        (Mixture(4, short, long, p), 1 / p),
        (Mixture(4, short, long, p, unbiased=False), 1.0),
        (Mixture(4, short, long, p, segment=2), 1 / p),
        (Telescope(4, (short, long), distribution=(1 - p, p)), 1 / p),
    ]
    for estimator, factor in cases:
        seen = set()
        for seed in range(8):
            mine = replace(estimator, seed=seed)
            carry = mine.init(model, B)
            for at in range(0, T, 4):
                parts = (recording.inputs, recording.targets, recording.mask, recording.reset)
                estimate, carry = mine.estimate(model, squared, carry, Window(*(part[at : at + 4] for part in parts)))
                near = plain(recording, model, at, at + 4, max(0, at + 4 - short))
                far = plain(recording, model, at, at + 4, max(0, at + 4 - long))
                drawn = bool(estimate.metrics["drawn"])
                wanted = near + factor * (far - near) if drawn else near
                found = estimate.weight * flat(estimate, model)
                assert relative({"": found}, {"": wanted}) < 1e-10
                seen.add(drawn)
        assert seen == {False, True}


@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_stretch_that_is_read_in_parts_is_the_same(name: str, most: int) -> None:
    """A window that ends before the cut leaves it open: its successors go back through it."""
    model, recording = few(name)
    for estimator in (ARTBP(6), ARTBP(8, block=4), ARTBP(math.inf, longest=7)):
        whole = summed(estimator, model, recording, T)
        assert relative({"": summed(estimator, model, recording, T, most=most)}, {"": whole}) < 1e-12


# Lengths and probabilities


@pytest.mark.parametrize(("alpha", "block"), [(4.0, 1), (6.0, 1), ("constant", 1), (4.0, 4), ("constant", 4)])
def test_the_mean_length_is_the_one_that_was_asked_for(alpha: float | str, block: int) -> None:
    estimator = ARTBP(16, alpha=alpha, block=block)
    survival, mean = 1.0, 0.0
    for blocks in range(1, 2_000_000):
        mean += survival * block
        survival *= 1 - estimator.rate(blocks)
        if survival < 1e-14:
            break
    assert mean == pytest.approx(16, rel=1e-6)
    lengths = np.array([estimator.length(number) for number in range(40_000)])
    assert abs(lengths.mean() - 16) < 4 * lengths.std() / len(lengths) ** 0.5
    for blocks in (1, 2):  # of the stretches that are so long, the share that is cut there
        there = lengths[lengths >= blocks * block] == blocks * block
        assert abs(there.mean() - estimator.rate(blocks)) < 4 * there.std() / len(there) ** 0.5
    assert not (lengths % block).any()


def settled_slope(estimator: ARTBP, segments: int) -> np.ndarray:
    """Each segment's gradient of influence balancing at rest, theta = 1/2, by hand; as sums, a step of the stream.

    At rest each step's loss has the gradient q = (-3 - 1) on the first unit; a backward recursion over the segment with
    the estimator's own cuts and weights.
    """
    found = np.empty(segments)
    matrix = InfluenceBalancingModel().double().matrix.numpy()
    v = InfluenceBalancingModel().double().direction.numpy()
    for number in range(segments):
        length, delta, total = estimator.length(number), np.zeros(23), 0.0
        for step in range(length, 0, -1):
            if step < length:
                delta = delta @ matrix / (1 - estimator.rate(step))
            delta[0] += -4.0
            total += delta @ v
        found[number] = total
    return found


@pytest.mark.parametrize("alpha", ["constant", 4.0, 6.0])
def test_influence_balancing_at_rest(alpha: float | str) -> None:
    estimator = ARTBP(16, alpha=alpha, seed=3)
    slopes = settled_slope(estimator, 3000) / 16
    assert abs(slopes.mean() - 24) < 3 * slopes.std() / len(slopes) ** 0.5
    model = InfluenceBalancingModel().double()
    with torch.no_grad():
        _, state = model(torch.zeros(400, 1, 1))
    carry = replace(estimator.init(model, 1), state=state)
    for number in range(12):
        window = Window(torch.zeros(estimator.next_steps(carry), 1, 1), torch.ones(estimator.next_steps(carry), 1))
        estimate, carry = estimator.estimate(model, lambda s, t: 0.5 * (s - t).square(), carry, window)
        assert float(estimate.gradients["theta"]) == pytest.approx(slopes[number], rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", ["constant", 4.0, 6.0])
def test_influence_balancing_at_rest_over_many_segments(alpha: float | str) -> None:
    segments, estimator = 200_000, ARTBP(16, alpha=alpha, seed=5)
    slopes = settled_slope(estimator, segments) / 16
    error = slopes.std() / segments**0.5
    assert abs(slopes.mean() - 24) < 3 * error
    assert error < 1  # the control: it is known well enough to tell 24 from what any short truncation gives, below 0
    lengths = np.array([estimator.length(number) for number in range(segments)])
    assert abs(lengths.mean() / 16 - 1) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_the_trainer_solves_influence_balancing(seed: int) -> None:
    """At a rate of 1e-5 for a segment's sum; `TBPTT(1, 10)` runs away (benchmarks/quality/influence.py)."""

    def trained(estimator: Estimator, rate: float, steps: int) -> float:
        model = InfluenceBalancingModel().double()
        stream = InfluenceBalancing(steps=steps, dtype=torch.float64)
        sgd = torch.optim.SGD(model.parameters(), lr=rate)
        Trainer(model, lambda s, t: 0.5 * (s - t).square(), sgd, estimator, stream, monitors=[quiet]).run(passes=1)
        return 0.5 * (-6 * float(model.theta.detach()) - 1) ** 2

    quiet = Alarms(watch=())
    assert trained(ARTBP(16, seed=seed), 16e-5, 30_000) < 1e-6
    assert trained(TBPTT(1, 10), 1e-5, 3_000) > 10


def test_probabilities_follow_the_running_norms() -> None:
    lengths = (4, 8, 16)
    fresh = Telescope(4, lengths)
    assert fresh.probabilities((None, None, None)) == pytest.approx([0.5, 0.25, 0.25])  # P(N >= n) = 1, 1/2, 1/4
    # |D_n|^2 = 1, 0.04, 0.0016; per step of what each adds: 1/4, 0.01, 0.0002
    tails = [1.0, (0.04 / 4) ** 0.5 / (1 / 4) ** 0.5, (0.0016 / 8) ** 0.5 / (1 / 4) ** 0.5]
    found = fresh.probabilities((1.0, 0.04, 0.0016))
    assert found == pytest.approx([tails[0] - tails[1], tails[1] - tails[2], tails[2]])
    assert fresh.probabilities((1.0, 1e-30, 1e-30))[2] == pytest.approx(0.1 * 0.25)  # never out of reach
    assert sum(fresh.probabilities((1.0, 5.0, 3.0))) == pytest.approx(1)
    single = Telescope(4, lengths, sampling="single").probabilities((1.0, 1.0, 1.0))
    assert single == pytest.approx(np.array([1, 0.5**0.5, 0.5]) / (1 + 0.5**0.5 + 0.5))


def test_running_norms_are_those_of_what_each_length_adds() -> None:
    model, recording = few("gru")
    estimator = Telescope(4, (4, 8), distribution=(0.01, 0.99))
    carry = estimator.init(model, B)
    parts = (recording.inputs[:8], recording.targets[:8], recording.mask[:8], recording.reset[:8])
    for at in (0, 4):
        estimate, carry = estimator.estimate(model, squared, carry, Window(*(part[at : at + 4] for part in parts)))
    near, far = plain(recording, model, 4, 8, 4), plain(recording, model, 4, 8, 0)
    first = float((plain(recording, model, 0, 4) / recording.mask[:4].sum()).square().sum())
    newest = [float((each / estimate.num_injected).square().sum()) for each in (near, far - near)]
    assert carry.running[0] == pytest.approx(0.9 * first + 0.1 * newest[0])
    assert carry.running[1] == pytest.approx(0.9 * 0.0 + 0.1 * newest[1])


# Refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ARTBP(0.5), "mean_length of at least one block of 1 steps"),
        (lambda: ARTBP(3, block=4), "mean_length of at least one block of 4 steps"),
        (lambda: ARTBP(math.inf), "longest was expected together"),
        (lambda: ARTBP(math.nan), "mean_length of at least one block"),
        (lambda: ARTBP(16, alpha=1.0), "alpha was expected to be a number above 1"),
        (lambda: ARTBP(16, alpha=True), "alpha was expected to be a number above 1"),
        (lambda: ARTBP(16, alpha="power"), "alpha was expected to be a number above 1"),
        (lambda: ARTBP(16, longest=7, block=2), "longest was expected to be a multiple of block"),
        (lambda: ARTBP(16, seed=-1), "a seed was expected"),
        (lambda: Mixture(8, 4, 16), "look-backs of Mixture were expected to rise"),
        (lambda: Mixture(4, 8, 8), "look-backs of Mixture were expected to rise"),
        (lambda: Mixture(4, 8, 16, p=0), "probability p above 0"),
        (lambda: Telescope(8, (4, 16)), "look-backs of Telescope were expected to rise"),
        (lambda: Telescope(4, ()), "look-backs of Telescope were expected to rise"),
        (lambda: Telescope(4, (4, 8.5)), "lengths were expected to be whole numbers"),
        (lambda: Telescope(4, (4, 8), sampling="all"), "sampling was expected"),
        (lambda: Telescope(4, (4, 8), distribution=(1.0, 0.0)), "2 probabilities above 0"),
        (lambda: Telescope(4, (4, 8), distribution="best"), "distribution was expected"),
    ],
)
def test_what_cannot_be_meant_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_window_beyond_the_cut_is_refused() -> None:
    model, estimator = nn.GRU(D, H), ARTBP(math.inf, longest=4)
    with pytest.raises(ShapeError, match="at most k1 = 4 steps"):
        estimator.estimate(model, squared, estimator.init(model, 1), Window(torch.randn(5, 1, D), torch.randn(5, 1, H)))
