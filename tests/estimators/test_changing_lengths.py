"""Lengths that change from update to update, against oracles that know only the lengths of that update."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from systems import SYSTEMS, B, D, H, Leaking, record, relative, squared
from torch import Tensor, nn

import tbptt
from tbptt import TBPTT, Adaptive, Choice, Length, Ramp, RandomLength, Window
from tbptt.curve import lag_grid
from tbptt.errors import ConfigError, ShapeError
from tbptt.estimators.history import History, Stretch
from tbptt.estimators.probe import SPREAD, probe
from tbptt.loss import StepLoss
from tbptt.model import find_lane_dims
from tbptt.testing import Recording, frozen_boundary

STEPS = 100
PAIRS: dict[str, tuple[int | Length, int | Length]] = {
    "k2 chosen": (5, Choice([2, 9, 23], seed=3)),
    "k1 chosen": (Choice([1, 4, 9], seed=1), 11),
    "both chosen": (Choice([1, 4, 9], seed=1), Choice([2, 9, 23], seed=3)),
    "ramps": (Ramp(2, 9, over=12), Ramp(20, 3, over=12)),
    "random k1": (RandomLength(6, deviation=2, shortest=2), 8),
}


def window_of(recording: Recording, begin: int, end: int) -> Window:
    parts = (recording.inputs, recording.targets, recording.mask, recording.reset)
    return Window(*(part[begin:end] for part in parts), start=begin)


@pytest.mark.parametrize(("pair", "losses"), [*((pair, "tail") for pair in PAIRS), ("both chosen", "all")])
@pytest.mark.parametrize("name", SYSTEMS)
def test_each_update_is_that_of_its_own_lengths(name: str, pair: str, losses: Literal["tail", "all"]) -> None:
    """After short look-backs a long one has all the steps that it asks for."""
    torch.manual_seed(0)
    system = SYSTEMS[name]()
    recording = record(system, STEPS, masks=True, resets=True)
    parameters = {key: value.detach() for key, value in system.model.named_parameters()}
    estimator = TBPTT(*PAIRS[pair], losses=losses)
    carry, begin, number = estimator.init(system.model, B), 0, 0
    seen: set[tuple[int, int]] = set()
    first = 0  # of the steps that a look-back goes to: where a window began with a new sequence in all lanes
    while begin < STEPS:
        fixed = estimator.fixed(carry)
        k1, k2 = fixed.k1, fixed.k2
        assert isinstance(k1, int)
        assert isinstance(k2, int)
        end = min(begin + k1, STEPS)
        assert estimator.next_steps(carry) == k1
        estimate, carry = estimator.estimate(system.model, squared, carry, window_of(recording, begin, end))
        assert (estimate.metrics["k1"], estimate.metrics["k2"]) == (k1, k2)
        if number % 6 == 2 or begin > STEPS - 15:
            wanted = frozen_boundary(recording, parameters, begin, end, k1=k1, k2=k2, losses=losses)
            assert relative(estimate.gradients, wanted) < 1e-10, (begin, k1, k2)
        first = begin if bool(recording.reset[begin].all()) else first
        if k2 > k1:
            assert estimate.lookback == min(end - first, k2)
        seen.add((k1, k2))
        begin, number = end, number + 1
    assert len(seen) > 2


def test_only_as_much_is_remembered_as_may_be_needed() -> None:
    model = nn.GRU(D, H)
    for estimator, needed in (
        (TBPTT(4, Choice([3, 30])), 30),
        (TBPTT(4, Ramp(1, 3, over=5)), 0),
        (TBPTT(4, Adaptive(max=20, every=2)), 20 + SPREAD),
        (TBPTT(4, 4), 0),
    ):
        carry = estimator.init(model, B)
        for _ in range(60):
            window = Window(torch.randn(4, B, D), torch.randn(4, B, H))
            _, carry = estimator.estimate(model, squared, carry, window)
            assert carry.past.steps <= 2 * needed  # the oldest stretch is kept whole
        assert carry.past.steps >= needed


def test_a_longer_window_than_k1_is_now_is_refused() -> None:
    estimator = TBPTT(Choice([4]), 4)
    model = nn.GRU(D, H)
    with pytest.raises(ShapeError, match="k1 = 4") as refused:
        estimator.estimate(model, squared, estimator.init(model, B), Window(torch.randn(5, B, D), torch.randn(5, B, H)))
    assert "next_steps" in refused.value.fix


@pytest.mark.parametrize(
    "make",
    [
        lambda: TBPTT(4, Choice([4, 8]), replay="retain"),
        lambda: TBPTT(Choice([4, 8]), 16, replay="retain"),
        lambda: TBPTT(Adaptive(max=8), Adaptive(max=9)).init(nn.GRU(D, H), B),
        lambda: TBPTT(4, Adaptive(windows="plain")).init(nn.GRU(D, H), B),
        lambda: TBPTT("Adaptive()", 4),
        lambda: TBPTT(4, 4.0),
    ],
)
def test_lengths_that_do_not_go_together_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match="expected") as refused:
        make()
    assert refused.value.fix


# The probe


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_probe_is_the_gradient_of_single_losses_by_lag(name: str) -> None:
    """Each lane has one target, at another distance from the window's end."""
    torch.manual_seed(1)
    system = SYSTEMS[name]()
    steps, lags = 60, (1, 2, 3, 7, 12, 33)
    assert set(lags) <= set(lag_grid(33 + SPREAD, dense_up_to=8, ratio=1.25))
    recording = record(system, steps, masks=False, resets=False)
    recording.mask[:] = False
    recording.mask[steps - 1, 0] = recording.mask[steps - 6, 1] = True
    recording.reset[40, 1] = True  # nothing crosses it: 15 steps before the loss of lane 1
    whole = window_of(recording, 0, steps)
    past = Stretch(whole[: steps - 8].without_targets(), None)
    dims = find_lane_dims(system.model, whole.inputs)
    seen = probe(system.model, StepLoss.of(squared), past, whole[steps - 8 :], dims, lags, np.random.default_rng(0))
    assert seen is not None

    parameters = {key: value.detach().requires_grad_() for key, value in system.model.named_parameters()}
    for lane, at in ((0, steps - 1), (1, steps - 6)):
        only = copy.copy(recording)
        object.__setattr__(only, "mask", torch.zeros_like(recording.mask))
        only.mask[at, lane] = True
        total, states = only.run([parameters] * steps, None, 0, steps, [at])
        for index, lag in enumerate(lags):
            found = torch.autograd.grad(total, states[at - lag + 1], retain_graph=True, allow_unused=True)
            parts = [part[lane].square().sum() for part in found if part is not None]
            wanted = float(sum(parts, torch.zeros(())).sqrt())
            if lane == 0:  # its loss is at the window's end, where cuts are dense, or at one of them
                assert float(seen.norms[index, lane]) == pytest.approx(wanted, rel=1e-9, abs=1e-300), (lane, lag)
            elif lag <= 12:  # between two cuts
                assert float(seen.norms[index, lane]) == pytest.approx(wanted, rel=0.5), (lane, lag)
            elif lag > 20:  # a reset lies between
                assert wanted == float(seen.norms[index, lane]) == 0


def test_a_probe_waits_for_enough_steps_and_for_a_target() -> None:
    model, loss, draws = nn.GRU(D, H), StepLoss.of(squared), np.random.default_rng(0)
    window = Window(torch.randn(8, B, D), torch.randn(8, B, H))
    dims = find_lane_dims(model, window.inputs)
    for past_steps, enough in ((10 + SPREAD - 9, False), (10 + SPREAD - 8, True)):
        past = Stretch(Window(torch.randn(past_steps, B, D)), None)
        assert (probe(model, loss, past, window, dims, (1, 10), draws) is not None) == enough
    long_ago = Stretch(Window(torch.randn(50, B, D)), None)
    assert probe(model, loss, long_ago, window.without_targets(), dims, (1, 10), draws) is None


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = nn.GRU(D, H)
        self.norm = nn.BatchNorm1d(H)

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs, state = self.core(nn.functional.dropout(inputs, 0.4), state)
        return self.norm(outputs.flatten(0, 1)).view_as(outputs), state


def test_probing_disturbs_nothing() -> None:
    """With min = max the lengths are those of a fixed pair: every gradient, buffer and random number is the same."""
    windows = [Window(torch.randn(4, B, D), torch.randn(4, B, H)) for _ in range(30)]
    results: list[list[Tensor]] = []
    probes = 0
    for k2 in (7, Adaptive(min=4, max=4, every=3)):
        torch.manual_seed(5)
        model, estimator = Dropping(), TBPTT(4, k2)
        carry = estimator.init(model, B)
        found: list[Tensor] = []
        for window in windows:
            estimate, carry = estimator.estimate(model, squared, carry, window)
            found += [*estimate.gradients.values(), *(each.clone() for each in model.buffers()), torch.rand(2)]
            probes += "needed_lookback" in estimate.metrics
        results.append(found)
    assert probes > 5
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("beta", "steps"), [(0.9, 22), (0.6, 5), (0.3, 3)])
def test_adaptive_finds_what_a_known_decay_needs(beta: float, steps: int) -> None:
    torch.manual_seed(0)
    model, estimator = Leaking(beta), TBPTT(3, Adaptive(tolerance=0.1, min=2, max=120, every=1))
    carry = estimator.init(model, B)
    for _ in range(120):
        window = Window(torch.randn(3, B, 1).double(), torch.randn(3, B).double())
        estimate, carry = estimator.estimate(model, lambda o, t: (o - t).square(), carry, window)
    assert abs(estimate.metrics["needed_lookback"] - steps) <= 1
    assert estimate.metrics["decay_rate"] == pytest.approx(beta, rel=0.1)  # phi_0 is taken from phi_1
    assert abs(estimate.metrics["k2"] - (steps + 2)) <= 1
    assert estimate.lookback == estimate.metrics["k2"]


def test_both_lengths_together_are_aichers_windows_or_plain_ones() -> None:
    torch.manual_seed(0)
    for windows in ("overlapping", "plain"):
        adaptive = Adaptive(tolerance=0.1, min=2, max=200, every=1, windows=windows)
        estimator, model = TBPTT(adaptive, adaptive), Leaking(0.9)
        carry = estimator.init(model, B)
        for _ in range(150):
            steps = estimator.next_steps(carry)
            window = Window(torch.randn(steps, B, 1).double(), torch.randn(steps, B).double())
            estimate, carry = estimator.estimate(model, lambda o, t: (o - t).square(), carry, window)
        k1, k2 = estimate.metrics["k1"], estimate.metrics["k2"]
        assert (k1, k2) == ((k1, 2 * k1 - 1) if windows == "overlapping" else (k1, k1))
        assert abs(k1 - (22 if windows == "overlapping" else 90)) <= (
            1 if windows == "overlapping" else 5
        )  # lags between cuts


# In a run


def trainer(directory: Path | None, estimator: TBPTT, lr: float = 0.05) -> tbptt.Trainer:
    torch.manual_seed(3)
    model = nn.GRU(D, H)
    data = torch.randn(4000, D), torch.randn(4000, H)
    stream = tbptt.ArrayStream(*data, lanes=4)
    sgd = torch.optim.SGD(model.parameters(), lr=lr)
    saving = tbptt.Saving(every=10)
    return tbptt.Trainer(model, nn.MSELoss(), sgd, estimator, stream, directory=directory, saving=saving)


@pytest.mark.parametrize(
    "estimator",
    [
        TBPTT(6, Adaptive(max=20, every=3)),
        TBPTT(Adaptive(max=20, every=3), Adaptive(max=20, every=3)),
        TBPTT(Adaptive(max=20, every=3, windows="plain"), Adaptive(max=20, every=3, windows="plain")),
        TBPTT(RandomLength(6, deviation=2), Choice([4, 30])),
    ],
    ids=["k2", "both", "plain", "drawn"],
)
def test_a_resumed_run_goes_on_with_the_same_lengths(tmp_path: Path, estimator: TBPTT) -> None:
    whole = trainer(tmp_path / "whole", estimator)
    whole.run(updates=47)
    trainer(tmp_path / "parts", estimator).run(updates=23)
    resumed = trainer(tmp_path / "parts", estimator)
    resumed.run(updates=47)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert whole.carry.state_dict()["lengths"] == resumed.carry.state_dict()["lengths"]
    lines = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "parts")]
    assert lines[0] == lines[1]


def test_the_trainer_follows_the_rate_of_the_length() -> None:
    """With SGD the weights move by rate x length / mean x gradient, and the rate itself stays."""
    run = trainer(None, TBPTT(RandomLength(10, deviation=4, half=0.5), 40))
    before = [each.detach().clone() for each in run.model.parameters()]
    lengths = []
    for update in range(1, 6):
        lengths.append(run.estimator.next_steps(run.carry))
        run.run(updates=update)
        after = [each.detach().clone() for each in run.model.parameters()]
        for old, new, parameter in zip(before, after, run.model.parameters(), strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(new, old - 0.05 * lengths[-1] / 10 * parameter.grad)
        before = after
        assert run.optimizer.param_groups[0]["lr"] == 0.05
    assert len(set(lengths)) > 2


def test_history_gives_the_newest_steps_and_the_state_before_them() -> None:
    torch.manual_seed(0)
    model = nn.GRU(D, H)
    inputs = torch.randn(30, B, D)
    dims = (1,)
    history, state = History(), None
    for begin in range(0, 30, 7):
        window = Window(inputs[begin : begin + 7], start=begin)
        history = history.followed_by([Stretch(window, state)], 0, keep=16)
        state = model(window.inputs, state)[1].detach()
    assert history.steps == 16  # 2 + 7 + 7
    for steps in (1, 2, 5, 9, 16, 40):
        found = history.last(model, steps, dims)
        assert found is not None
        first = 30 - min(steps, 16)
        assert torch.equal(found.window.inputs, inputs[first:])
        assert found.window.start == first
        torch.testing.assert_close(found.state, model(inputs[:first])[1])
    assert History().last(model, 3, dims) is None
    assert history.last(model, 0, dims) is None
